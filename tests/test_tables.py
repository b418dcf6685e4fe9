"""Tables: what is read, what is left out, and why."""

import json
import time
import zipfile
from collections import Counter

import pytest
from conftest import write_workbook

from sevloss import InputError, data
from sevloss.inputs import tables

BOTH = ("complaint", "response")
ALL = (*BOTH, "severity")
GOOD = {"Question": "عندي صداع", "Answer": "نم جيدا", "Severity": "neutral", "Non-Critical": "0.2",
        "Neutral": "0.5", "Critical": "0.3"}


def read(path, needed=BOTH, probabilities="optional", **columns):
    return tables.read_pairs(path, needed=needed, columns=columns, probabilities=probabilities)


@pytest.fixture
def hard_rows(rows):
    """What the formats must not trip over: a comma, quotes, a line break in a cell, white space around it, an
    emoji, an empty cell."""
    questions = ['سعال، "جاف" ', "أول\nثان", "  👩‍⚕️ عربي\tEnglish", "a,b;c"]
    return [{**row, "Question": question, "Type": "" if i else "أطفال"}
            for i, (row, question) in enumerate(zip(rows, questions))]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "xlsx", "XLSX"])
def test_same_pairs_from_every_format(write_table, hard_rows, ending, capsys):
    path = write_table(f"table.{ending.lower()}", hard_rows)
    pairs = read(path.rename(path.with_suffix(f".{ending}")), ALL, "required")
    assert [p.complaint for p in pairs] == [row["Question"].strip() for row in hard_rows]
    assert [p.response for p in pairs] == [row["Answer"] for row in hard_rows]
    assert [p.severity for p in pairs] == [0, 1, 2, 0]
    assert pairs[2].probabilities == pytest.approx((0.1, 0.1, 0.8))
    assert [p.specialty for p in pairs] == ["أطفال", "", "", ""]
    assert [p.others for p in pairs] == [{"Type": p.specialty} for p in pairs]
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_byte_order_mark_is_no_part_of_the_first_column(write_table, rows, ending):
    """Excel writes one."""
    path = write_table(f"table.{ending}", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(path)) == len(rows)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "xlsx"])
def test_line_breaks_and_control_characters(tmp_path, write_table, ending):
    """Every line break is LF, so that a text is the same whatever it was saved on; no other control character
    but the tab gets in, in cells and in names of columns."""
    text = "أول\nثان\x85ثالث\tرابع\x00خا\x08مس\x7f\x9f"
    if ending == "xlsx":  # XML has no others
        text = "أول\nثان\x85ثالث\tرابعخامس\x7f\x9f"
    table = write_table(f"table.{ending}", [{"question\x7f": text, "answer": "نعم"}])
    assert [(p.complaint, p.response) for p in read(table)] == [("أول\nثان\nثالث\tرابعخامس", "نعم")]
    if ending != "xlsx":
        crlf, cr = (b"\\r\\n", b"\\r") if ending == "jsonl" else (b"\r\n", b"\r")
        broken = {"jsonl": b'{"question": "a%sb%sc", "answer": "d"}\n',
                  "csv": b'question,answer\r\n"a%sb%sc",d\r\n',
                  "tsv": b'question\tanswer\r\n"a%sb%sc"\td\r\n'}[ending]
        table.write_bytes(broken % (crlf, cr))
        assert [(p.complaint, p.response) for p in read(table)] == [("a\nb\nc", "d")]


@pytest.mark.parametrize("complaint, response", [("q_body", "a_body"), ("QUESTION", "answer "),
                                                 ("السؤال", "الإجابة"), ("الشكوى", "الرد"),
                                                 ("Post", "Plan"), ("complaint", "الاجابة")])
def test_usual_column_names(write_table, complaint, response):
    pairs = read(write_table("table.csv", [{"id": "7", complaint: "صداع", response: "نم"}]))
    assert (pairs[0].complaint, pairs[0].response, pairs[0].others) == ("صداع", "نم", {"id": "7"})


