"""Tables -> pairs of complaint and response. PyTorch is not needed for it."""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple

from python_calamine import CalamineError, CalamineWorkbook

from sevloss import InputError

SAMPLE = os.path.relpath(Path(__file__).resolve().parents[2] / "data" / "sample.jsonl")

# What a column is called, role by role; case, spaces, hyphens and underscores do not count.
COLUMN_NAMES = {
    "complaint": ("question", "q_body", "complaint", "post", "السؤال", "الشكوى"),
    "response": ("answer", "a_body", "response", "plan", "الإجابة", "الاجابة", "الرد"),
    "severity": ("severity", "الخطورة", "درجة الخطورة"),
    "severity_source": ("severity_source",),  # label or classifier
    "non_critical": ("non_critical", "p_non_critical", "p_nc", "غير حرج"),
    "neutral": ("neutral", "p_neutral", "p_n", "متوسط"),
    "critical": ("critical", "p_critical", "p_c", "حرج"),
    "specialty": ("specialty", "category", "type", "التخصص"),
}
PROBABILITIES = ("non_critical", "neutral", "critical")
# As _plain spells them
LABELS = {"noncritical": 0, "neutral": 1, "critical": 2, "غيرحرج": 0, "متوسط": 1, "حرج": 2}


def read_rows(path):
    """Yields (row number as an editor or spreadsheet shows it, {column: text}) of each row that is not empty.

    A row with more cells than the header comes as None. Raises InputError where the file cannot be read.
    """
    path = Path(path)
    ending = path.suffix.lower() or "a file without an ending"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --data names another table")
    number = 1
    try:
        if ending == ".jsonl":
            rows = _jsonl_rows(path)
        elif ending in (".csv", ".tsv"):
            rows = _rows_below_header(path, _csv_lines(path, "," if ending == ".csv" else "\t"))
        elif ending == ".xlsx":
            sheet = CalamineWorkbook.from_path(path).get_sheet_by_index(0)
            rows = _rows_below_header(path, enumerate(sheet.iter_rows(), 1))
        else:
            raise InputError(f"{path}: a table is one of .jsonl, .csv, .tsv, .xlsx, not {ending}")
        for number, row in rows:
            yield number, row
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} of a block is 0x{error.object[error.start]:02x}"
        message = f"{path} is not UTF-8 ({byte}): save it as UTF-8, e.g. iconv -f WINDOWS-1256 -t UTF-8"
        raise InputError(message) from error
    except csv.Error as error:
        message = f"{path}, below row {number}: {error}; quote marks inside a cell must be doubled"
        raise InputError(message) from error
    except CalamineError as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as an Excel workbook: {first_line}") from error


def _jsonl_rows(path):
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is not a JSON object")
            yield number, {_text(name): _text(value) for name, value in row.items()}


def _csv_lines(path, delimiter):
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        number = 1
        for cells in reader:
            yield number, cells
            number = reader.line_num + 1  # a cell may hold several lines


def _rows_below_header(path, lines):
    """(number, cells) of each line -> (number, {column: text}); the first that is not empty is the header."""
    header = None
    for number, cells in lines:
        cells = [_text(cell) for cell in cells]
        if not any(cells):
            continue
        if header is None:
            header = cells
            for name in filter(None, header):
                if header.count(name) > 1:
                    raise InputError(f"{path} has two columns called {name!r}: rename one")
        elif any(cells[len(header):]):
            yield number, None
        else:
            yield number, dict(zip(header, chain(cells, repeat(""))))


_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85]")
# The other control characters but for tab and line feed, and the half characters that a .jsonl may hold
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class _Nested(str):
    """A list or object in a .jsonl: kept as a cell, but no complaint and no response."""


def _text(value):
    """A cell as text: each line break is a line feed, other control characters but the tab are dropped."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # a spreadsheet's 3 is 3.0
        value = int(value)
    if isinstance(value, (list, dict)):
        return _Nested(_text(json.dumps(value, ensure_ascii=False)))
    text = str(value)
    if not text.isprintable():  # most are, and finding that out is cheaper
        text = _DROPPED.sub("", _LINE_BREAK.sub("\n", text))
    return text.strip()


def find_columns(path, columns, given, needed):
    """{role: column}. columns: the table's; given: {role: column}, before the usual names; needed: roles."""
    for role, name in given.items():
        if role not in COLUMN_NAMES:
            raise InputError(f"--columns {role}=...: a role is one of {', '.join(COLUMN_NAMES)}")
        if name not in columns:
            raise InputError(f"{path} has no column {name!r}; it has {', '.join(columns)}")
    by_plain_name = {_plain(name): name for name in reversed(columns)}
    found = dict(given)
    for role, usual_names in COLUMN_NAMES.items():
        for name in usual_names:
            if _plain(name) in by_plain_name:
                found.setdefault(role, by_plain_name[_plain(name)])

    for name in found.values():
        if list(found.values()).count(name) > 1:
            raise InputError(f"{path}: --columns gives the column {name!r} two roles")
    if 0 < len(found.keys() & set(PROBABILITIES)) < 3:
        raise InputError(f"{path} has some but not all of the columns {', '.join(PROBABILITIES)}")
    for role in needed:
        if role not in found:
            raise InputError(f"{path} has no column for the {role}; it has {', '.join(columns)}. "
                             f"Name one: --columns {role}=COLUMN")
    return found


