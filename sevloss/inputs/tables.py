"""Tables -> pairs of complaint and response. PyTorch is not needed for it."""

import codecs
import csv
import json
import math
import os
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from python_calamine import CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

from sevloss import InputError, interpreting

SAMPLE = os.path.relpath(Path(__file__).resolve().parents[2] / "data" / "sample.jsonl")

# What a column is called, role by role, in any of the spellings that `plain` makes equal
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
LABELS = {"noncritical": 0, "neutral": 1, "critical": 2, "غيرحرج": 0, "متوسط": 1, "حرج": 2,
          "غيرحرجة": 0, "متوسطة": 1, "حرجة": 2}
NO_VALUE = ("nan", "none", "null", "n/a", "na", "<na>", "nat", "#n/a")  # what pandas writes and reads for it
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}

LONGEST_CELL = 16_000  # characters
MOST_COLUMNS = 1000
MOST_CELLS = 30_000_000  # of a sheet, empty ones included: each takes 32 bytes


@lru_cache(1024)
def plain(name):
    """What spellings of a column, label or class have in common: the letters and digits, without case,
    diacritics and tatweel."""
    return re.sub(r"[\W_ـ]", "", unicodedata.normalize("NFKC", name).casefold())


# --- files -> rows ------------------------------------------------------------------------------------------

def check_files(*paths):
    """InputError unless these are files; None passes."""
    for path in paths:
        if path is not None and not Path(path).is_file():
            raise InputError(f"{path}: no such file")


def read_rows(path, needed=(), columns=None):
    """(what was read, as a text; the header; an iterator over the rows that are not empty, of (number as an
    editor or spreadsheet shows it, texts)).

    A file can be taken apart in several ways, by delimiters or by sheets: the first is taken whose header has
    the roles `needed`, else the first. InputError where the file cannot be read.
    """
    check_files(path)
    path = Path(path)
    ending = path.suffix.lower()
    if ending in (".jsonl", ".json"):
        ways = [("", _json_lines(path))]
    elif ending in DELIMITERS:
        ways = [(f", separated by {delimiter!r}" if i else "", _csv_lines(path, delimiter))
                for i, delimiter in enumerate(DELIMITERS[ending])]
    elif ending == ".xlsx":
        ways = _sheets(path)
    else:
        raise InputError(f"{path}: a table is a .jsonl, .json, .csv, .tsv or .xlsx file")
    taken = None
    failure = InputError(f"{path} has no sheet that is not hidden")
    for name, lines in _reading(path, ways):
        lines = _reading(path, lines)
        try:
            number, header = next(_lines_with_text(islice(lines, 1000)), (0, []))
        except InputError as error:
            failure = error
            continue
        fits = set(needed) <= find_roles(header, columns or {}).keys()
        if fits or not taken:
            where = f", header in row {number}" if number > 1 or number and not fits else ""
            taken = f"{path}{name}{where}", header, _lines_with_text(lines)
        if fits:
            break
    if not taken:
        raise failure
    _check_header(path, taken[1])
    return taken


def _reading(path, items):
    """The items; whatever goes wrong in making them becomes an InputError."""
    with interpreting(path, "save it anew, e.g. as .csv in UTF-8"):
        yield from items


def _lines_with_text(lines):
    """(number, texts) of the lines that are not empty."""
    for number, cells in lines:
        texts = [_text(cell) for cell in cells]
        if any(texts):
            yield number, texts


def _check_header(path, header):
    if not header:
        raise InputError(f"{path} has no rows")
    if len(header) > MOST_COLUMNS:
        raise InputError(f"{path} has {len(header):,} columns, {MOST_COLUMNS:,} are allowed: leave some out")
    for name, count in Counter(filter(None, header)).most_common(1):
        if count > 1:
            raise InputError(f"{path} has two columns called {name!r}: rename one")


def _json_lines(path):
    """A header of all names, as a row may lack a field that others have; then the rows."""
    names = dict.fromkeys(chain.from_iterable(row for _, row in _json_rows(path)))
    yield 0, names
    for number, row in _json_rows(path):
        yield number, [row.get(name) for name in names]


def _json_rows(path):
    """(number, object) of a line each, or of one array."""
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            array = line.lstrip().startswith("[")
            text = line + file.read() if array else line
            with interpreting(f"{path}, line {number}"):
                value = json.loads(text)
            for i, row in enumerate(value if array else [value], 1 if array else number):
                if not isinstance(row, dict):
                    raise InputError(f"{path}, row {i} is not a JSON object")
                yield i, row


def _csv_lines(path, delimiter):
    csv.field_size_limit(2 ** 31 - 1)
    number = 1
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if number > 1 or [cell.lower() for cell in cells] != ["sep=", ""]:  # Excel's own first line
                    yield number, [_QUOTE.sub("", cell) for cell in cells]
                number = reader.line_num + 1  # a cell may hold several lines
        except csv.Error as error:
            message = f"{path}, from row {number} on: {error}; quote marks inside a cell must be doubled"
            raise InputError(message) from error


