"""Pairs -> splits -> token ids -> batches."""

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from sevloss import InputError
from sevloss.device import to_device
from sevloss.inputs import arabic
from sevloss.inputs.tables import ROWS_AT_ONCE

PROMPT = "\n{complaint}\n\nالاجابة:\n"


# --- splits, by a hash of the complaint: stateless, and no complaint stands on two sides -----------------------------------

SPLIT_RULE = 2  # its version; runs of another one were trained and tested on other rows
SPLITS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))  # upper ends on [0, 1)


class _Normalised(dict):
    """What str.translate puts in place of a character; found once for each that occurs."""

    def __missing__(self, code):
        character = chr(code)
        if unicodedata.combining(character) or character == "\u0640":
            self[code] = None
        else:
            self[code] = character if unicodedata.category(character)[0] in "LN" else " "
        return self[code]


_NORMALISED = _Normalised()


def normalised(complaint):
    """Equal for complaints that differ only in diacritics, tatweel, punctuation, case or white space."""
    return " ".join(unicodedata.normalize("NFKC", complaint).casefold().translate(_NORMALISED).split()) or complaint


def hash_fraction(complaint, salt=""):
    """A number in [0, 1) that depends on the normalised complaint (and `salt`) alone, the same on every machine."""
    digest = hashlib.blake2b((salt + normalised(complaint)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2 ** 64


def complaint_id(complaint):
    """A short name of the normalised complaint."""
    return hashlib.blake2b(normalised(complaint).encode(), digest_size=8).hexdigest()


def split_of(complaint):
    """'train', 'validation' or 'test': 80, 10 and 10 in a hundred. No complaint stands on two sides."""
    position = hash_fraction(complaint)
    return next(name for name, end in SPLITS if position < end)


def split_pairs(pairs):
    """{'train': [...], 'validation': [...], 'test': [...]}"""
    sides = {name: [] for name, _ in SPLITS}
    for pair in pairs:
        sides[split_of(pair.complaint)].append(pair)
    return sides


def sample_pairs(pairs, most):
    """At most `most` of the pairs, the same ones wherever they are chosen, in an order of their own."""
    return sorted(pairs, key=lambda p: hash_fraction(p.complaint, "order"))[:most]


# --- has a table, a file or an argument changed? ----------------------------------------------------------------------

class Fingerprint:
    """Of pairs, more of which may be added: changes when any text, label or probability that training reads does."""

    def __init__(self, pairs=()):
        self.digest = hashlib.blake2b(digest_size=8)
        for pair in pairs:
            self.add(pair)

    def add(self, pair):
        about = len(pair.complaint), len(pair.response), pair.severity, pair.probabilities
        self.digest.update(f"{about}{pair.complaint}{pair.response}".encode())

    def __str__(self):
        return self.digest.hexdigest()


def file_fingerprint(path):
    """Changes when the file does: name, size and time of change."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    status = os.stat(path)
    return [Path(path).name, status.st_size, status.st_mtime_ns]


def digest(*parts):
    """A short name of what something was made from."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


# --- token ids ------------------------------------------------------------------------------------------------------------

def choose_preprocess(choice, ckpt, raw_config):
    """auto|arabert|none -> arabert|none. auto: as stored in a run folder, else arabert for tiny and the checkpoints trained with it."""
    if choice != "auto":
        return choice
    stored = raw_config.get("sevloss", {}).get("preprocess")
    names = (str(ckpt) + " " + str(raw_config.get("_name_or_path", ""))).lower()
    if not stored and re.search(r"arabertv[12]\b", names):
        print(f"{ckpt} was trained on text cut by the Farasa segmenter, which is not done here: arabertv02 fits better")
    return stored or ("arabert" if str(ckpt) == "tiny" or "arabert" in names or "aragpt2" in names else "none")


def prepare(text, preprocess):
    """Text as the checkpoint saw its own in pre-training."""
    return arabic.preprocess(text) if preprocess == "arabert" else text


def encode(tokenizer, texts, *, special):
    """List of id lists. Words like '</s>' in a text stay text. special: with the tokenizer's own BOS, CLS or SEP."""
    tokenizer.encode_special_tokens = True
    ids = []
    for start in range(0, len(texts), 1024):
        ids += [e.ids for e in tokenizer.encode_batch_fast(texts[start:start + 1024], add_special_tokens=special)]
    return ids


def encode_and_cut(tokenizer, texts, max_length):
    """(id lists with the tokenizer's [CLS] and [SEP], how many were cut): a text that is too long loses its end, not its [SEP]."""
    ids = encode(tokenizer, texts, special=True)
    cut = sum(len(i) > max_length for i in ids)
    return [i if len(i) <= max_length else i[:max_length - 1] + i[-1:] for i in ids], cut


def encode_prompts(tokenizer, complaints, limit, prompt=PROMPT):
    """Ids of the prompt for each complaint, at most `limit` of them: a complaint that is too long loses its end, never the words after it.
    Returns (list of id lists, number of complaints cut)."""
    ids = encode(tokenizer, [prompt.format(complaint=c) for c in complaints], special=True)
    return ids, cut_prompts(tokenizer, ids, complaints, [limit] * len(complaints), prompt)


def cut_prompts(tokenizer, ids, complaints, limits, prompt=PROMPT):
    """Cuts complaints until the ids of their prompt are no more than the limit of each; `ids` is changed. Returns how many were cut."""
    cut = 0
    for i, most in enumerate(limits):
        keep = len(ids[i])
        cut += keep > most
        while len(ids[i]) > most:
            keep -= max(1, len(ids[i]) - most)
            offsets = tokenizer.encode(complaints[i], add_special_tokens=False).offsets
            if keep < 1 or not offsets:
                raise InputError(f"{most} tokens are too few for a prompt: raise --max-length")
            shorter = complaints[i][:offsets[min(keep, len(offsets)) - 1][1]]
            ids[i] = tokenizer.encode(prompt.format(complaint=shorter)).ids
    return cut


@dataclass
class Examples:
    """Encoded examples, end to end in one array. Example i is ids[starts[i]:starts[i + 1]]; its targets begin at
    position first_target[i] of it (all of the response and EOS)."""
    ids: np.ndarray  # (total,) int32
    starts: np.ndarray  # (n + 1,) int64
    first_target: np.ndarray  # (n,) int64

    def __len__(self):
        return len(self.first_target)

    @cached_property
    def input_lengths(self):
        """(n,) tokens that each example feeds: the last is only ever a target."""
        return np.diff(self.starts) - 1

    @cached_property
    def target_counts(self):
        """(n,) supervised tokens of each example, the L of the paper."""
        return np.diff(self.starts) - self.first_target


def encode_pairs(pairs, tokenizer, *, max_length, eos_id, preprocess):
    """PROMPT and response encoded apart and joined, then EOS, at most max_length ids. Prints what was cut. pairs: any iterable.

    Where a pair is too long, the prompt keeps at least half of max_length; a response that is cut has no EOS.
    """
    pairs, eos = iter(pairs), np.array([eos_id], np.int32)
    ids, first_target, lengths, complaints_cut, responses_cut = [], [], [], 0, 0
    while part := list(islice(pairs, ROWS_AT_ONCE)):
        complaints, responses = [prepare(p.complaint, preprocess) for p in part], [prepare(p.response, preprocess) for p in part]
        prompts = [PROMPT.format(complaint=complaint) for complaint in complaints]
        encoded = encode(tokenizer, prompts, special=True) + encode(tokenizer, responses, special=False)
        encoded = [np.array(text, np.int32) for text in encoded]
        prompts, responses = encoded[:len(part)], encoded[len(part):]
        limits = [max(max_length // 2, max_length - len(response) - 1) for response in responses]
        complaints_cut += cut_prompts(tokenizer, prompts, complaints, limits)

        first_target += map(len, prompts)
        wanted = [len(prompt) + len(response) + 1 for prompt, response in zip(prompts, responses)]
        ends = [eos] * len(part)
        for i, length in enumerate(wanted):
            if length > max_length:
                responses[i], ends[i] = responses[i][:max_length - len(prompts[i])], eos[:0]
                responses_cut += 1
        lengths += [min(length, max_length) for length in wanted]
        ids.append(np.concatenate(list(chain.from_iterable(zip(prompts, responses, ends))), dtype=np.int32))
    if complaints_cut or responses_cut:
        print(f"  of {len(lengths):,} pairs {complaints_cut:,} complaints and {responses_cut:,} responses were cut to fit "
              f"{max_length} tokens")
    return Examples(np.concatenate(ids), np.cumsum([0, *lengths]), np.array(first_target))


def encode_published(pairs, tokenizer, *, max_length, eos_id, preprocess):
    """What the paper's notebooks train on: prompt and response as one text, filled up with EOS to max_length, and all of it supervised."""
    texts = [PROMPT.format(complaint=prepare(p.complaint, preprocess)) + prepare(p.response, preprocess) for p in pairs]
    rows = [(ids + [eos_id] * max_length)[:max_length] for ids in encode(tokenizer, texts, special=True)]
    n = len(rows)
    return Examples(np.array(rows, np.int32).reshape(-1), np.arange(n + 1) * max_length, np.ones(n, np.int64))


# --- batches --------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    tokens: torch.Tensor  # (N,) whole documents, one after the other
    lengths: list  # of the documents
    supervised_index: torch.Tensor  # (S,) positions in the stream whose next token is a target
    targets: torch.Tensor  # (S,)
    example: torch.Tensor  # (S,) which document of the batch a target belongs to
    weights: torch.Tensor | None  # (S,) fp32


def make_batch(examples, indices, device="cpu", weights=None):
    """The examples `indices` as one stream. weights (n,): what a token of each of all examples weighs."""
    inputs, first = examples.input_lengths[indices], examples.first_target[indices]
    begins = np.cumsum(inputs) - inputs
    tokens = np.concatenate([examples.ids[s:s + n] for s, n in zip(examples.starts[indices], inputs)])
    supervised = np.concatenate([np.arange(b + f - 1, b + n) for b, f, n in zip(begins, first, inputs)])
    targets = np.concatenate([examples.ids[s + f:e] for s, f, e in
                              zip(examples.starts[indices], first, examples.starts[np.asarray(indices) + 1])])
    example = np.repeat(np.arange(len(first)), examples.target_counts[indices])

    tensors = [to_device(torch.from_numpy(array.astype(np.int64)), device) for array in (tokens, supervised, targets, example)]
    if weights is not None:
        weights = to_device(torch.from_numpy(np.repeat(weights[indices], examples.target_counts[indices]).astype(np.float32)), device)
    return Batch(tensors[0], inputs.tolist(), *tensors[1:], weights)


def micro_batches(lengths, indices, most_tokens):
    """Cuts `indices` into lists of at most `most_tokens` tokens (or a single longer document), sorted by length, so that
    documents of equal length are neighbours."""
    parts, size = [], 0
    for i in sorted(indices, key=lambda i: lengths[i]):
        if not parts or size + lengths[i] > most_tokens:
            parts.append([])
            size = 0
        parts[-1].append(int(i))
        size += lengths[i]
    return parts


def pack(id_lists, device="cpu"):
    """List of id lists -> tokens (N,), lengths."""
    tokens = torch.tensor(list(chain.from_iterable(id_lists)), dtype=torch.int64)
    return to_device(tokens, device), [len(ids) for ids in id_lists]
