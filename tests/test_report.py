"""The report of an evaluation: what stands in its files, and that the page needs nothing but itself."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from page import Page, assert_links_lead_to_sections, assert_needs_nothing

from sevloss.evaluation import findings, report
from sevloss.evaluation.findings import Answer, Answers
from sevloss.evaluation.report import write_evaluation
from sevloss.page import picture
from sevloss.severity import CLASSES

SAMPLE = Path(__file__).parents[1] / "data" / "sample.jsonl"
TABLE = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
SETTINGS = {"plain": [1, 1, 1], "balanced": [0.5, 1, 1.5]}
PROTOCOL = {"table": "data/sample.jsonl", "rows": 120, "fingerprint": "0123", "split": "test",
            "recipe": "default", "max_new_tokens": 64, "max_length": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def make_answers(name, run, count, shift=0.0, **columns):
    """Of `count` rows of the sample, the answer to each the beginning of another row's; random
    likelihoods."""
    random = np.random.default_rng(list(name.encode()))
    rows = []
    for i in range(count):
        row = TABLE[i % len(TABLE)]
        values = {
            "row": 100 + i, "complaint": row["Question"], "reference": row["Answer"],
            "severity": CLASSES.index(row["Severity"]), "specialty": row["Specialty"],
            "answer": " ".join(TABLE[(i + len(name)) % len(TABLE)]["Answer"].split()[:20]),
            "probabilities": [row["Non-Critical"], row["Neutral"], row["Critical"]],
            "finished": i % 3 > 0, "nll": random.normal(96, 9) + shift, "tokens": 30,
        }
        rows.append(Answer(**values | columns))
    return Answers(name, PROTOCOL | {"rows": count}, rows, None, run)


def make_evaluation(settings=SETTINGS, count=120, seeds=3, bertscore=True, shift=0.0, **columns):
    """Of settings with so many seeds each."""
    answers = []
    for name, coefficients in settings.items():
        for seed in range(seeds):
            run = {"arguments": {"ckpt": "tiny", "weighting": name, "seed": seed}, "coefficients": coefficients}
            answers.append(make_answers(f"runs/{name}-{seed}", run, count, shift * (name == "balanced"), **columns))
    random = np.random.default_rng(1)
    f1 = {a.name: random.normal(0.66, 0.03, count) for a in answers}
    evaluation = findings.evaluate(answers, f1 if bertscore else {}, ["12 references were cut to 512 tokens."])
    return evaluation


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(shift=-30)


@pytest.fixture(scope="module")
def written(tmp_path_factory, evaluation):
    """(folder, text of report.html)"""
    folder = tmp_path_factory.mktemp("report")
    write_evaluation(folder, evaluation)
    return folder, (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """page_of(evaluation) -> text of report.html, without the time that drawing takes."""
    monkeypatch.setattr(report, "draw_differences", lambda evaluation, endpoint: None)

    def page_of(evaluation):
        write_evaluation(tmp_path, evaluation)
        return (tmp_path / "report.html").read_text(encoding="utf-8")
    return page_of


def shown_rows(text):
    """Numbers of the rows whose answers are shown, in order."""
    parts = [part for text in Page(text).texts for part in text.split(" · ")]
    return [int(part.removeprefix("row ")) for part in parts if part.startswith("row ")]


# --- the page -----------------------------------------------------------------------------------------------

def test_page_needs_nothing(written):
    folder, text = written
    assert_needs_nothing(text, [folder / "nll.png", folder / "contrast.png"])
    assert {path.name for path in folder.iterdir()} == {"generations.jsonl", "report.html", "scores.jsonl",
                                                        "nll.png", "contrast.png"}


def test_verdict_first(written, evaluation):
    """Two sentences without numbers, before all else; each verdict with its numbers; what it does not say."""
    page = Page(written[1])
    assert_links_lead_to_sections(written[1])
    assert page.sections == ["Verdict", "Main scores", "Answers", "More numbers", "What the scores mean", "Notes"]
    assert evaluation.summary == [
        "How well the model foresees what doctors wrote: balanced is better than plain.",
        "Whether it shifts towards critical complaints: balanced is not distinguishable from plain."]
    places = [page.texts.index(sentence) for sentence in evaluation.summary]
    assert places == sorted(places) and places[1] < page.texts.index("Main scores", places[1])
    assert all(verdict.sentence in page.texts for verdict in evaluation.verdicts)
    assert any("does not say that an answer is right" in text for text in page.texts)


def test_arabic_runs_right_to_left(written, evaluation):
    """Every complaint, reference and the answer of each setting's first run, side by side."""
    texts = {text for a in evaluation.answers if a.name.endswith("-0") for row in a.rows
             for text in (row.complaint, row.reference, row.answer)}
    page = Page(written[1])
    assert {text for text, _ in page.arabic} == texts and all(right_to_left for _, right_to_left in page.arabic)
    assert len(page.arabic) == 120 * (2 + 2)
    sides = [attributes for _, attributes in page.tags if attributes.get("class") == "texts"]
    assert all(attributes["dir"] == "rtl" for attributes in sides) and len(sides) == 120