def test_arabic_columns_and_classes(write_table):
    row = {"السؤال": "صداع", "درجة الخطورة": "غير حرج", "غير حرج": "0.7", "متوسط": "0.2", "حرج": "0.1",
           "التخصص": "باطنية"}
    pair = read(write_table("table.csv", [row]), ("complaint", "severity"), "required")[0]
    assert (pair.severity, pair.probabilities, pair.specialty) == (0, pytest.approx((0.7, 0.2, 0.1)),
                                                                   "باطنية")


@pytest.mark.parametrize("text, index", [("Non-Critical", 0), ("non critical", 0), ("NEUTRAL", 1),
                                         ("critical", 2), ("متوسط", 1), ("حرج", 2)])
def test_spellings_of_the_classes(write_table, text, index):
    assert read(write_table("table.jsonl", [{**GOOD, "Severity": text}]))[0].severity == index


def test_columns_of_the_command_line(write_table, capsys):
    """They come before the usual names, and what was taken is printed."""
    path = write_table("table.csv", [{**GOOD, "Text": "حمى", "Reply": "ماء"}])
    pair = read(path, **tables.parse_columns(["complaint=Text", "response=Reply"]))[0]
    assert (pair.complaint, pair.response) == ("حمى", "ماء")
    assert "complaint = 'Text', response = 'Reply'" in capsys.readouterr().out
    with pytest.raises(InputError, match="has no column 'Txt'; it has Question, "):
        read(path, complaint="Txt")
    for word in ("complaint", "complaint=", "question=Text"):
        with pytest.raises(InputError, match="takes ROLE=COLUMN, not .*; a role is one of complaint, response"):
            tables.parse_columns([word])


def test_jsonl_rows_may_lack_fields(tmp_path):
    """Each pair has all the other columns, so that an annotated .csv has the same ones in each line; and half
    an emoji is no text."""
    lines = ['{"question": "a\\ud83d", "answer": null, "n": 3.0}', "", '{"question": 7, "extra": [1]}', ""]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    pairs = read(tmp_path / "table.jsonl", ("complaint",))
    assert [(p.row, p.complaint, p.response, p.others) for p in pairs] == [
        (1, "a", "", {"n": "3", "extra": ""}), (3, "7", "", {"n": "", "extra": "[1]"})]


def test_a_field_that_comes_late(tmp_path):
    """The header of a .jsonl has the fields of all rows."""
    lines = [*(f'{{"question": "سؤال {i}"}}' for i in range(1500)), '{"question": "س", "severity": "critical"}']
    (tmp_path / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "table.jsonl", ("complaint",))[-1].severity == 2


def test_rows_that_repeat_the_header(tmp_path, capsys):
    """As where two files were put together; and a first column called PK is no zip file."""
    (tmp_path / "table.csv").write_text("PK,question,answer\n1,س,ج\nPK,question,answer\n2,سؤال,جواب\n",
                                        encoding="utf-8")
    assert [pair.row for pair in read(tmp_path / "table.csv", ("complaint", "response"))] == [2, 4]
    assert "left out 1 rows: 1 that repeat the header (row 3)" in capsys.readouterr().out


BAD = {  # what is changed in a good row -> reason
    "without a response": {"Answer": ""},
    "without a complaint": {"Question": " \t"},
    "without a severity": {"Severity": ""},
    "with a severity other than non-critical, neutral, critical": {"Severity": "عاجل"},
    "without probabilities": {"Non-Critical": "", "Neutral": "", "Critical": ""},
    "with a probability that is no number like 0.7 (without %)": {"Neutral": "40%"},
    "with probabilities that are negative or do not sum to 1": {"Neutral": "nan"},
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "tsv", "xlsx"])
def test_bad_rows_are_counted_by_reason(write_table, ending, capsys):
    """With the numbers that an editor or spreadsheet shows; the header is row 1, and .jsonl has none."""
    bad = [{**GOOD, **change} for change in BAD.values()]
    worse = [{**GOOD, "Neutral": "-0.5"}, {**GOOD, "Neutral": "0.6"}]
    path = write_table(f"table.{ending}", [GOOD, *bad, *worse])
    pairs = read(path, ALL, "required")
    first = 1 if ending == "jsonl" else 2
    assert [p.row for p in pairs] == [first]
    left_out = capsys.readouterr().out.splitlines()[1]
    for i, reason in enumerate(BAD, 1):
        three = i == len(BAD)
        rows = f"{first + i}, {first + i + 1}, {first + i + 2}" if three else f"{first + i}"
        assert f"{3 if three else 1} {reason} (row {rows})" in left_out
    assert left_out.startswith(f"  left out {len(BAD) + 2} rows: 3 with probabilities that are negative")


