"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): how well the word pieces of two texts match, in the space
of an encoder.

The same numbers as bert_score.score(candidates, references, lang="ar") of the package bert-score 0.3.13,
which the published figures come from: raw cosines, not rescaled. Unrelated Arabic texts already score high,
so only differences between systems mean something.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from sevloss import InputError, data, device, distributed
from sevloss.models import load_model, load_tokenizer

MOST_HELD = 2 ** 15  # pieces whose vectors are in memory at a time: 0.1 GB where they are 768 wide


def bert_score(candidates, references, ckpt="bert-base-multilingual-cased", layer=9, *, compute=None):
    """Two lists of n texts -> precision, recall, f1, each (n,) fp32 on the CPU. See Scorer for the
    arguments."""
    return Scorer.load(ckpt, layer, compute=compute).score(candidates, references)


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
        """ckpt: an encoder, named as for load_model. layer: the block whose output is compared, from 1; 0 is
        the embeddings. compute: None is fp32, as published scores are."""
        compute = compute or device.choose(dtype="fp32")
        model = load_model(ckpt, device=compute.device)
        if not hasattr(model, "hidden_states"):
            raise InputError(f"{ckpt} is no encoder: BERTScore needs one, like bert-base-multilingual-cased")
        blocks = model.config.num_hidden_layers
        if not 0 <= layer <= blocks:
            raise InputError(f"BERTScore cannot read block {layer}: {ckpt} has blocks 1 to {blocks}")
        on_cpu = compute.device.type == "cpu"
        if on_cpu and compute.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.forward = _onednn(module)
        return cls(model, load_tokenizer(ckpt), layer, compute)

    @torch.no_grad()
    def score(self, candidates, references):
        """Two lists of n texts -> precision, recall, f1, each (n,) fp32 on the CPU. Prints how many texts
        were cut, if any.

        precision: the mean, over the candidate's pieces, of the largest cosine with a piece of the reference;
        recall: the same from the other side; f1 = 2PR / (P + R). [CLS] and [SEP] may be a piece's best match,
        but have no part in the means. A text without pieces scores 0.
        """
        pairs = [(c.strip(), r.strip()) for c, r in zip(candidates, references, strict=True)]
        texts = list(dict.fromkeys(chain.from_iterable(pairs)))
        most = self.model.config.context
        encoded, self.cut = data.encode_and_cut(self.tokenizer, texts, most)
        if self.cut:
            print(f"  BERTScore: {self.cut:,} of {len(texts):,} different texts were cut to {most} pieces")
        ids = dict(zip(texts, encoded))
        lengths = [len(ids[c]) + len(ids[r]) for c, r in pairs]
        scores = torch.zeros(len(pairs), 2, device=self.compute.device)
        parts = distributed.micro_batches(lengths, range(len(pairs)), MOST_HELD)
        with _full_fp32():
            for rows in tqdm(parts, desc="BERTScore", leave=False, mininterval=1):
                texts = dict.fromkeys(chain.from_iterable(pairs[row] for row in rows))
                vectors = self._unit_vectors({text: ids[text] for text in texts})
                for row in rows:
                    c, r = pairs[row]
                    if len(ids[c]) > 2 and len(ids[r]) > 2:  # more than [CLS] and [SEP]
                        cosines = vectors[c] @ vectors[r].T  # (pieces of c, pieces of r)
                        scores[row, 0] = cosines.amax(1)[1:-1].mean()
                        scores[row, 1] = cosines.amax(0)[1:-1].mean()
        precision, recall = distributed.add_up(scores).cpu().unbind(1)
        return precision, recall, (2 * precision * recall / (precision + recall)).nan_to_num(0.0)

    def _unit_vectors(self, ids):
        """{text: piece ids} -> {text: (its pieces, D) fp32 vectors of length 1}"""
        texts = list(ids)
        lengths = [len(ids[text]) for text in texts]
        most_tokens = 1024 if self.compute.device.type == "cpu" else 16384  # fits a CPU's cache; fills a GPU
        vectors = {}
        with self.compute.autocast():
            for part in data.micro_batches(lengths, range(len(texts)), most_tokens):
                part = [texts[i] for i in part]
                tokens, pieces = data.pack([ids[text] for text in part], self.compute.device)
                hidden = self.model.hidden_states(tokens, pieces, self.layer)  # (N, D)
                vectors.update(zip(part, F.normalize(hidden.float(), dim=-1).split(pieces)))
        return vectors


@contextmanager
def _full_fp32():
    """No TF32: device.choose allows it for training, but it moves scores in the fourth digit."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program around this one has set the switches of the backends apart
        overall = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def _onednn(linear):
    """The forward pass of an nn.Linear in oneDNN: the same fp32 products as in MKL, which torch takes, but
    faster on AMD processors."""
    weight, bias = linear.weight.detach().to_mkldnn(), linear.bias.detach().to_mkldnn()
    return lambda x: F.linear(x.to_mkldnn(), weight, bias).to_dense()