def _plain(name):
    """What two spellings of a column or class name have in common."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c not in " -_")


def parse_columns(words):
    """["complaint=Post", ...] from the command line -> {"complaint": "Post", ...}"""
    columns = {}
    for word in words:
        role, _, name = word.partition("=")
        if not name:
            raise InputError(f"--columns takes ROLE=COLUMN, not {word!r}")
        columns[role] = name
    return columns


class Pair(NamedTuple):
    row: int  # in the table
    complaint: str
    response: str
    severity: int | None  # the label, an index into severity.CLASSES; what a classifier gave is none
    probabilities: tuple | None  # (non-critical, neutral, critical)
    specialty: str
    others: dict  # the table's other columns, as text: the same ones in every row


def read_pairs(path, **options):
    """usable_pairs as a list"""
    return list(usable_pairs(path, **options))


def usable_pairs(path, *, needed, columns=None, probabilities="optional"):
    """Yields a Pair for each usable row. Prints which columns were found and, in the end, what was left out.

    needed: what a row must have, of "complaint", "response" and "severity". columns: {role: column}, where
    the usual names will not do. probabilities: "optional", "required", or "if present": required where the
    table has their columns, so that runs with and without weights get the same rows. What is not required and
    cannot be read counts as missing. InputError where the table cannot be used.
    """
    rows = read_rows(path)
    head = list(islice(rows, 1000))  # a .jsonl row may lack a field that others have
    if not head:
        raise InputError(f"{path} has no rows")
    names = {}  # of the columns, in order
    for _, row in head:
        names |= dict.fromkeys(row or ())
    if not names:
        raise InputError(f"{path}: all rows have more cells than the header")
    found = find_columns(path, names, columns or {}, needed)
    if probabilities == "required" and "critical" not in found:
        raise InputError(f"{path} has no severity probabilities: give --classifier RUN, or --weighting none, "
                         f"or name their columns: --columns {'=COLUMN '.join(PROBABILITIES)}=COLUMN")
    print(f"{path}: " + ", ".join(f"{role} = {name!r}" for role, name in found.items()))
    others = [name for name in names if name not in found.values() or name == found.get("specialty")]
    required = [*needed] if probabilities == "optional" else [*needed, *PROBABILITIES]

    # Where no column says whose it is, a severity that is the likeliest class in every row is a classifier's;
    # in a handful of rows that may be chance
    predicted = False
    if "severity_source" not in found and {"severity", "critical"} <= found.keys():
        pairs = [_make_pair(number, row, found, others)[0] for number, row in head if row is not None]
        pairs = [pair for pair in pairs if pair.severity is not None and pair.probabilities]
        likeliest = [pair.probabilities[pair.severity] == max(pair.probabilities) for pair in pairs]
        predicted = len(pairs) >= 20 and all(likeliest)

    used = 0
    left_out = defaultdict(list)  # reason -> row numbers
    incomplete = defaultdict(list)
    for number, row in chain(head, rows):
        if row is None:
            left_out["with more cells than the header"].append(number)
            continue
        pair, problems = _make_pair(number, row, found, others, predicted)
        reasons = [problems[role] for role in required if role in problems]
        if reasons:
            left_out[reasons[0]].append(number)
            continue
        for reason in set(problems.values()):
            incomplete[reason].append(number)
        used += 1
        yield pair
    if not used:
        raise InputError(f"{path}: no usable row; left out {_counted(left_out)}")
    if left_out:
        print(f"  left out {_counted(left_out)}")
    if incomplete:
        print(f"  used all the same {_counted(incomplete)}")


def _counted(rows_by_reason):
    """How many rows, of which reason, and the first five numbers of each."""
    parts = []
    for reason, rows in sorted(rows_by_reason.items(), key=lambda item: -len(item[1])):
        first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        parts.append(f"{len(rows):,} {reason} (row {first})")
    return f"{sum(map(len, rows_by_reason.values())):,} rows: " + "; ".join(parts)


_LETTER = re.compile(r"[^\W_]")  # or a digit


def _make_pair(number, row, columns, others, predicted=False):
    """A Pair of what the row has, and {role: reason} of the columns that lack it or that nobody can read.
    predicted: severities are a classifier's."""
    cells = {role: row.get(columns.get(role), "") for role in COLUMN_NAMES}
    problems = {}
    for role in ("complaint", "response"):
        if isinstance(cells[role], _Nested) or not _LETTER.search(cells[role]):  # "👍" is no text
            problems[role] = f"without a {role}"
    severity = LABELS.get(_plain(cells["severity"]))
    if not cells["severity"]:
        problems["severity"] = "without a severity"
    elif severity is None:
        problems["severity"] = "with a severity other than non-critical, neutral, critical"
    elif predicted or _plain(cells["severity_source"]) == "classifier":
        severity = None
        problems["severity"] = "with a severity from a classifier, which is no label"
    probabilities, problem = _parse_probabilities([cells[role] for role in PROBABILITIES])
    if problem:
        problems |= dict.fromkeys(PROBABILITIES, problem)
    pair = Pair(number, cells["complaint"], cells["response"], severity, probabilities, cells["specialty"],
                {name: row.get(name, "") for name in others})
    return pair, {role: reason for role, reason in problems.items() if role in columns}


def _parse_probabilities(cells):
    """Three texts -> three numbers that sum to 1, or None; what is wrong with them, or None."""
    if not any(cells):
        return None, "without probabilities"
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None, "with a probability that is no number"
    total = sum(values)
    if not all(p >= 0 for p in values):  # NaN fails too
        return None, "with a probability that is negative or NaN"
    if abs(total - 1) > 0.02:  # three values rounded to two decimals may miss 1 by 0.015
        return None, "with probabilities that do not sum to 1"
    return tuple(p / total for p in values), None