def test_texts_are_not_markup(page_of):
    """Of the table, the models, the notes and file names; and they are still shown as they are."""
    hostile = "<script>alert(1)</script> & </div>\n\n{{ 7 * 7 }} <b>\" onload='x'"
    evaluation = make_evaluation({hostile: [1, 1, 1], "b": [1, 1, 2]}, 25, complaint=hostile, reference=hostile,
                                 answer=hostile, specialty=hostile)
    evaluation.notes.append(hostile)
    evaluation.protocol["table"] = hostile
    text = page_of(evaluation)
    page = Page(text)
    assert "<script" not in text and "<b>\"" not in text and "{{ 7 * 7 }}" in text
    tags = {tag for tag, _ in page.tags}
    assert tags <= set("html head meta title style body h1 p nav a h2 div table tr th td details summary ul li "
                       "article h3 h4 span b".split())
    assert page.arabic.count((hostile, True)) == 25 * 4
    assert " ".join(hostile.split()) in page.texts  # a note
    assert_needs_nothing(text, [])


def test_a_dollar_in_a_picture_is_no_formula(tmp_path):
    """matplotlib would refuse to draw a run whose name looks like one."""
    figure = Figure()
    figure.suptitle(r"cost$\frac$")
    assert picture(figure, "title", tmp_path / "a.png")["source"].startswith("data:image/png")


def test_numbers_are_those_of_the_json(written, evaluation):
    """In the order of the settings' columns, with intervals where there are some; scores that are the same in
    all rows are left out and named; digits as the interval deserves."""
    tables, found = Page(written[1]).tables, evaluation.to_json()
    main, = tables["Main scores"]
    assert main[0] == ["score", "plain", "balanced"]
    assert [row[0] for row in main[1:]] == [
        "NLL", f"NLL: {evaluation.contrast} ({evaluation.groups[evaluation.contrast]})", "BERTScore F1", "chrF",
        "urgent"]
    by_class, by_specialty, differences = tables["More numbers"]
    assert [row[0] for row in by_class[1:] if ":" not in row[0]] == [
        s for s in evaluation.score_names if s not in ("empty", "repetitive", "repeats complaint")]
    shown = {}
    for table in (by_class, by_specialty):
        shown |= {(setting, row[0]): cell for row in table[1:] for setting, cell in zip(table[0][1:], row[1:])}
    for m in found["means"]:
        group = m["group"].removeprefix("specialty: ")
        about = m["score"] if group == "all" else f"{m['score']}: {m['group']} ({evaluation.groups[m['group']]:,})"
        cell = shown.pop((m["setting"], about), None)
        if cell is None:
            assert m["score"] in ("empty", "repetitive", "repeats complaint") or group != m["group"]
        elif m["low"] is None:
            assert float(cell) == pytest.approx(m["value"], abs=1e-3)
        else:
            assert float(cell.split()[0]) == pytest.approx(m["value"], abs=m["high"] - m["low"])
            assert cell.endswith("]") and "\N{NO-BREAK SPACE}" in cell
    assert not shown
    assert differences[0] == ["score", "balanced"] and differences[1][0] == "NLL"
    assert differences[1][1] == findings.with_interval(evaluation.verdicts[0].difference).replace(
        ", ", ",\N{NO-BREAK SPACE}")
    assert any("The same in all rows: empty 0, repetitive 0, repeats complaint 0." in t for t in Page(written[1]).texts)


def test_every_score_is_explained(written, evaluation):
    texts = Page(written[1]).texts
    after = texts[texts.index("What the scores mean", 12):]
    assert all(score in after for score in (*evaluation.score_names, "contrast"))


# --- answers ------------------------------------------------------------------------------------------------

def test_critical_rows_first(page_of):
    """By label, then by p(critical)."""
    evaluation = make_evaluation(count=4, seeds=1)
    for row, label, critical in zip(evaluation.answers[0].rows, (0, 2, None, 2), (0.1, 0.2, 0.6, 0.3)):
        row.severity, row.probabilities = label, [0.9 - critical, 0.1, critical]
    assert shown_rows(page_of(evaluation)) == [103, 101, 102, 100]