@contextmanager
def _open_text(path):
    """Decodes UTF-8 or UTF-16; InputError for other bytes."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        raise InputError(f"{path} is packed by zip or gzip: unpack it, or if it is a workbook, call it .xlsx")
    encoding = "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif head.count(0) + head.count(6) > len(head) / 5:  # no byte-order mark; 6: high byte of Arabic
        high_first = head[::2].count(0) + head[::2].count(6) > head[1::2].count(0) + head[1::2].count(6)
        encoding = "utf-16-be" if high_first else "utf-16-le"
    try:
        with open(path, encoding=encoding, newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise InputError(f"{path} is not {error.encoding.upper()} ({byte}): save it as UTF-8, e.g. iconv "
                         "-f WINDOWS-1256 -t UTF-8") from error


def _sheets(path):
    """(name, lines) of each visible sheet."""
    _check_size(path)
    workbook = CalamineWorkbook.from_path(path)
    for sheet in workbook.sheets_metadata:
        if sheet.visible == SheetVisibleEnum.Visible and sheet.typ == SheetTypeEnum.WorkSheet:
            yield f", sheet {sheet.name!r}", _sheet_lines(workbook.get_sheet_by_name(sheet.name))


def _sheet_lines(sheet):
    """(number, cells); a merged cell's value stands in each of its rows."""
    rows = sheet.iter_rows()
    if sheet.merged_cell_ranges:
        rows = list(rows)
        for (top, column), (bottom, _) in sheet.merged_cell_ranges:
            column -= sheet.start[1]  # rows count from the sheet's first, columns from the first that is used
            for cells in rows[top + 1:bottom + 1]:
                if 0 <= column < len(cells):
                    cells[column] = rows[top][column]
    return enumerate(rows, 1)


def _check_size(path):
    """InputError for a workbook that would fill the memory: a sheet is read whole, empty cells included."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > min(2e9, 1e8 + 50 * path.stat().st_size):
            raise InputError(f"{path} unpacks to {unpacked / 1e6:,.0f} MB: save it as .csv")
        for name in archive.namelist():
            rows = columns = 0
            with archive.open(name) as file:
                while block := file.read(2 ** 24):
                    cells = re.findall(rb" r=[\"']([A-Za-z]{0,9})([0-9]{1,9})", block)  # as r="AB12"
                    rows = max([rows, *(int(row) for _, row in cells)])
                    for letters in {letters.upper() for letters, _ in cells}:
                        places = enumerate(reversed(letters))
                        columns = max(columns, sum(26 ** place * (letter - 64) for place, letter in places))
            if columns * rows > MOST_CELLS:
                raise InputError(f"{path}: {name} has {rows:,} rows and {columns:,} columns: save it as .csv")


_QUOTE = re.compile("^'(?=[-=+@])")


def quote_formula(cell):
    """What a spreadsheet would take for a formula gets the apostrophe that keeps it a text."""
    return f"'{cell}" if re.match(r"[-=+@](?!\.?\d[\d.]*$)", str(cell)) else cell


_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85]")
# The other control characters but for tab and line feed, and the half characters that a .jsonl may hold
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class _Nested(str):
    """A list or object in a .jsonl: kept as a cell, but no complaint and no response."""


def _text(value):
    """A cell as text, cleaned and cut to LONGEST_CELL; "" for JSON's null and NaN."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, float) and value.is_integer():  # a spreadsheet's 3 is 3.0
        value = int(value)
    if isinstance(value, (list, dict)):
        return _Nested(_text(json.dumps(value, ensure_ascii=False)))
    return clean(str(value)).strip()[:LONGEST_CELL]


def clean(text):
    """Each line break as a line feed; no other control characters but the tab."""
    if text.isprintable():  # most are, and finding that out is cheaper
        return text
    return _DROPPED.sub("", _LINE_BREAK.sub("\n", text))


# --- which column has which role ----------------------------------------------------------------------------

def find_roles(names, given):
    """{role: column name} among `names`: those `given`, else the usual ones."""
    by_plain_name = {plain(name): name for name in reversed(names)}
    found = {}
    for role, usual_names in COLUMN_NAMES.items():
        for name in [given[role]] if role in given else usual_names:
            column = name if name in names else by_plain_name.get(plain(name))
            if column is not None:
                found.setdefault(role, column)
    return found


def find_columns(path, names, given, needed):
    """{role: column}. names: the table's columns; given: {role: column}, before the usual names; needed:
    roles."""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    found = find_roles(names, given)
    for name, count in Counter(found.values()).most_common(1):
        if count > 1:
            raise InputError(f"{path}: --columns gives the column {name!r} two roles")
    for role in [*given, *needed]:
        if role not in found:
            wanted = repr(given[role]) if role in given else f"for the {role}"
            raise InputError(f"{path} has no column {wanted}; it has {shown}. Name one: --columns "
                             f"{role}=COLUMN")
    return found


