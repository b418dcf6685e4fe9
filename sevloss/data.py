"""Tables -> pairs -> token ids -> batches; and the three splits. Data flows downwards through this file."""

import csv
import hashlib
import json
import os
import re
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from python_calamine import CalamineError, CalamineWorkbook

from sevloss import InputError, arabic
from sevloss.device import to_device

ROWS_AT_ONCE = 4096  # of a table, that the tokenizer gets
PROMPT = "\n{complaint}\n\nالاجابة:\n"
SAMPLE = os.path.relpath(Path(__file__).resolve().parent.parent / "data" / "sample.jsonl")
SPLITS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))  # upper ends on [0, 1)

# What a column is called, role by role; case, spaces, hyphens and underscores do not count.
COLUMN_NAMES = {
    "complaint": ("question", "q_body", "complaint", "post", "السؤال", "الشكوى"),
    "response": ("answer", "a_body", "response", "plan", "الإجابة", "الاجابة", "الرد"),
    "severity": ("severity", "الخطورة", "درجة الخطورة"),
    "non_critical": ("non_critical", "p_non_critical", "p_nc", "غير حرج"),
    "neutral": ("neutral", "p_neutral", "p_n", "متوسط"),
    "critical": ("critical", "p_critical", "p_c", "حرج"),
    "specialty": ("specialty", "category", "type", "التخصص"),
}
PROBABILITIES = ("non_critical", "neutral", "critical")
LABELS = {"noncritical": 0, "neutral": 1, "critical": 2, "غيرحرج": 0, "متوسط": 1, "حرج": 2}  # as _plain spells them


# --- tables ---------------------------------------------------------------------------------------------------------------

def read_rows(path):
    """Yields (row number as a spreadsheet or editor shows it, {column: text}) of a .jsonl, .csv, .tsv or .xlsx file.

    A row with more cells than the header comes as None. Raises InputError where the file cannot be read.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".xlsx": _read_xlsx}
    if not path.is_file():
        raise InputError(f"{path}: no such file; --data names another table")
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: a table is one of {', '.join(readers)}, not {path.suffix or 'a file without an ending'}")
    yield from readers[path.suffix.lower()](path)


@contextmanager
def _open_utf8(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start} of a block is 0x{error.object[error.start]:02x}): "
                         f"save it as UTF-8, e.g. iconv -f WINDOWS-1256 -t UTF-8") from error


def count_rows(path):
    """How many rows a table has, without making rows of them: for progress bars."""
    path = Path(path)
    if path.suffix.lower() == ".xlsx":
        return CalamineWorkbook.from_path(path).get_sheet_by_index(0).height - 1
    if path.suffix.lower() == ".jsonl":
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    return sum(1 for _ in _csv_lines(path)) - 1  # a cell may hold line breaks, so lines of the file are not rows


def _read_jsonl(path):
    with _open_utf8(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is not a JSON object")
            yield number, {key: _text(value) for key, value in row.items()}


def _read_csv(path):
    lines = _csv_lines(path)
    header = _header(path, next(lines, (1, []))[1])
    for number, cells in lines:
        yield number, _row(header, cells)


def _csv_lines(path):
    """(line of the file, cells) of the header and of every row that is not empty."""
    csv.field_size_limit(2 ** 31 - 1)
    with _open_utf8(path) as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        start = 1
        try:
            for cells in reader:
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield start, cells
                start = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}, near line {reader.line_num}: {error}; quote marks inside a cell must be doubled") from error


def _read_xlsx(path):
    try:
        rows = CalamineWorkbook.from_path(path).get_sheet_by_index(0).iter_rows()
        header = _header(path, [_text(cell) for cell in next(rows, [])])
        for number, cells in enumerate(rows, 2):
            cells = [cell.strip() if type(cell) is str else _text(cell) for cell in cells]  # a workbook has no half characters
            if any(cells):
                yield number, _row(header, cells)
    except (CalamineError, OSError, IndexError) as error:
        raise InputError(f"{path} cannot be read as an Excel workbook: {str(error).splitlines()[0]}") from error


def _header(path, names):
    if twice := [name for i, name in enumerate(names) if name and name in names[:i]]:
        raise InputError(f"{path} has two columns called {twice[0]!r}: rename one")
    return names


def _row(header, cells):
    if len(cells) == len(header):
        return dict(zip(header, cells))
    return None if any(cells[len(header):]) else dict(zip(header, chain(cells, [""] * len(header))))


class _Nested(str):
    """A list or object in a .jsonl: kept as a cell, but no complaint and no response."""


def _text(value):
    if isinstance(value, float) and value.is_integer():  # a spreadsheet's 3 is 3.0
        value = int(value)
    if isinstance(value, (list, dict)):
        return _Nested(json.dumps(value, ensure_ascii=False))
    if value is None:
        return ""
    return str(value).encode("utf-8", "replace").decode().strip()  # half an emoji ("\ud83d" in .jsonl) is no text


def find_columns(path, columns, given, needed):
    """{role: column}. given: {role: column} from the command line; needed: roles that must be there."""
    for role, name in given.items():
        if role not in COLUMN_NAMES:
            raise InputError(f"--columns {role}=...: a role is one of {', '.join(COLUMN_NAMES)}")
        if name not in columns:
            raise InputError(f"{path} has no column {name!r}; it has {', '.join(columns)}")
    by_name = {_plain(name): name for name in reversed(columns)}
    found = dict(given)
    for role, names in COLUMN_NAMES.items():
        match = next((by_name[_plain(name)] for name in names if _plain(name) in by_name), None)
        if role not in found and match:
            found[role] = match
    if 0 < len(set(PROBABILITIES) & set(found)) < 3:
        raise InputError(f"{path} has some but not all of the columns {', '.join(PROBABILITIES)}")
    if shared := [name for name in found.values() if list(found.values()).count(name) > 1]:
        raise InputError(f"{path}: --columns gives the column {shared[0]!r} two roles")
    for role in needed:
        if role not in found and role in PROBABILITIES:
            raise InputError(f"{path} has no severity probabilities: give --classifier RUN, or --weighting none, or name their columns: "
                             f"--columns {' '.join(f'{role}=COLUMN' for role in PROBABILITIES)}")
        if role not in found:
            raise InputError(f"{path} has no column for the {role}; it has {', '.join(columns)}. Name one: --columns {role}=COLUMN")
    return found


def _plain(name):
    """What two spellings of a column or class name have in common."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c not in " -_")


