"""Pairs -> splits -> token ids, on disk and memory-mapped -> packed micro-batches."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from sevloss import InputError, interpreting, lock, writing
from sevloss.device import to_device
from sevloss.inputs import arabic, tables

PROMPT = "\n{complaint}\n\nالاجابة:\n"
ROWS_AT_ONCE = 8192  # that are read, encoded and written together


# --- splits: by a hash of the complaint, so the same everywhere, and no complaint stands on two sides -------

SPLIT_RULE = 3  # version of `normalise` and `split_of`; runs store it, and those of another rule are refused
SPLITS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))  # upper ends on [0, 1)
SAME_LETTERS = {"ٱ": "ا", "ى": "ي", "ی": "ي", "ة": "ه", "ک": "ك"}  # people write one for the other


class _NormalisedCharacters(dict):
    """What str.translate puts in place of each character; filled as characters occur."""

    def __missing__(self, code):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Mn", "Cf") or character == "ـ":  # diacritics, invisible marks, tatweel
            self[code] = None
        elif category == "Nd":  # decimal digits, Arabic ones too
            self[code] = str(unicodedata.digit(character))
        elif category[0] in "LN":  # letters and other numbers
            self[code] = SAME_LETTERS.get(character, character)
        else:
            self[code] = " "
        return self[code]


_NORMALISED_CHARACTERS = _NormalisedCharacters()


def normalise(complaint):
    """Equal for complaints that differ in diacritics, hamza on its carrier, forms of alef, ya and ta marbuta,
    digits, invisible marks, punctuation, case or space alone."""
    text = unicodedata.normalize("NFKD", complaint)  # hamza and diacritics become marks of their own
    text = text.casefold().translate(_NORMALISED_CHARACTERS)
    return " ".join(text.split()) or complaint


def hash_fraction(complaint, salt=""):
    """In [0, 1), from the normalised complaint and `salt` alone: the same on every machine."""
    digest = hashlib.blake2b((salt + normalise(complaint)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2 ** 64


def fold_of(complaint, count, salt="fold"):
    """0 to count - 1: which of `count` folds the complaint lies in."""
    return int(hash_fraction(complaint, salt) * count)


def complaint_id(complaint):
    """16 hexadecimal digits that name the normalised complaint."""
    return hashlib.blake2b(normalise(complaint).encode(), digest_size=8).hexdigest()


def split_of(complaint):
    """'train', 'validation' or 'test': 80, 10 and 10 in a hundred."""
    position = hash_fraction(complaint)
    return next(name for name, end in SPLITS if position < end)


def split_pairs(pairs):
    """{'train': [...], 'validation': [...], 'test': [...]}, each in the order given."""
    sides = {name: [] for name, _ in SPLITS}
    for pair in pairs:
        sides[split_of(pair.complaint)].append(pair)
    return sides


def sample_pairs(pairs, size):
    """At most `size` of the pairs, the same ones whatever their order; sorted by a hash of the complaint."""
    return sorted(pairs, key=lambda pair: (hash_fraction(pair.complaint, "order"), pair.response))[:size]


def check_split_rule(stored, name):
    """InputError where `name`, a run, was made by another rule: its test rows may be training rows now."""
    if stored != SPLIT_RULE:
        raise InputError(f"{name} was made with split rule {stored or 1}, this version has {SPLIT_RULE}: its "
                         "rows would change sides; train it again, or use the version that made it")


# --- has a table, a file or an argument changed? ------------------------------------------------------------

class Fingerprint:
    """Of pairs: changes when any text, label or probability that training reads does."""

    def __init__(self, pairs=()):
        self.hash = hashlib.blake2b(digest_size=8)
        self.add(pairs)

    def add(self, pairs):
        for pair in pairs:
            sizes_and_labels = len(pair.complaint), len(pair.response), pair.severity, pair.probabilities
            self.hash.update(f"{sizes_and_labels}{pair.complaint}{pair.response}".encode())

    def __str__(self):
        return self.hash.hexdigest()


def file_fingerprint(path):
    """[name, size, time of change]: changes when the file does."""
    status = os.stat(path)
    return [Path(path).name, status.st_size, status.st_mtime_ns]


def digest(*parts):
    """12 hexadecimal digits that name what something was made from."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