def parse_columns(words):
    """["complaint=Post", ...] from the command line -> {"complaint": "Post", ...}"""
    columns = {}
    for word in words:
        role, _, name = word.partition("=")
        if not name or role not in COLUMN_NAMES:
            raise InputError(f"--columns takes ROLE=COLUMN, not {word!r}; a role is one of "
                             f"{', '.join(COLUMN_NAMES)}")
        columns[role] = name
    return columns


# --- rows -> pairs ------------------------------------------------------------------------------------------

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
    columns = columns or {}
    source, header, lines = read_rows(path, needed, columns)
    found = find_columns(source, header, columns, needed)
    if not found.keys() >= set(PROBABILITIES):
        if probabilities == "required" or columns.keys() & set(PROBABILITIES):
            raise InputError(f"{source} has not all three severity probabilities: give --classifier RUN, or "
                             f"--weighting none, or --columns {'=COLUMN '.join(PROBABILITIES)}=COLUMN")
        found = {role: name for role, name in found.items() if role not in PROBABILITIES}
    print(f"{source}: " + ", ".join(f"{role} = {name!r}" for role, name in found.items()))
    required = [*needed] if probabilities == "optional" else [*needed, *PROBABILITIES]
    others = [name for name in header if name not in found.values() or name == found.get("specialty")]
    rows = (_make_pair(number, texts, header, found, others) for number, texts in lines)

    # Where no column says whose it is, a severity that is the likeliest class in the first 1,000 rows is a
    # classifier's; in a handful of rows that may be chance
    head = list(islice(rows, 1000))
    likeliest = [pair.probabilities[pair.severity] == max(pair.probabilities) for pair, _ in head
                 if pair.severity is not None and pair.probabilities]
    predicted = "severity_source" not in found and len(likeliest) >= 20 and all(likeliest)

    used = 0
    left_out = defaultdict(list)  # reason -> row numbers
    incomplete = defaultdict(list)
    for pair, problems in chain(head, rows):
        if predicted and pair.severity is not None:
            pair = pair._replace(severity=None)
            problems["severity"] = PREDICTED
        reasons = [problems[role] for role in required if role in problems]
        if reasons:
            left_out[reasons[0]].append(pair.row)
            continue
        for reason in set(problems.values()):
            incomplete[reason].append(pair.row)
        used += 1
        yield pair
    if not used:
        raise InputError(f"{source} has no usable row; left out {_counted(left_out)}")
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
PREDICTED = "with a severity from a classifier, which is no label"


def _make_pair(number, texts, header, columns, others):
    """A Pair of what the row has, and {role: reason} of the `columns` ({role: name}) that lack it or that
    nobody can read."""
    row = dict.fromkeys(header, "") | dict(zip(header, texts))
    cells = {role: row[columns[role]] if role in columns else "" for role in COLUMN_NAMES}
    problems = {}
    for role in ("complaint", "response"):
        text = cells[role]
        # "👍" is no text
        if isinstance(text, _Nested) or not _LETTER.search(text) or text.casefold() in NO_VALUE:
            problems[role] = f"without a {role}"
    severity = LABELS.get(plain(cells["severity"]))
    if not cells["severity"]:
        problems["severity"] = "without a severity"
    elif severity is None:
        problems["severity"] = "with a severity other than non-critical, neutral, critical"
    elif plain(cells["severity_source"]) == "classifier":
        severity = None
        problems["severity"] = PREDICTED
    probabilities, problem = _parse_probabilities([cells[role] for role in PROBABILITIES])
    if problem:
        problems |= dict.fromkeys(PROBABILITIES, problem)
    if texts == header:
        problems = dict.fromkeys(columns, "that repeat the header")
    if any(texts[len(header):]):  # which shifts the others
        problems = dict.fromkeys(columns, "with more cells than the header")
    problems = {role: reason for role, reason in problems.items() if role in columns}
    if any(len(text) == LONGEST_CELL for text in texts):
        problems["cell"] = f"with a cell cut to {LONGEST_CELL:,} characters"
    pair = Pair(number, cells["complaint"], cells["response"], severity, probabilities, cells["specialty"],
                {name: row[name] for name in others})
    return pair, problems


def _parse_probabilities(cells):
    """Three texts -> three numbers that sum to 1, or None; what is wrong with them, or None."""
    if not any(cells):
        return None, "without probabilities"
    try:
        values = [float(cell.replace("٫", ".").replace(",", ".")) for cell in cells]  # also Arabic digits
    except ValueError:
        return None, "with a probability that is no number like 0.7 (without %)"
    total = sum(values)
    # Three values rounded to two decimals may miss 1 by 0.015; NaN fails too
    if not (min(values) >= 0 and abs(total - 1) < 0.0201):
        return None, "with probabilities that are negative or do not sum to 1"
    return tuple(p / total for p in values), None