def parse_columns(words):
    """["complaint=Post", ...] from the command line -> {"complaint": "Post", ...}"""
    pairs = [word.partition("=") for word in words]
    if bad := [role for role, equals, name in pairs if not (equals and name)]:
        raise InputError(f"--columns takes ROLE=COLUMN, not {bad[0]!r}")
    return {role: name for role, _, name in pairs}


# --- pairs ----------------------------------------------------------------------------------------------------------------

@dataclass
class Pair:
    row: int  # in the table
    complaint: str
    response: str
    severity: int | None  # index into severity.CLASSES
    probabilities: tuple | None  # (non-critical, neutral, critical)
    specialty: str
    others: dict  # the table's other columns, as text: the same ones in every row


class Skipped:
    """Rows that could not be used, by reason."""

    def __init__(self):
        self.rows = defaultdict(list)

    def add(self, reason, row):
        self.rows[reason].append(row)

    def __str__(self):
        parts = [f"{len(rows):,} {reason} (row {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''})"
                 for reason, rows in sorted(self.rows.items(), key=lambda item: -len(item[1]))]
        return f"left out {sum(map(len, self.rows.values())):,} rows: " + "; ".join(parts)


def iterate_pairs(path, *, needed, columns=None, skipped):
    """Yields a Pair per usable row; the others go into `skipped`. needed: roles that a row must have."""
    rows = read_rows(path)
    first = list(islice(rows, 1000))  # a .jsonl row may lack a field that others have
    names = list(dict.fromkeys(name for _, row in first if row for name in row))
    if not first:
        raise InputError(f"{path} has no rows")
    if not names:
        raise InputError(f"{path}: all rows have more cells than the header")
    found = find_columns(path, names, columns or {}, needed)
    print(f"{path}: " + ", ".join(f"{role} = {name!r}" for role, name in found.items()))
    used = {name for role, name in found.items() if role != "specialty"}
    others = [name for name in names if name not in used]
    for number, row in chain(first, rows):
        try:
            yield _pair(number, row, found, needed, others)
        except ValueError as reason:
            skipped.add(str(reason), number)