# --- token ids ----------------------------------------------------------------------------------------------

def choose_preprocess(choice, ckpt, raw_config):
    """auto|arabert|none -> arabert|none. auto: as stored in a run, else as in pre-training."""
    if choice != "auto":
        return choice
    with interpreting(f"config.json of {ckpt}"):
        stored = raw_config.get("sevloss", {}).get("preprocess")
        if stored not in (None, "arabert", "none"):
            raise ValueError(f"preprocess is {stored!r}, neither arabert nor none")
    if stored:
        return stored
    names = f"{ckpt} {raw_config.get('_name_or_path', '')}".lower()
    if re.search(r"arabertv[12]\b", names):
        print(f"{ckpt} needs text cut by the Farasa segmenter, which is not done here: take arabertv02")
    if str(ckpt) == "tiny" or "arabert" in names or "aragpt2" in names:
        return "arabert"
    return "none"


def prepare(text, preprocess):
    """Text as the checkpoint saw its own in pre-training. preprocess: arabert or none."""
    return arabic.preprocess(text) if preprocess == "arabert" else text


def encode(tokenizer, texts, *, special):
    """List of id lists. '</s>' in a text stays text. special: with the tokenizer's BOS, CLS or SEP."""
    tokenizer.encode_special_tokens = True
    ids = []
    for start in range(0, len(texts), 1024):  # what encode_batch_fast returns is large
        encodings = tokenizer.encode_batch_fast(texts[start:start + 1024], add_special_tokens=special)
        ids += [encoding.ids for encoding in encodings]
    return ids


def encode_from_start(tokenizer, texts):
    """List of id lists, with what the tokenizer puts before a text (BOS), not what follows it (EOS)."""
    probe = tokenizer.encode("ا")
    ordinary = [*probe.special_tokens_mask, 0].index(0)  # place of the first token that is not special
    before = probe.ids[:ordinary]
    return [before + ids for ids in encode(tokenizer, texts, special=False)]


def encode_and_cut(tokenizer, texts, max_length, preprocess="none"):
    """(id lists with [CLS] and [SEP], how many were cut): what is too long loses its end, not its [SEP]."""
    ids = encode(tokenizer, [prepare(text, preprocess) for text in texts], special=True)
    cut = 0
    for i, text_ids in enumerate(ids):
        if len(text_ids) > max_length:
            ids[i] = text_ids[:max_length - 1] + text_ids[-1:]
            cut += 1
    return ids, cut


def encode_prompts(tokenizer, complaints, max_lengths, prompt=PROMPT):
    """(id lists of the prompts, how many complaints were cut). max_lengths: one for all, or one a complaint.

    A complaint that is too long loses its end, never the words of the prompt after it.
    """
    if isinstance(max_lengths, int):
        max_lengths = [max_lengths] * len(complaints)
    ids = encode_from_start(tokenizer, [prompt.format(complaint=complaint) for complaint in complaints])
    cut = 0
    for i, (complaint, max_length) in enumerate(zip(complaints, max_lengths)):
        if len(ids[i]) <= max_length:
            continue
        cut += 1
        ends = [end for _, end in tokenizer.encode(complaint, add_special_tokens=False).offsets]
        while len(ids[i]) > max_length:  # once, as a rule: the end of what is left may encode to a token more
            surplus = len(ids[i]) - max_length
            del ends[-surplus:]
            if not ends:
                raise InputError(f"{max_length} tokens are too few for a prompt: raise --max-length")
            ids[i], = encode_from_start(tokenizer, [prompt.format(complaint=complaint[:ends[-1]])])
    return ids, cut