def test_what_is_not_needed_may_be_missing_or_unreadable(write_table, capsys):
    """It counts as missing, and a line says so; but nothing is said of columns that the table does not
    have."""
    bad = [{**GOOD, **change} for change in BAD.values()]
    pairs = read(write_table("table.csv", [GOOD, *bad]), ("complaint",))
    assert [p.row for p in pairs] == [2, 3, 5, 6, 7, 8, 9]
    assert [p.severity for p in pairs] == [1, 1, None, None, 1, 1, 1]
    assert [p.probabilities is None for p in pairs] == [False] * 4 + [True] * 3
    out = capsys.readouterr().out
    assert "left out 1 rows: 1 without a complaint (row 4)" in out
    assert "used all the same 6 rows: 1 without a response (row 3); " in out
    read(write_table("bare.csv", [{"question": "صداع"}]), ("complaint",))
    assert "used" not in capsys.readouterr().out


def test_rows_with_probabilities(write_table):
    """"if present" gives the rows that "required" gives, unless the table has no such columns."""
    half = {**GOOD, "Non-Critical": "", "Neutral": "", "Critical": ""}
    table = write_table("table.csv", [GOOD, half, GOOD])
    rows = {mode: [p.row for p in read(table, BOTH, mode)] for mode in ("optional", "if present", "required")}
    assert rows == {"optional": [2, 3, 4], "if present": [2, 4], "required": [2, 4]}
    bare = write_table("bare.csv", [{"question": "a", "answer": "b"}])
    assert len(read(bare)) == len(read(bare, BOTH, "if present")) == 1
    with pytest.raises(InputError,
                       match="has not all three severity probabilities: give --classifier RUN, or --weighting none"):
        read(bare, BOTH, "required")


def test_row_numbers_where_cells_have_several_lines(write_table, hard_rows):
    assert [p.row for p in read(write_table("table.csv", hard_rows))] == [2, 3, 5, 6]


def test_cells_beyond_the_header(tmp_path, capsys):
    """They shift the others, so the row cannot be trusted; missing cells at the end are empty, and so are
    surplus empty ones fine."""
    (tmp_path / "table.csv").write_text("question,answer,type\na,b,c,d\na,b\na,b,c,,\n")
    assert [(p.row, p.specialty) for p in read(tmp_path / "table.csv")] == [(3, ""), (4, "c")]
    assert "left out 1 rows: 1 with more cells than the header (row 2)" in capsys.readouterr().out


def test_what_was_left_out_is_printed(write_table, capsys):
    read(write_table("table.jsonl", [{"question": "a", "answer": "b" if i == 2000 else ""}
                                     for i in range(2002)]))
    assert "left out 2,001 rows: 2,001 without a response (row 1, 2, 3, 4, 5, ...)" in capsys.readouterr().out


def test_probabilities_are_made_to_sum_to_1(write_table):
    """Three values rounded to two decimals need not."""
    row = {**GOOD, "Non-Critical": "0.33", "Neutral": "0.33", "Critical": "0.33"}
    assert read(write_table("table.csv", [row]))[0].probabilities == pytest.approx((1 / 3,) * 3)