_LETTER = re.compile(r"[^\W_]")  # or a digit


def _pair(number, row, found, needed, others):
    if row is None:
        raise ValueError("with more cells than the header")
    value = {role: row.get(name, "") for role, name in found.items()}
    for role in ("complaint", "response"):
        if role in needed and (isinstance(value[role], _Nested) or not _LETTER.search(value[role])):  # "👍" is no text
            raise ValueError(f"without a {role}")
    try:
        label, probabilities = _label(value), _probabilities(value)
    except ValueError:
        if needed != ("complaint",):
            raise
        label, probabilities = None, None  # to be scored, so what it came with does not matter
    for role, there in (("severity", label is not None), ("critical", probabilities)):
        if role in needed and not there:
            raise ValueError("without a severity" if role == "severity" else "without probabilities")
    return Pair(number, value["complaint"], value.get("response", ""), label, probabilities, value.get("specialty", ""),
                {name: row.get(name, "") for name in others})


def _label(value):
    if not value.get("severity"):
        return None
    label = LABELS.get(_plain(value["severity"]))
    if label is None:
        raise ValueError("with a severity other than non-critical, neutral, critical")
    return label


def _probabilities(value):
    if not any(map(value.get, PROBABILITIES)):
        return None
    try:
        probabilities = tuple(float(value[name]) for name in PROBABILITIES)
    except ValueError:
        raise ValueError("with a probability that is no number") from None
    if not all(p >= 0 for p in probabilities):  # NaN fails too
        raise ValueError("with a probability that is negative or NaN")
    if abs(sum(probabilities) - 1) > 0.02:  # three values rounded to two decimals may miss 1 by 0.015
        raise ValueError("with probabilities that do not sum to 1")
    return tuple(p / sum(probabilities) for p in probabilities)


def usable_pairs(path, *, needed, columns=None):
    """Yields the usable pairs of a table. Prints which columns were found and, in the end, what was left out, by reason."""
    skipped, pair = Skipped(), None
    for pair in iterate_pairs(path, needed=needed, columns=columns, skipped=skipped):
        yield pair
    if skipped.rows:
        print(f"  {skipped}")
    if pair is None:
        raise InputError(f"{path}: no usable row; {skipped}")


def read_pairs(path, *, needed, columns=None):
    """usable_pairs as a list"""
    return list(usable_pairs(path, needed=needed, columns=columns))


# --- splits ---------------------------------------------------------------------------------------------------------------

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


