"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): how well the word pieces of two texts match, in the space of an encoder.

The same numbers as bert_score.score(candidates, references, lang="ar") of the package bert-score 0.3.13, which the published figures
come from: raw cosines, not rescaled. Unrelated Arabic texts already score high, so only differences between systems mean something.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from sevloss import InputError, data, device
from sevloss.models import load_model, load_tokenizer

MOST_HELD = 2 ** 17  # pieces whose vectors are in memory at a time: 0.4 GB where they are 768 wide


def bert_score(candidates, references, ckpt="bert-base-multilingual-cased", layer=9, *, compute=None, idf=False, progress=None):
    """Two lists of n texts -> precision, recall, f1, each (n,) fp32 on the CPU. See Scorer for the arguments."""
    return Scorer.load(ckpt, layer, compute=compute).score(candidates, references, idf=idf, progress=progress)


@contextmanager
def _full_fp32():
    """No TF32: device.choose allows it for training, but it moves scores in the fourth digit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _onednn(linear):
    """The forward pass of an nn.Linear in oneDNN: the same fp32 products as in MKL, which torch takes, but faster on AMD processors."""
    weight, bias = linear.weight.detach().to_mkldnn(), linear.bias.detach().to_mkldnn()
    return lambda x: F.linear(x.to_mkldnn(), weight, bias).to_dense()


@dataclass
class Scorer:
    """An encoder, read once, for any number of calls of score()."""
    model: nn.Module
    tokenizer: Tokenizer
    layer: int
    compute: device.Compute
    cut: int = 0  # how many different texts of the last call were longer than the encoder reads

    @classmethod
    def load(cls, ckpt="bert-base-multilingual-cased", layer=9, *, compute=None):
        """ckpt: an encoder, named as for load_model. layer: the block whose output is compared, from 1; 0 is the embeddings.

        compute: None is fp32, as published scores are. Raises InputError where there is no such encoder or no such block.
        """
        compute = compute or device.choose(dtype="fp32")
        model = load_model(ckpt, device=compute.device)
        if not hasattr(model, "hidden_states"):
            raise InputError(f"{ckpt} is no encoder: BERTScore needs one, like bert-base-multilingual-cased")
        if not 0 <= layer <= model.config.num_hidden_layers:
            raise InputError(f"BERTScore cannot read block {layer}: {ckpt} has blocks 1 to {model.config.num_hidden_layers}")
        if compute.device.type == "cpu" and compute.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.forward = _onednn(module)
        return cls(model, load_tokenizer(ckpt), layer, compute)

    @torch.inference_mode()
    @_full_fp32()
    def score(self, candidates, references, *, idf=False, progress=None):
        """Two lists of n texts -> precision, recall, f1, each (n,) fp32 on the CPU. Prints how many texts were cut, if any.

        precision: the mean, over the candidate's pieces, of the largest cosine with a piece of the reference; recall: the same from
        the other side; f1 = 2PR / (P + R). [CLS] and [SEP] may be a piece's best match, but have no part in the means. A text
        without pieces scores 0. idf: pieces weigh log((n + 1) / (references that have it + 1)). progress: a bar of 2n steps.
        """
        if len(candidates) != len(references):
            raise ValueError(f"there are {len(candidates)} candidates and {len(references)} references")
        pairs = [(c.strip(), r.strip()) for c, r in zip(candidates, references)]
        ids = self._encode(list(dict.fromkeys(text for pair in pairs for text in pair)))
        weights = self._piece_weights([ids[r] for _, r in pairs] if idf else None)
        scores = torch.zeros(2, len(pairs), device=self.compute.device)
        for rows in data.micro_batches([len(ids[c]) + len(ids[r]) for c, r in pairs], range(len(pairs)), MOST_HELD):
            vectors = self._unit_vectors(Counter(text for row in rows for text in pairs[row]), ids, progress)
            for row in rows:
                c, r = pairs[row]
                if len(ids[c]) > 2 and len(ids[r]) > 2:
                    cosines = vectors[c] @ vectors[r].T  # (pieces of the candidate, pieces of the reference)
                    scores[0, row] = _mean(cosines.amax(1), weights[ids[c]])
                    scores[1, row] = _mean(cosines.amax(0), weights[ids[r]])
        precision, recall = scores.cpu()
        return precision, recall, (2 * precision * recall / (precision + recall)).nan_to_num(0.0)

    def _encode(self, texts):
        """{text: piece ids}"""
        most = self.model.config.context
        ids, self.cut = data.encode_and_cut(self.tokenizer, texts, most)
        if self.cut:
            print(f"  BERTScore: {self.cut:,} of {len(texts):,} different texts were cut to {most} pieces")
        return dict(zip(texts, ids))

    def _piece_weights(self, references):
        """(V,) what each piece weighs in a mean: 1, [CLS] and [SEP] 0; or the idf over `references`, a list of id lists."""
        weights = torch.ones(self.model.config.vocab_size, dtype=torch.float64)
        if references is None:
            weights[self.tokenizer.encode("").ids] = 0
        else:
            for ids in references:
                weights[list(set(ids))] += 1
            weights = ((len(references) + 1) / weights).log()  # 0 for [CLS] and [SEP], which every reference has
        return weights.float().to(self.compute.device)

    def _unit_vectors(self, counts, ids, progress):
        """{text: (its pieces, D) fp32 vectors of length 1}. counts: {text: how often it occurs}; each is encoded once."""
        texts, vectors = list(counts), {}
        most_tokens = 1024 if self.compute.device.type == "cpu" else 16384  # what stays in a CPU's cache; what fills a GPU
        with self.compute.autocast():
            for part in data.micro_batches([len(ids[text]) for text in texts], range(len(texts)), most_tokens):
                part = [texts[i] for i in part]
                tokens, lengths = data.pack([ids[text] for text in part], self.compute.device)
                hidden = self.model.hidden_states(tokens, lengths, self.layer)  # (N, D)
                vectors |= zip(part, F.normalize(hidden.float(), dim=-1).split(lengths))
                if progress is not None:
                    progress.update(sum(counts[text] for text in part))
        return vectors


def _mean(values, weights):
    return (values * weights).sum() / weights.sum().clamp(min=1e-30)  # idf can make every weight 0