def test_predicted_classes_are_marked(page_of, tmp_path):
    text = page_of(make_evaluation(severity=None, probabilities=[0.1, 0.2, 0.7], count=30))
    assert "predicted critical" in Page(text).texts and "critical" not in Page(text).texts
    line = json.loads((tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["severity"] == "predicted critical"


def test_what_is_said_of_an_answer(page_of):
    """The names of what is yes or no, where it is yes."""
    evaluation = make_evaluation({"gpt2": [1, 1, 1]}, 2, seeds=1)
    columns = evaluation.row_scores["runs/gpt2-0"]
    columns |= {name: np.zeros(2) for name in report.RATES} | {"urgent": np.array([1.0, 0])}
    headings = [text for text in Page(page_of(evaluation)).texts if text.startswith("gpt2-0")]
    assert headings.count("gpt2-0 · urgent") == 1


def test_long_evaluations_are_cut_in_the_page_alone(tmp_path, page_of):
    text = page_of(make_evaluation({"gpt2": [1, 1, 1]}, 450, seeds=1))
    assert text.count("<article>") == 200 == len(shown_rows(text)) and "Of 450 rows 200 are shown" in text
    assert len((tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()) == 450
    assert len(text) < 2_000_000


def test_empty_answers_are_named(page_of):
    text = page_of(make_evaluation(count=3, seeds=1, answer=" \n"))
    assert Page(text).arabic.count(("(empty)", True)) == 3 * 2


def test_lines_of_rows(tmp_path, page_of):
    """A line a row, a line a row and run; nan and infinity become null, since JSON has neither."""
    evaluation = make_evaluation(count=5, seeds=1)
    evaluation.row_scores["runs/plain-0"]["NLL"][3] = math.nan
    evaluation.row_scores["runs/plain-0"]["BLEU"][3] = math.inf
    for a in evaluation.answers:
        a.rows[4].severity = a.rows[4].probabilities = None
    text = page_of(evaluation)

    def lines(name):
        def refuse(constant):
            raise AssertionError(constant)
        written = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line, parse_constant=refuse) for line in written]
    generations, scores = lines("generations.jsonl"), lines("scores.jsonl")
    names = [row.class_name for row in evaluation.answers[0].rows]
    for i, (line, row) in enumerate(zip(generations, evaluation.answers[0].rows, strict=True)):
        answers = {a.name: a.rows[i].answer for a in evaluation.answers}
        assert line == {"row": row.row, "severity": names[i], "complaint": row.complaint,
                        "reference": row.reference, "answers": answers}
    assert [(s["row"], s["run"], s["severity"]) for s in scores] == [
        (100 + i, f"runs/{name}-0", names[i]) for i, name in product(range(5), SETTINGS)]
    assert scores[6]["NLL"] is None and scores[6]["BLEU"] is None
    assert scores[6]["chrF"] == evaluation.row_scores["runs/plain-0"]["chrF"][3]
    assert names[4] == "severity unknown" and "severity unknown" in text


# --- what is known of the runs ------------------------------------------------------------------------------

def test_one_run_and_little_known(tmp_path):
    """A plain checkpoint: no comparison, classes, specialties."""
    answers = make_answers("gpt2", {}, 5, severity=None, probabilities=None, specialty="")
    write_evaluation(tmp_path, findings.evaluate([answers], {}, []))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert any("there is nothing to compare it with" in part for part in Page(text).texts)
    assert shown_rows(text) == [100, 101, 102, 103, 104]
    assert "None" not in text and "nan" not in text.lower() and "<img" not in text
    assert "p(critical)" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"generations.jsonl", "report.html", "scores.jsonl"}


def test_likelihoods_alone(page_of):
    """Without answers there is no section of answers."""
    evaluation = make_evaluation()
    for a in evaluation.answers:
        a.protocol["max_new_tokens"] = 0
    evaluation = findings.evaluate(evaluation.answers, {}, [])
    page = Page(page_of(evaluation))
    assert "Answers" not in page.sections and page.arabic == []
    assert any("Likelihoods of the doctors' replies alone, no answers." in text for text in page.texts)


def test_runs_and_sampling_are_told(page_of):
    evaluation = make_evaluation(count=3)
    evaluation.protocol |= {"temperature": 0.7, "top_p": 0.9, "seed": 4}
    texts = Page(page_of(evaluation)).texts
    assert ("3 test rows of data/sample.jsonl. Answers have at most 64 tokens, sampled at temperature 0.7, "
            "top-p 0.9, seed 4. Recipe: default. Prompt and response together have at most 512 tokens.") in texts
    assert "plain: runs/plain-2" in texts


def test_pictures_show_what_is_given(evaluation):
    """Points at the differences, lines as long as the intervals, filled where there is a finding."""
    nll, contrast = (report.draw_differences(evaluation, name).axes[0] for name in ("NLL", "contrast"))
    for axes, verdict in zip((nll, contrast), evaluation.verdicts):
        point = axes.lines[1]
        assert point.get_xdata()[0] == verdict.difference.value
        segment, = axes.collections[0].get_segments()
        assert segment[:, 0].tolist() == pytest.approx([verdict.difference.low, verdict.difference.high])
        assert (point.get_markerfacecolor() == "white") == (verdict.p_holm >= 0.05)
    assert nll.lines[1].get_markerfacecolor() == "C0" and contrast.lines[1].get_markerfacecolor() == "white"
    assert report.draw_differences(make_evaluation({"a": [1, 1, 1]}, 30, seeds=1), "NLL") is None