def fraction(complaint, salt=""):
    """A number in [0, 1) that depends on the normalised complaint (and `salt`) alone, the same on every machine."""
    digest = hashlib.blake2b((salt + normalised(complaint)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2 ** 64


def key(complaint):
    """A short name of the normalised complaint."""
    return hashlib.blake2b(normalised(complaint).encode(), digest_size=8).hexdigest()


def split_of(complaint):
    """'train', 'validation' or 'test': 80, 10 and 10 in a hundred. No complaint stands on two sides."""
    position = fraction(complaint)
    return next(name for name, end in SPLITS if position < end)


def split_pairs(pairs):
    """{'train': [...], 'validation': [...], 'test': [...]}"""
    sides = {name: [] for name, _ in SPLITS}
    for pair in pairs:
        sides[split_of(pair.complaint)].append(pair)
    return sides


def some_of(pairs, most):
    """At most `most` of the pairs, the same ones wherever they are chosen, in an order of their own."""
    return sorted(pairs, key=lambda p: fraction(p.complaint, "order"))[:most]


class Fingerprint:
    """Of pairs, more of which may be added: changes when any text, label or probability that training reads does."""

    def __init__(self, pairs=()):
        self.digest = hashlib.blake2b(digest_size=8)
        for pair in pairs:
            self.add(pair)

    def add(self, pair):
        self.digest.update(repr((pair.complaint, pair.response, pair.severity, pair.probabilities)).encode())

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
    """Ids of the prompt for each complaint (limit: the most ids, a number or one each); a complaint that is too long loses its end,
    never the words after it. Returns (list of id lists, number of complaints cut)."""
    limits = [limit] * len(complaints) if isinstance(limit, int) else limit
    ids = encode(tokenizer, [prompt.format(complaint=c) for c in complaints], special=True)
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
    return ids, cut


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
    def inputs(self):
        """(n,) tokens that each example feeds: the last is only ever a target."""
        return np.diff(self.starts) - 1

    @cached_property
    def targets(self):
        """(n,) supervised tokens of each example, the L of the paper."""
        return np.diff(self.starts) - self.first_target


def encode_pairs(pairs, tokenizer, *, max_length, eos_id, preprocess):
    """PROMPT and response encoded apart and joined, then EOS, at most max_length ids. Prints what was cut.

    Where a pair is too long, the prompt keeps at least half of max_length; a response that is cut has no EOS. pairs: any iterable; while
    it gives the next, a thread of its own encodes those that it gave before.
    """
    def encode_part(part):
        responses = encode(tokenizer, [prepare(p.response, preprocess) for p in part], special=False)
        limits = [max(max_length // 2, max_length - len(r) - 1) for r in responses]
        prompts, cut = encode_prompts(tokenizer, [prepare(p.complaint, preprocess) for p in part], limits)
        joined = [prompt + (response + [eos_id])[:max_length - len(prompt)] for prompt, response in zip(prompts, responses)]
        cut_responses = sum(len(p) + len(r) + 1 > max_length for p, r in zip(prompts, responses))
        # as arrays, since lists of Python numbers are large
        return np.fromiter(chain.from_iterable(joined), np.int32), [*map(len, joined)], [*map(len, prompts)], cut, cut_responses

    pairs = iter(pairs)
    with ThreadPoolExecutor(1) as thread:  # the tokenizer needs no Python, so reading goes on beside it
        parts = list(thread.map(encode_part, iter(lambda: list(islice(pairs, ROWS_AT_ONCE)), [])))
    ids, lengths, first_target, cut_prompts, cut_responses = zip(*parts)
    if any(cut_prompts + cut_responses):
        print(f"  of {sum(map(len, lengths)):,} pairs {sum(cut_prompts):,} complaints and {sum(cut_responses):,} responses were cut to fit "
              f"{max_length} tokens")
    return Examples(np.concatenate(ids), np.cumsum([0, *chain(*lengths)]), np.fromiter(chain(*first_target), np.int64))


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
    supervised: torch.Tensor  # (S,) positions in the stream whose next token is a target
    targets: torch.Tensor  # (S,)
    example: torch.Tensor  # (S,) which document of the batch a target belongs to
    weights: torch.Tensor | None  # (S,) fp32


def make_batch(examples, indices, device="cpu", weights=None):
    """The examples `indices` as one stream. weights (n,): what a token of each of all examples weighs."""
    inputs, first = examples.inputs[indices], examples.first_target[indices]
    begins = np.cumsum(inputs) - inputs
    tokens = np.concatenate([examples.ids[s:s + n] for s, n in zip(examples.starts[indices], inputs)])
    supervised = np.concatenate([np.arange(b + f - 1, b + n) for b, f, n in zip(begins, first, inputs)])
    targets = np.concatenate([examples.ids[s + f:e] for s, f, e in
                              zip(examples.starts[indices], first, examples.starts[np.asarray(indices) + 1])])
    example = np.repeat(np.arange(len(first)), examples.targets[indices])

    tensors = [to_device(torch.from_numpy(array.astype(np.int64)), device) for array in (tokens, supervised, targets, example)]
    if weights is not None:
        weights = to_device(torch.from_numpy(np.repeat(weights[indices], examples.targets[indices]).astype(np.float32)), device)
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


def stream(id_lists, device="cpu"):
    """List of id lists -> tokens (N,), lengths."""
    tokens = torch.tensor(list(chain.from_iterable(id_lists)), dtype=torch.int64)
    return to_device(tokens, device), [len(ids) for ids in id_lists]