BROKEN = {  # file -> (content, message)
    "missing.csv": (None, "no such file"),
    "table.parquet": (b"PAR1", "a table is a .jsonl, .json, .csv, .tsv or .xlsx file"),
    "table": (b"question,answer", "a table is a .jsonl, .json, .csv, .tsv or .xlsx file"),
    "empty.csv": (b"", "has no rows"),
    "header.csv": (b"question,answer\n", "has no usable row"),
    "columns.csv": (b"q1,answer\na,b\n",
                    "no column for the complaint; it has q1, answer. Name one: --columns complaint=COLUMN"),
    "all.csv": (b"question,answer\na,b,c\n", "has no usable row; left out 1 rows: 1 with more cells than"),
    "encoding.csv": ("question,answer\nصداع,نم\n".encode("cp1256"),
                     "is not UTF-8 .byte 0xd5.: .* iconv -f WINDOWS-1256"),
    "encoding.jsonl": ('{"question": "صداع"}'.encode("cp1256"), "is not UTF-8"),
    "line.jsonl": (b'{"question": "a", "answer": "b"}\n{"question": "a"\n', "line 2 cannot be used .JSONDecodeError: "),
    "list.jsonl": (b"[1, 2]\n", "row 1 is not a JSON object"),
    "workbook.xlsx": (b"no zip", "cannot be used .BadZipFile: File is not a zip file.; save it anew"),
    "quote.csv": (b'question,answer\na,b\n"c,d\ne,f\n',
                  "from row 3 on: .*; quote marks inside a cell must be doubled"),
    "late.csv": (b"question,answer\n" + b"a,b\n" * 9000 + "صداع,نم\n".encode("cp1256"), "is not UTF-8"),
    "unusable.csv": (b"question,answer\na,\n,b\n",
                     "has no usable row; left out 2 rows: 1 without a response .row 2.; 1 without a complaint"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_used(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        tables.read_pairs(tmp_path / name, needed=BOTH)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_sample_is_usable():
    """The embedded default: all rows, each class on each side."""
    pairs = tables.read_pairs(tables.SAMPLE, needed=(*BOTH, "severity"))
    for side in data.split_pairs(pairs).values():
        assert all(n >= 3 for n in Counter(p.severity for p in side).values())
        assert {p.severity for p in side} == {0, 1, 2}


def test_a_column_has_one_name_and_one_role(write_table, rows, tmp_path):
    twice = tmp_path / "twice.csv"
    twice.write_text("question,question,answer\nا,ب,ج\n", encoding="utf-8")
    with pytest.raises(InputError, match="two columns called 'question'"):
        read(twice)
    with pytest.raises(InputError, match="gives the column 'Answer' two roles"):
        read(write_table("table.csv", rows[:3]), complaint="Answer")


def test_lists_and_lone_symbols_are_no_text(tmp_path):
    table = tmp_path / "table.jsonl"
    answers = ["نعم", ["نعم", "لا"], {"نعم": 1}, "👍", "\u200b", "؟"]
    table.write_text("".join(json.dumps({"question": "سؤال", "answer": a}) + "\n" for a in answers),
                     encoding="utf-8")
    assert [pair.row for pair in read(table)] == [1]


# ------------------------------------------------------------------ files as people have them

QA = [["Question", "Answer"], ["عندي صداع", "نم جيدا"], ["عندي سعال", "اشرب ماء"]]
TEXTS = [("عندي صداع", "نم جيدا"), ("عندي سعال", "اشرب ماء")]
ROWS = [dict(zip(QA[0], row)) for row in QA[1:]]


def separated(delimiter, before=""):
    return before + "".join(delimiter.join(row) + "\n" for row in QA)


@pytest.mark.parametrize("name, content", [
    ("semicolon.csv", separated(";").encode()), ("tab.csv", separated("\t").encode()),
    ("comma.tsv", separated(",").encode()), ("said.csv", separated(";", "sep=;\n").encode()),
    ("quoted.csv", '"Question";"Answer"\n"عندي صداع";"نم جيدا"\n"عندي سعال";"اشرب ماء"\n'.encode()),
    ("excel.tsv", separated("\t").encode("utf-16")), ("big_endian.csv", separated(",", "\ufeff").encode("utf-16-be")),
    ("no_mark.csv", separated(",").encode("utf-16-le")),
    ("no_mark_big_endian.csv", separated(",").encode("utf-16-be")),
    ("array.jsonl", json.dumps(ROWS, indent=1).encode()), ("array.json", json.dumps(ROWS).encode()),
    ("lines.json", "\n".join(map(json.dumps, ROWS)).encode()), ("blank.csv", separated(",", "\n,\n\n").encode()),
])
def test_dialects(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [(p.complaint, p.response) for p in read(tmp_path / name)] == TEXTS


@pytest.mark.parametrize("content, message", [
    (b"PK\x03\x04", "is packed by zip or gzip: unpack it"), (b"\x1f\x8b\x08", "is packed by zip or gzip: "),
    (b"\xff\xfea", "is not UTF-16"),
])
def test_advice_fits_the_bytes(tmp_path, content, message):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "table.csv")


@pytest.mark.parametrize("complaint, response", [
    ("Question\u200f", "\u200eAnswer"), ("\ufeffquestion", "AN\u00adSWER"), ("Q\u00a0body", "a‑body"),
    ("السـؤال", "الإِجابة"), ("السؤال", "ا\u0644إ\u062c\u0627\u0628ة")])
def test_a_name_is_the_same_in_any_spelling(write_table, complaint, response):
    """Invisible marks, diacritics, tatweel, kinds of spaces and hyphens do not count, here and in --columns."""
    table = write_table("table.jsonl", [{complaint: "صداع", response: "نم"}])
    assert [(p.complaint, p.response) for p in read(table)] == [("صداع", "نم")]
    table = write_table("other.jsonl", [{"My Text": "صداع", "answer": "نم", "my text": "لا"}])
    assert read(table, complaint="MY-TEXT\u200f")[0].complaint == "صداع"
    assert read(table, complaint="my text")[0].complaint == "لا"


@pytest.mark.parametrize("text, index", [("حَرِج\u200f", 2), ("مـتـوسـط", 1), ("غير\u00a0حرجة", 0),
                                         ("Non–Critical ", 0), ("حرجة", 2)])
def test_a_label_is_the_same_in_any_spelling(write_table, text, index):
    assert read(write_table("table.jsonl", [{**GOOD, "Severity": text}]))[0].severity == index


@pytest.mark.parametrize("numbers", ["٠٫٧ ٠٫٢ ٠٫١", "0,7 0,2 0,1", "٠.٧ ٠.٢ ٠.١", ".7 .2 1e-1"])
def test_numbers_in_any_spelling(write_table, numbers):
    row = GOOD | dict(zip(("Non-Critical", "Neutral", "Critical"), numbers.split()))
    assert read(write_table("table.tsv", [row]))[0].probabilities == pytest.approx((0.7, 0.2, 0.1))


def test_a_lone_probability_matters_only_where_it_is_needed(write_table):
    table = write_table("table.csv", [{"question": "صداع", "answer": "نم", "Critical": "1"}])
    for mode in ("optional", "if present"):
        assert read(table, BOTH, mode)[0].others == {"Critical": "1"}
    for mode, given in (("required", {}), ("optional", {"critical": "Critical"})):
        with pytest.raises(InputError, match="not all three .*, or --columns non_critical=COLUMN neutral=COLUMN critical=COLUMN"):
            read(table, BOTH, mode, **given)


def test_words_for_no_value(tmp_path):
    table = tmp_path / "table.jsonl"
    cells = ["NaN", "Infinity", "1e999", "null", '"nan"', '"None"', '"N/A"', '"NULL"', '"لا"']
    table.write_text("".join(f'{{"question": "سؤال", "answer": {cell}}}\n' for cell in cells), encoding="utf-8")
    assert [pair.row for pair in read(table)] == [9]


def test_the_first_visible_sheet_with_the_roles(tmp_path, capsys):
    table = tmp_path / "table.xlsx"
    notes = ("notes", "visible", [["How it was made"]], ())
    write_workbook(table, ("old", "hidden", [*QA, ["قديم", "قديم"]], ()), notes,
                   ("data", "visible", [[None], [None, None], *QA], ()), ("more", "visible", QA, ()))
    assert [(p.row, p.complaint, p.response) for p in read(table)] == [(4, *TEXTS[0]), (5, *TEXTS[1])]
    assert "sheet 'data', header in row 3: complaint = 'Question'" in capsys.readouterr().out
    write_workbook(table, ("old", "hidden", QA, ()), notes)
    with pytest.raises(InputError, match="sheet 'notes', header in row 1 has no column for the complaint; it has How it was"):
        read(table)
    write_workbook(table, ("old", "hidden", QA, ()))
    with pytest.raises(InputError, match="no sheet that is not hidden"):
        read(table)


def test_a_merged_cell_is_the_value_of_all_its_rows(tmp_path):
    rows = [[None, "Severity", "Question"], [None, "neutral", "أ"], [None, None, "ب"], [None, "critical", "ج"],
            [None, None, "د"], [None, None, "ه"]]
    write_workbook(tmp_path / "table.xlsx", ("a", "visible", rows, ["B2:B3", "B4:B5"]))
    assert [p.severity for p in read(tmp_path / "table.xlsx", ("complaint",))] == [1, 1, 2, 2, None]
    write_workbook(tmp_path / "table.xlsx", ("a", "visible", rows, ["A2:A6", "Z2:Z6"]))  # outside of what is used
    assert [p.complaint for p in read(tmp_path / "table.xlsx", ("complaint",))] == ["أ", "ب", "ج", "د", "ه"]


# ------------------------------------------------------------------ sizes

def test_long_cells_are_cut_and_counted(write_table, capsys):
    marks = "".join(map(chr, range(0x300, 0x36f))) * 9000
    table = write_table("table.csv", [{"question": "س" + marks, "answer": "نم"}])
    began = time.perf_counter()
    pairs = tables.read_pairs(table, needed=BOTH, columns=dict(complaint="question", response="answer"))
    data.complaint_id(pairs[0].complaint)
    assert len(pairs[0].complaint) == tables.LONGEST_CELL and time.perf_counter() - began < 5
    assert "1 with a cell cut to 16,000 characters (row 2)" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_too_many_columns(write_table, ending):
    row = {f"c{i}": "1" for i in range(100_000)}
    with pytest.raises(InputError, match="has 100,000 columns, 1,000 are allowed"):
        read(write_table(f"table.{ending}", [row, row]))
    with pytest.raises(InputError, match="it has c0, .*, c19, [.]{3}. Name one") as refused:
        read(write_table(f"table.{ending}", [{f"c{i}": "1" for i in range(900)}]))
    assert len(str(refused.value)) < 500


def test_workbooks_that_would_fill_the_memory(tmp_path):
    table = tmp_path / "table.xlsx"
    write_workbook(table, ("a", "visible", QA, ()))
    with zipfile.ZipFile(table) as archive:
        entries = {name: archive.read(name).decode() for name in archive.namelist()}
    for name, change, message in (
            ("xl/sheet0.xml", lambda xml: xml.replace("<c ", '<c r="XFD1048576" ', 1),
             "has 1,048,576 rows and 16,384 columns: save it as .csv"),
            ("xl/sheet0.xml", lambda xml: xml.replace("<c ", "<c r='BA900000' ", 1), "53 columns"),
            ("xl/theme.xml", lambda xml: "0" * 120_000_000, "unpacks to 120 MB: save it as .csv")):
        with zipfile.ZipFile(table, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, xml in ({"xl/theme.xml": ""} | entries).items():
                archive.writestr(entry, change(xml) if entry == name else xml)
        with pytest.raises(InputError, match=message):
            read(table)
