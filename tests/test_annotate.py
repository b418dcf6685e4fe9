"""Annotated tables: what stands in them, and that an interrupted annotation goes on to the identical file."""

import csv
import json

import pytest
import torch
from conftest import write_workbook

from sevloss import InputError, checkpoint, data, device
from sevloss.classifier import annotate
from sevloss.inputs import tables
from sevloss.models import load_model, save_model
from sevloss.models.tiny import tiny_bert
from sevloss.severity import CLASSES

CPU = device.choose("cpu", "fp32")


@pytest.fixture
def run(tmp_path, rows):
    """A run folder as train_classifier.py leaves it. Random weights, but enlarged and centred: each class is
    the likeliest at times."""
    torch.manual_seed(1)
    complaints = [row["Question"] for row in rows]
    model, tokenizer = tiny_bert(complaints, num_labels=3, vocab_size=200)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1
        bias = list(model.parameters())[-1]  # of the head
        bias -= annotate.class_logits(model, data.encode(tokenizer, complaints, special=True), CPU).mean(0)
    run = tmp_path / "classifier"
    checkpoint.write_run_json(run, "train_classifier.py", {}, preprocess="arabert", max_length=10_000)
    write_result(run, temperature=2.0)
    save_model(model, tokenizer, run)
    return run


def write_result(run, **other):
    result = {"temperature": 1.0, "out_of_fold": {}, "trained_on": [], "split_rule": data.SPLIT_RULE}
    checkpoint.write_json(run / "classifier.json", result | other)


@pytest.fixture
def classifier(run):
    return annotate.Classifier(run, CPU)


@pytest.fixture
def table(write_table, rows):
    """50 rows, of which one cannot be used; with a label here and there, and two columns that annotation does
    not know."""
    def row(i):
        return {"id": f"{i}", "q_body": rows[i]["Question"] if i != 13 else "", "a_body": rows[i]["Answer"],
                "note": "سطر\nثان, \"نعم\"",
                "severity": "critical" if i % 5 == 0 else ""}
    return write_table("table.csv", [row(i) for i in range(50)])


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_annotated_table(classifier, table, rows, tmp_path, capsys, ending):
    """The paper's six fields, whose the severity is, then the other columns; rows in order; labels stay, the
    rest get the likeliest class, which is no label where the table is read again."""
    to = tmp_path / "new" / f"annotated.{ending}"
    annotate.annotate_table(classifier, table, to, {})
    annotated = read(to)
    kept = [i for i in range(50) if i != 13]
    names = ["Question", "Answer", "Severity", "Non-Critical", "Neutral", "Critical", "Severity Source", "id",
             "note"]
    assert all(list(row) == names for row in annotated)
    assert [row["id"] for row in annotated] == [str(i) for i in kept]
    for name in ("Question", "Answer"):
        assert [row[name] for row in annotated] == [rows[i][name] for i in kept]
    assert {row["note"] for row in annotated} == {'سطر\nثان, "نعم"'}

    probabilities = torch.tensor([[float(row[name]) for name in names[3:6]] for row in annotated])
    alone = torch.cat([classifier.probabilities([rows[i]["Question"]])[0] for i in kept])
    torch.testing.assert_close(probabilities, alone, atol=2e-6, rtol=0)
    likeliest = [("non-critical", "neutral", "critical")[c] for c in alone.argmax(-1)]
    assert len(set(likeliest)) == 3  # or the next line would be blind
    assert [row["Severity"] for row in annotated] == ["critical" if i % 5 == 0 else likeliest[n]
                                                      for n, i in enumerate(kept)]

    out = capsys.readouterr().out
    assert "49 rows" in out and "left out 1 rows: 1 without a complaint (row 28)" in out
    assert sorted(path.name for path in to.parent.iterdir()) == [to.name]  # nothing temporary is left
    again = tables.read_pairs(to, needed=("complaint",), probabilities="required")
    assert [pair.severity for pair in again] == [2 if i % 5 == 0 else None for i in kept]
    assert [row["Severity Source"] == "label" for row in annotated] == [i % 5 == 0 for i in kept]


def test_probabilities_are_calibrated(classifier):
    """softmax(logits / T) of the prepared text, [CLS] and [SEP] included."""
    text = "عندي أَلَم شديد!"
    ids = classifier.tokenizer.encode("عندي ألم شديد !").ids
    logits = classifier.model.classify(torch.tensor(ids), [len(ids)])
    torch.testing.assert_close(classifier.probabilities([text])[0], (logits / 2).softmax(-1).detach())