@dataclass
class Examples:
    """n encoded pairs, end to end: prompt, response, EOS; those from first_target on are targets."""
    ids: np.ndarray  # (total,) int32
    lengths: np.ndarray  # (n,) int32
    first_target: np.ndarray  # (n,) int32
    probabilities: np.ndarray  # (n, 3) float32, of the severity classes; (0, 1, 0) where they are unknown
    rows: np.ndarray | None = None  # (n,) int32, which row of the table each one is

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        """The ids of example i."""
        return self.ids[self.starts[i]:self.starts[i] + self.lengths[i]]

    @cached_property
    def starts(self):
        """(n,) where each example begins in `ids`."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @cached_property
    def input_lengths(self):
        """(n,) tokens that each example feeds to the model: its last is only ever a target."""
        return self.lengths - 1

    @cached_property
    def target_counts(self):
        """(n,) supervised tokens of each example, the L of the paper."""
        return self.lengths - self.first_target


def encode_pairs(pairs, tokenizer, *, max_length, eos_id, preprocess):
    """(Examples, Counter of cuts): PROMPT and response encoded apart, joined, then EOS; at most max_length.

    Where a pair is too long, the prompt keeps at least half of max_length; a response that is cut has no EOS.
    """
    complaints = [prepare(pair.complaint, preprocess) for pair in pairs]
    responses = encode(tokenizer, [prepare(pair.response, preprocess) for pair in pairs], special=False)
    prompt_limits = [max(max_length // 2, max_length - len(response) - 1) for response in responses]
    prompts, complaints_cut = encode_prompts(tokenizer, complaints, prompt_limits)
    rows = [prompt + response + [eos_id] for prompt, response in zip(prompts, responses)]
    cuts = Counter(complaints=complaints_cut, responses=sum(len(row) > max_length for row in rows),
                   empty=sum(not response for response in responses),
                   unasked=sum(not complaint for complaint in complaints))
    rows = [row[:max_length] for row in rows]
    return _examples(pairs, rows, [len(prompt) for prompt in prompts]), cuts


def encode_published(pairs, tokenizer, *, max_length, eos_id, preprocess):
    """What the paper's notebooks train on: (Examples, Counter of cuts), prompt and response as one text,
    filled up with EOS to max_length, and all of it supervised."""
    texts = []
    for pair in pairs:
        prompt = PROMPT.format(complaint=prepare(pair.complaint, preprocess))
        texts.append(prompt + prepare(pair.response, preprocess))
    encoded = encode_from_start(tokenizer, texts)
    rows = [(ids + [eos_id] * max_length)[:max_length] for ids in encoded]
    cuts = Counter(responses=sum(len(ids) > max_length for ids in encoded))
    return _examples(pairs, rows, [1] * len(rows)), cuts


def _examples(pairs, rows, first_target):
    probabilities = [pair.probabilities or (0, 1, 0) for pair in pairs]
    return Examples(
        ids=np.fromiter(chain.from_iterable(rows), np.int32),
        lengths=np.array([len(row) for row in rows], np.int32),
        first_target=np.array(first_target, np.int32),
        probabilities=np.array(probabilities, np.float32).reshape(-1, 3),
        rows=np.array([pair.row for pair in pairs], np.int32))


def describe_cuts(cuts, pairs, max_length):
    """A line that says how many of `pairs` pairs were cut, or left empty by preprocessing; "" for none."""
    if not cuts.total():
        return ""
    line = (f"  of {pairs:,} pairs {cuts['complaints']:,} complaints and {cuts['responses']:,} responses "
            f"were cut to fit {max_length} tokens")
    if cuts["unasked"] or cuts["empty"]:
        line += f"; preprocessing left nothing of {cuts['unasked']:,} complaints, {cuts['empty']:,} responses"
    return line


# --- the encoded table: flat files, written once, read through np.memmap ------------------------------------

ARRAYS = {"ids": np.int32, "lengths": np.int32, "first_target": np.int32, "probabilities": np.float32,
          "rows": np.int32}


@dataclass
class EncodedTable:
    """All that training needs of a table."""
    train: Examples
    validation: Examples  # of a sample of the validation rows
    fingerprint: str  # of all rows
    validation_fingerprint: str  # of all rows of a table of its own
    test_rows: int  # how many are kept for evaluate.py


def encoded_table(table, tokenizer, *, folder="runs/encoded", **how):
    """The EncodedTable of a table, from a folder of flat files; they are made first where there are none.

    how: arguments of _write_table. The folder is named after all that it is made from. It is written under
    another name, renamed and never changed; one that is damaged is made anew, and a stale one can be deleted
    at any time. What was printed when it was made is printed again.
    """
    validation_options = how.get("validation_options")
    made_from = dict(how, version=2, table=file_fingerprint(table), tokenizer=digest(tokenizer.to_str()),
                     prompt=PROMPT, split_rule=SPLIT_RULE,
                     validation_table=validation_options and file_fingerprint(validation_options["path"]))
    folder = Path(folder) / f"{Path(table).stem}-{digest(made_from)}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    checksum = folder / "checksum"
    with lock(folder.with_name(f"{folder.name}.lock"), wait=True):  # a second process finds it made
        if not checksum.is_file() or checksum.read_bytes() != _checksum(folder):
            if folder.is_dir():
                print(f"{folder} is damaged, or of another version: it is made anew")
            for path in (folder, temporary):
                shutil.rmtree(path, ignore_errors=True)
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    summary = _write_table(temporary, table, tokenizer, **how)
                summary |= {"printed": printed.getvalue(), "made_from": made_from}
                with writing(folder):
                    (temporary / "table.json").write_text(json.dumps(summary), encoding="utf-8")
                    (temporary / "checksum").write_bytes(_checksum(temporary))
                    os.rename(temporary, folder)
            except InputError:
                print(printed.getvalue(), end="")  # what was found in the table may say why
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    summary = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    print(f"{summary['printed']}encoded: {folder}")
    return EncodedTable(_open_examples(folder / "train"), _open_examples(folder / "validation"),
                        summary["fingerprint"], summary["validation_fingerprint"], summary["test_rows"])


def _checksum(folder):
    """SHA-256 of its files."""
    total = hashlib.sha256()
    for path in [*sorted(folder.glob("*/*.bin")), *folder.glob("table.json")]:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.digest()


def _write_table(folder, table, tokenizer, *, read_options, encode_options, supervise="response",
                 train_rows=None, validation_options=None, validation_rows=1000):
    """Fills `folder`, ROWS_AT_ONCE rows at a time -> fingerprints and the number of test rows.

    read_options: arguments of tables.usable_pairs; encode_options: of encode_pairs; supervise: response or
    row; train_rows: only the first so many (None: all); validation_options: arguments of usable_pairs for a
    table of its own, and then all of `table` is trained on; validation_rows: at most so many, to choose the
    best step.
    """
    encode_training = encode_published if supervise == "row" else encode_pairs
    validation_pairs = tables.read_pairs(**validation_options) if validation_options else []
    validation_ids = {complaint_id(pair.complaint) for pair in validation_pairs}
    validation_fingerprint = str(Fingerprint(validation_pairs))
    fingerprint = Fingerprint()
    trained = 0
    shared = 0
    test_rows = 0
    cuts = Counter()
    pairs = tables.usable_pairs(table, **read_options)
    while part := list(islice(pairs, ROWS_AT_ONCE)):
        fingerprint.add(part)
        if validation_options:
            train = [pair for pair in part if complaint_id(pair.complaint) not in validation_ids]
            shared += len(part) - len(train)
        else:
            sides = split_pairs(part)
            train = sides["train"]
            validation_pairs += sides["validation"]
            test_rows += len(sides["test"])
        validation_pairs = sample_pairs(validation_pairs, validation_rows)
        if train_rows:
            train = train[:train_rows - trained]
        examples, part_cuts = encode_training(train, tokenizer, **encode_options)
        _append_examples(folder / "train", examples)
        trained += len(train)
        cuts += part_cuts
    if not trained or not validation_pairs:
        raise InputError(f"{table} has too few complaints to train and validate on")
    if cuts["empty"] == trained:
        raise InputError(f"{table}: preprocessing leaves nothing of any response: use --preprocess none")
    if validation_options:
        print(f"  {shared:,} rows are not trained on: their complaints are in {validation_options['path']}")
    examples, part_cuts = encode_pairs(validation_pairs, tokenizer, **encode_options)
    _append_examples(folder / "validation", examples)
    if line := describe_cuts(cuts + part_cuts, trained + len(validation_pairs), encode_options["max_length"]):
        print(line)
    return {"fingerprint": str(fingerprint), "validation_fingerprint": validation_fingerprint,
            "test_rows": test_rows}


def _append_examples(folder, examples):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        with writing(folder / f"{name}.bin"), open(folder / f"{name}.bin", "ab") as file:
            getattr(examples, name).tofile(file)


def _open_examples(folder):
    arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in ARRAYS.items()}
    arrays["probabilities"] = arrays["probabilities"].reshape(-1, 3)
    return Examples(**arrays)


# --- packed micro-batches -----------------------------------------------------------------------------------

@dataclass
class Batch:
    """B sequences, packed: one after the other, without padding. S of the N tokens predict a target."""
    tokens: torch.Tensor  # (N,)
    lengths: list  # of the B sequences
    supervised_index: torch.Tensor  # (S,) where in `tokens` the next token is a target
    targets: torch.Tensor  # (S,)
    sequence: torch.Tensor  # (S,) which of the B sequences a target belongs to
    weights: torch.Tensor | None  # (S,) fp32


def make_batch(examples, indices, device="cpu", weight_per_token=None):
    """The examples `indices`, packed; without any, a token that predicts nothing. weight_per_token (n,): what
    each target of each of all n weighs."""
    if len(indices) == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return Batch(nothing.new_zeros(1), [1], nothing, nothing, nothing, nothing.float())
    rows = [examples[i] for i in indices]
    first_target = examples.first_target[indices]
    lengths = examples.input_lengths[indices]
    offsets = np.cumsum(lengths) - lengths
    counts = examples.target_counts[indices]

    tokens = np.concatenate([row[:-1] for row in rows])
    targets = np.concatenate([row[first:] for row, first in zip(rows, first_target)])
    # The target at place p of a sequence is predicted at place p - 1.
    supervised = [np.arange(offset + first - 1, offset + length)
                  for offset, first, length in zip(offsets, first_target, lengths)]

    def on_device(array, dtype=np.int64):
        return to_device(torch.from_numpy(array.astype(dtype)), device)

    return Batch(
        tokens=on_device(tokens),
        lengths=lengths.tolist(),
        supervised_index=on_device(np.concatenate(supervised)),
        targets=on_device(targets),
        sequence=on_device(np.repeat(np.arange(len(rows)), counts)),
        weights=None if weight_per_token is None else on_device(np.repeat(weight_per_token[indices], counts),
                                                                np.float32))


def micro_batches(lengths, indices, max_tokens):
    """Cuts `indices` into lists of at most `max_tokens` tokens (or a single longer sequence), sorted by
    length, so that sequences of equal length are neighbours."""
    parts = []
    tokens = 0
    for i in sorted(indices, key=lambda i: lengths[i]):
        if not parts or tokens + lengths[i] > max_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(int(i))
        tokens += int(lengths[i])
    return parts


def pack(id_lists, device="cpu"):
    """List of id lists -> tokens (N,), lengths."""
    tokens = torch.tensor(list(chain.from_iterable(id_lists)), dtype=torch.int64)
    return to_device(tokens, device), [len(ids) for ids in id_lists]
