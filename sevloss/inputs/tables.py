"""Tables -> pairs of complaint and response. PyTorch is not needed for it."""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from python_calamine import CalamineError, CalamineWorkbook

from sevloss import InputError

ROWS_AT_ONCE = 8192  # of a large table, that go through training's preparation together
SAMPLE = os.path.relpath(Path(__file__).resolve().parents[2] / "data" / "sample.jsonl")

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

class Pair(NamedTuple):
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


def iterate_pairs(path, *, needed, columns=None, skipped, probabilities="ignored"):
    """Yields a Pair per usable row; the others go into `skipped`. needed: roles that a row must have."""
    rows = read_rows(path)
    first = list(islice(rows, 1000))  # a .jsonl row may lack a field that others have
    names = list(dict.fromkeys(name for _, row in first if row for name in row))
    if not first:
        raise InputError(f"{path} has no rows")
    if not names:
        raise InputError(f"{path}: all rows have more cells than the header")
    if probabilities == "required":
        needed = (*needed, "critical")
    found = find_columns(path, names, columns or {}, needed)
    if probabilities == "if present" and "critical" in found:
        needed = (*needed, "critical")
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


def usable_pairs(path, *, needed, columns=None, probabilities="ignored"):
    """Yields the usable pairs of a table. Prints which columns were found and, in the end, what was left out, by reason."""
    skipped, pair = Skipped(), None
    for pair in iterate_pairs(path, needed=needed, columns=columns, skipped=skipped, probabilities=probabilities):
        yield pair
    if skipped.rows:
        print(f"  {skipped}")
    if pair is None:
        raise InputError(f"{path}: no usable row; {skipped}")


def read_pairs(path, *, needed, columns=None):
    """usable_pairs as a list"""
    return list(usable_pairs(path, needed=needed, columns=columns))