def test_long_complaints_are_cut_to_what_the_model_reads(classifier, tmp_path, write_table, capsys):
    """Whatever --max-length was; [SEP] stays the last token."""
    assert classifier.max_length == classifier.model.config.context == 512
    ids, cut = data.encode_and_cut(classifier.tokenizer, ["صداع " * 20, "صداع"], 12)
    assert cut == 1 and len(ids[0]) == 12 and ids[0][0] == ids[1][0] and ids[0][-1] == ids[1][-1]
    table = write_table("long.csv", [{"question": "صداع " * 2000}])
    annotate.annotate_table(classifier, table, tmp_path / "out.csv", {})
    assert "1 rows, 1 complaints cut to 512 tokens" in capsys.readouterr().out


def test_out_of_fold_probabilities_are_used(run, table, rows, tmp_path, capsys):
    """For a complaint that the model was trained on, however it is punctuated; and the reader is told where
    there are none."""
    keys = [data.complaint_id(rows[i]["Question"]) for i in (4, 9, 11)]
    folds = {keys[0]: [0.1, 0.2, 0.7], keys[1]: [0.6, 0.3, 0.1]}
    write_result(run, out_of_fold=folds, trained_on=keys)
    classifier = annotate.Classifier(run, CPU)
    annotate.annotate_table(classifier, table, tmp_path / "out.jsonl", {})
    by_id = {row["id"]: row for row in read(tmp_path / "out.jsonl")}
    names = ("Severity", "Non-Critical", "Neutral", "Critical")
    assert [by_id["4"][name] for name in names] == ["critical", 0.1, 0.2, 0.7]
    assert [by_id["9"][name] for name in names] == ["non-critical", 0.6, 0.3, 0.1]
    assert "trained on 1 of these complaints" in capsys.readouterr().out
    probabilities, _ = classifier.probabilities([rows[4]["Question"] + "!!"])
    assert probabilities[0].tolist() == pytest.approx([0.1, 0.2, 0.7])


class Stop(BaseException):
    pass


def stop_after(monkeypatch, chunks):
    """Power fails while the chunk after the first `chunks` is being written: half of it is in the file."""
    original, written = annotate.write_rows, []

    def write_rows(file, suffix, pairs, *rest, **options):
        if len(written) == chunks:
            original(file, suffix, pairs[:len(pairs) // 2], *rest, **options)
            file.flush()
            raise Stop
        written.append(len(pairs))
        original(file, suffix, pairs, *rest, **options)
    monkeypatch.setattr(annotate, "write_rows", write_rows)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("chunks", [0, 2])
def test_interrupted_annotation_goes_on(classifier, table, tmp_path, monkeypatch, capsys, ending, chunks):
    whole, to = tmp_path / f"whole.{ending}", tmp_path / f"parts.{ending}"
    monkeypatch.setattr(annotate, "CHUNK", 11)
    annotate.annotate_table(classifier, table, whole, {})
    with monkeypatch.context() as patch:
        stop_after(patch, chunks)
        with pytest.raises(Stop):
            annotate.annotate_table(classifier, table, to, {})
    assert not to.exists()
    capsys.readouterr()

    scored = []
    original = type(classifier).probabilities

    def probabilities(self, complaints, *rest):
        scored.append(len(complaints))
        return original(self, complaints, *rest)
    monkeypatch.setattr(type(classifier), "probabilities", probabilities)
    annotate.annotate_table(classifier, table, to, {})
    assert to.read_bytes() == whole.read_bytes()
    assert sum(scored) == 49 - 11 * chunks  # what was done is not done again
    out = capsys.readouterr().out
    assert ("going on after row 22" in out) == (chunks > 0) and "49 rows" in out and "left out 1 rows" in out


def test_a_stop_names_the_command_that_goes_on(classifier, write_table, tmp_path, monkeypatch, capsys):
    """With the columns and the number format, or it would begin anew."""
    table = write_table("posts.csv", [{"Post": f"صداع {i}", "my reply": "راحة"} for i in range(9)])
    monkeypatch.setattr(annotate, "CHUNK", 4)
    monkeypatch.setattr(checkpoint, "append", lambda *_, append=checkpoint.append, **options: (
        append(*_, **options), setattr(annotate.stop, "signal", 15)))
    with pytest.raises(KeyboardInterrupt, match="--columns complaint=Post 'response=my reply' goes on"):
        annotate.annotate_table(classifier, table, tmp_path / "to.csv", {"complaint": "Post", "response": "my reply"})
    annotate.stop.signal = 0


def test_annotation_for_training_reads_what_training_reads(classifier, run, tmp_path):
    """The same sheet, and rows with both texts alone: the control trains on the table itself."""
    write_workbook(tmp_path / "book.xlsx", ("posts", "visible", [["Question", "Severity"], ["صداع", "critical"]], []),
                   ("pairs", "visible", [["Question", "Answer"], ["دوخة", "راحة"], ["أرق", ""]], []))
    path = annotate.annotated(run, tmp_path / "book.xlsx", {}, CPU)
    assert [row["Question"] for row in read(path)] == ["دوخة"]


def test_another_table_starts_afresh(classifier, table, tmp_path, write_table, rows, monkeypatch):
    to = tmp_path / "out.jsonl"
    monkeypatch.setattr(annotate, "CHUNK", 11)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            annotate.annotate_table(classifier, table, to, {})
    annotate.annotate_table(classifier, write_table("other.jsonl", rows[50:53]), to, {})
    assert [row["Question"] for row in read(to)] == [row["Question"] for row in rows[50:53]]


def test_every_line_of_a_csv_has_the_same_columns(classifier, tmp_path, monkeypatch):
    """Though .jsonl rows may lack fields, and each chunk is written on its own."""
    monkeypatch.setattr(annotate, "CHUNK", 2)
    lines = ['{"question": "a", "x": 1}', '{"question": "b", "y": 2}', '{"y": 3, "question": "c"}',
             '{"question": "d", "x": 4}']
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    annotate.annotate_table(classifier, tmp_path / "table.jsonl", tmp_path / "out.csv", {})
    assert [(row["Question"], row["x"], row["y"]) for row in read(tmp_path / "out.csv")] == [
        ("a", "1", ""), ("b", "", "2"), ("c", "", "3"), ("d", "4", "")]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_excel_opens_it_and_runs_nothing(classifier, tmp_path, ending):
    """A byte-order mark, or Arabic becomes gibberish; an apostrophe before what would be a formula, which the
    reader takes off again."""
    cells = ["=1+1", "+نعم", "-5.5", "- اشرب", "@SUM(A1)", "-", "نعم = لا"]
    lines = [json.dumps({"question": f"{cell} سؤال", "answer": cell}, ensure_ascii=False) for cell in cells]
    (tmp_path / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    to = tmp_path / f"out.{ending}"
    annotate.annotate_table(classifier, tmp_path / "table.jsonl", to, {})
    assert to.read_bytes().startswith(b"\xef\xbb\xbf")
    shown = ["'=1+1", "'+نعم", "-5.5", "'- اشرب", "'@SUM(A1)", "'-", "نعم = لا"]
    assert [row["Answer"] for row in read(to)] == shown
    again = tables.read_pairs(to, needed=("complaint",))
    assert [(pair.complaint, pair.response) for pair in again] == [(f"{cell} سؤال", cell) for cell in cells]


def test_targets_that_are_refused(classifier, table, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(InputError, match="out.jsonl exists: remove it"):
        annotate.annotate_table(classifier, table, tmp_path / "out.jsonl", {})
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(InputError, match="is written as .jsonl, .csv or .tsv"):
        annotate.annotate_table(classifier, table, tmp_path / "out.xlsx", {})


@pytest.mark.parametrize("name, content, message", [
    ("none.csv", None, "no such file"), ("broken.xlsx", "no zip", "BadZipFile: File is not a zip file"),
    ("columns.csv", "a,b\n1,2\n", "no column for the complaint"),
    ("empty.csv", "question,b\n,2\n", "no usable row; left out 1")])
def test_tables_that_cannot_be_annotated_leave_nothing_behind(classifier, tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        annotate.annotate_table(classifier, tmp_path / name, tmp_path / "out.csv", {})
    assert sorted(tmp_path.iterdir()) == before


def test_annotated_is_made_once_per_table(run, table, capsys):
    """finetune.py --classifier RUN asks again at each run; a changed table is annotated anew."""
    first = annotate.annotated(run, table, {}, CPU)
    made = first.stat().st_mtime_ns
    assert annotate.annotated(run, table, {}, CPU) == first and first.stat().st_mtime_ns == made
    assert "is known" in capsys.readouterr().out
    table.write_text(table.read_text(encoding="utf-8") + "50,صداع,نم,,\n", encoding="utf-8")
    second = annotate.annotated(run, table, {}, CPU)
    assert second != first and len(read(second)) == 50


def test_no_run_of_the_classifier(tmp_path, run, golden):
    for other in (golden / "bert", "runs/typo"):
        with pytest.raises(InputError, match="is no run of train_classifier.py"):
            annotate.Classifier(other, CPU)
    result = {"temperature": 2.0, "out_of_fold": {}, "trained_on": []}
    for version in ({}, {"split_rule": 1}, {"split_rule": data.SPLIT_RULE + 1}):  # the first ones stored none
        checkpoint.write_json(run / "classifier.json", result | version)
        with pytest.raises(InputError, match="was made with split rule .* train it again"):
            annotate.Classifier(run, CPU)
    (run / "classifier.json").unlink()  # it was stopped before its end
    with pytest.raises(InputError, match="was stopped before it was finished"):
        annotate.Classifier(run, CPU)


def test_logits_keep_the_order_of_the_texts(run):
    """They are computed in order of length, in several batches."""
    model = load_model(run)
    texts = [list(range(5, 5 + n)) for n in (9, 2, 30, 2, 17)]
    logits = annotate.class_logits(model, texts, CPU, max_tokens=20)
    for ids, row in zip(texts, logits):
        alone = model.classify(torch.tensor(ids), [len(ids)])[0].detach()
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_line_breaks_do_not_tear_rows_apart(classifier, write_table, rows, tmp_path, ending):
    row = {"Question": "صداع\r\nمن\rيومين\x00\x1f", "Answer": "راحة"}
    table = write_table("table.jsonl", [row, *rows[:3]])
    annotate.annotate_table(classifier, table, tmp_path / f"new.{ending}", {})
    pairs = tables.read_pairs(tmp_path / f"new.{ending}", needed=("complaint", "response"))
    assert len(pairs) == 4 and pairs[0].complaint == "صداع\nمن\nيومين"


def test_annotation_needs_the_complaint_alone(classifier, write_table, tmp_path, capsys):
    """What else is wrong with a row does not matter: its severity is what is looked for."""
    table = write_table("table.jsonl", [{"Question": "صداع", "Severity": "urgent"},
                                        {"Question": "حمى", "Severity": "حرج"}])
    annotate.annotate_table(classifier, table, tmp_path / "new.jsonl", {})
    annotated = read(tmp_path / "new.jsonl")
    assert len(annotated) == 2 and annotated[0]["Severity"] in CLASSES
    assert annotated[1]["Severity"] == "critical"
    out = capsys.readouterr().out
    assert "1 rows came with a label, which stays" in out
    assert "used all the same 1 rows: 1 with a severity other than non-critical, neutral, critical" in out


def test_columns_that_share_a_name_with_a_field_are_kept(classifier, write_table, tmp_path):
    table = write_table("table.jsonl", [{"Title": "صداع شديد", "Question": "عنوان", "Answer": "راحة"}])
    annotate.annotate_table(classifier, table, tmp_path / "new.jsonl", {"complaint": "Title"})
    row = read(tmp_path / "new.jsonl")[0]
    assert (row["Question"], row["Question (of the table)"]) == ("صداع شديد", "عنوان")
    # in another spelling, too: a reader of the new table takes `critical` for the probability
    table = write_table("flags.jsonl", [{"question": "صداع شديد", "Answer": "راحة", "critical": 1}])
    annotate.annotate_table(classifier, table, tmp_path / "flags-new.jsonl", {"complaint": "question"})
    pair, = tables.read_pairs(tmp_path / "flags-new.jsonl", needed=("complaint",), probabilities="required")
    assert pair.others["critical (of the table)"] == "1" and pair.probabilities[2] < 1


def test_predictions_are_no_labels(classifier, write_table, rows, tmp_path, capsys):
    """As the column says, or where it is missing: the likeliest class in every one of 20 rows or more. They are
    annotated anew, and no classifier is trained on them."""
    bare = [{name: row[name] for name in ("Question", "Answer")} for row in rows[:20]]
    annotate.annotate_table(classifier, write_table("bare.jsonl", bare), tmp_path / "new.jsonl", {})
    annotated = read(tmp_path / "new.jsonl")
    old = [{name: row[name] for name in annotate.FIELDS[:-1]} for row in annotated]
    for table in (tmp_path / "new.jsonl", write_table("old.jsonl", old)):
        assert {pair.severity for pair in tables.read_pairs(table, needed=("complaint",))} == {None}
        with pytest.raises(InputError, match="20 with a severity from a classifier, which is no label"):
            tables.read_pairs(table, needed=("complaint", "severity"))
    other = [name for name in CLASSES if name != old[7]["Severity"]][0]
    corrected = old[:7] + [old[7] | {"Severity": other}] + old[8:]  # by a person
    for labelled in (corrected, old[:19], [row | {"Severity Source": "label"} for row in old]):
        pairs = tables.read_pairs(write_table("labels.jsonl", labelled), needed=("complaint", "severity"))
        assert len(pairs) == len(labelled)
