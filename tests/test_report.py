"""The report of an evaluation: what stands in its files, and that the page needs nothing but itself."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from page import Page, assert_links_lead_to_sections, assert_needs_nothing

from sevloss.evaluation import findings, report
from sevloss.evaluation.findings import Answer, Answers, RunRecord
from sevloss.evaluation.report import write_evaluation
from sevloss.severity import CLASSES

SAMPLE = Path(__file__).parents[1] / "data" / "sample.jsonl"
TABLE = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
RUNS = {"runs/plain": ("none", 0), "runs/balanced-0": ("balanced", 0), "runs/balanced-1": ("balanced", 1)}
PROTOCOL = {"table": "data/sample.jsonl", "rows": 31, "fingerprint": "0123", "recipe": "default",
            "max_new_tokens": 64, "max_length": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def make_answers(name, run, count, **columns):
    """Of `count` rows of the sample, the answer to each the beginning of another row's; random
    likelihoods."""
    random = np.random.default_rng(len(name))
    shift = 1 + list(RUNS).index(name) if name in RUNS else 1
    rows = []
    for i in range(count):
        row = TABLE[i % len(TABLE)]
        answer = " ".join(TABLE[(i + 7 * shift) % len(TABLE)]["Answer"].split()[:20])
        values = {
            "row": 100 + i, "complaint": row["Question"], "reference": row["Answer"],
            "severity": CLASSES.index(row["Severity"]), "specialty": row["Specialty"], "answer": answer,
            "probabilities": [row["Non-Critical"], row["Neutral"], row["Critical"]],
            "finished": i % 3 > 0, "nll": random.normal(96, 9), "tokens": 30,
        }
        rows.append(Answer(**values | columns))
    return Answers(name, PROTOCOL | {"rows": count}, rows, None, run)


def make_evaluation(runs=RUNS, count=31, bertscore=True, **columns):
    """Of settings runs/plain and runs/balanced, the latter with two seeds; what their folders would tell is
    made up."""
    answers = []
    for name, (weighting, seed) in runs.items():
        arguments = {"ckpt": "tiny", "weighting": weighting, "seed": seed}
        answers.append(make_answers(name, {"arguments": arguments}, count, **columns))
    random = np.random.default_rng(1)
    f1 = {name: random.normal(0.66, 0.03, count) for name in runs}
    evaluation = findings.evaluate(answers, f1 if bertscore else {},
                                   ["12 of 31 references were cut to 512 tokens."])
    for name, (weighting, _) in runs.items():
        spread = 1e-6 if weighting == "none" else 0.8
        evaluation.runs[name] = RunRecord(
            metrics=[{"step": s, "loss": 7 * 0.99 ** s + random.random()} for s in range(1, 301)],
            validation=[[s, 3 + 4 * 0.985 ** s] for s in range(50, 301, 50)],
            weights=[1 + spread * (random.random() - 0.5) for _ in range(count)])
    return evaluation


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation()


@pytest.fixture(scope="module")
def written(tmp_path_factory, evaluation):
    """(folder, text of report.html)"""
    folder = tmp_path_factory.mktemp("report")
    write_evaluation(folder, evaluation)
    return folder, (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """page_of(evaluation) -> text of report.html, without the time that drawing takes."""
    for name in ("draw_scores", "draw_training", "draw_weights"):
        monkeypatch.setattr(report, name, lambda evaluation: None)

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
    assert_needs_nothing(text, [folder / name for name in ("scores.png", "training.png", "weights.png")])
    assert {path.name for path in folder.iterdir()} == {"generations.jsonl", "report.html", "scores.jsonl",
                                                        "scores.png", "training.png", "weights.png"}


def test_links_of_the_page_lead_to_its_sections(written):
    assert_links_lead_to_sections(written[1])
    assert Page(written[1]).sections == ["Scores", "Scores by class", "Scores by specialty", "Comparisons",
                                         "The paper's table", "Notes", "Pictures", "Answers"]


def test_arabic_runs_right_to_left(written, evaluation):
    """Every complaint, reference and answer."""
    texts = {text for a in evaluation.answers for row in a.rows
             for text in (row.complaint, row.reference, row.answer)}
    arabic = Page(written[1]).arabic
    assert {text for text, _ in arabic} == texts and all(right_to_left for _, right_to_left in arabic)
    assert len(arabic) == 31 * (2 + 3)


def test_texts_are_not_markup(page_of):
    """Of the table, the models, the notes and file names; and they are still shown as they are."""
    hostile = "<script>alert(1)</script> & </div>\n\n{{ 7 * 7 }} <b>\" onload='x'"
    runs = {hostile: ("none", 0), "runs/b": ("mild", 0)}
    evaluation = make_evaluation(runs, 25, complaint=hostile, reference=hostile, answer=hostile,
                                 specialty=hostile)
    evaluation.notes.append(hostile)
    evaluation.protocol["table"] = hostile
    text = page_of(evaluation)
    page = Page(text)
    assert "<script" not in text and "<b>" not in text and "{{ 7 * 7 }}" in text
    tags = {tag for tag, _ in page.tags}
    assert tags <= set("html head meta title style body h1 p nav a h2 div table tr th td details summary ul li "
                       "article h3 h4 span".split())
    assert page.arabic.count((hostile, True)) == 25 * 4
    shown = " ".join(hostile.split())
    assert shown in page.texts  # a note
    assert sum(shown in part for part in page.texts if "Evaluated" in part) == 1
    assert_needs_nothing(text, [])


def test_numbers_are_those_of_the_json(written, evaluation):
    """In the order of the settings' columns, with interval and spread where there are some."""
    tables, found = Page(written[1]).tables, evaluation.to_json()
    lines = {}
    for section in ("Scores", "Scores by class", "Scores by specialty"):
        for header, *rows in tables[section]:
            assert header[-2:] == ["runs/plain", "runs/balanced"]
            lines |= {(section, *row[:-2]): row[-2:] for row in rows}
    digits = {"perplexity": 2, "chrF": 2, "words": 2}
    seen = set()
    for m in found["means"]:
        name = m["score"] + (" ↓" if m["score"] in found["lower_is_better"] else "")
        rows = f"{evaluation.groups[m['group']]:,}"
        if m["group"].startswith("specialty: "):
            if m["score"] not in report.MAIN_SCORES:
                continue
            lead = "Scores by specialty", name, m["group"].removeprefix("specialty: "), rows
        else:
            lead = ("Scores", name) if m["group"] == "all" else ("Scores by class", name, m["group"], rows)
        cell = lines[lead][m["setting"] == "runs/balanced"]
        seen.add(lead)
        if m["score"] in ("urgent", "empty", "unfinished", "repetitive", "repeats complaint"):
            assert float(cell.split()[0]) == pytest.approx(m["mean"], abs=1e-4)
            continue
        d = digits.get(m["score"], 4)
        expected = f"{m['mean']:.{d}f}"
        if m["low"] is not None:
            expected += f" [{m['low']:.{d}f}, {m['high']:.{d}f}]"
        if m["sd_seeds"] is not None:
            expected += f" ± {m['sd_seeds']:.{d}f}"
        assert cell == expected
    assert seen == set(lines)
    header, *rows = tables["The paper's table"][0]
    assert [header, rows] == found["paper_table"]


def test_comparisons(written, evaluation, page_of):
    """Those of all rows are sentences where they are few, all others lines of a table."""
    page = Page(written[1])
    of_all = [c for c in evaluation.comparisons if c.group == "all"]
    assert len(of_all) <= report.MOST_SENTENCES and all(c.sentence in page.texts for c in of_all)
    (_, *rows), = page.tables["Comparisons"]
    others = [c for c in evaluation.comparisons if c.group != "all"]
    lower = ("NLL", "empty", "unfinished", "repetitive", "repeats complaint")
    names = [c.score + " ↓" * (c.score in lower) for c in others]
    assert [row[:3] for row in rows] == [["runs/balanced − runs/plain", name, c.group]
                                         for name, c in zip(names, others)]
    assert [float(row[3]) for row in rows] == pytest.approx([c.difference for c in others], rel=0.01)
    assert [row[-1] for row in rows] == ["<0.001" if c.p_holm < 0.001 else f"{c.p_holm:.3f}" for c in others]

    four = {f"runs/{name}": (name, 0) for name in ("none", "mild", "balanced", "strong")}
    page = Page(page_of(make_evaluation(four, 20)))
    (_, *rows), = page.tables["Comparisons"]
    assert not any("not distinguishable" in text for text in page.texts)
    assert {row[2] for row in rows} > {"all"}


def test_a_comparison_that_was_not_possible_is_a_dash(page_of):
    evaluation = make_evaluation(count=20)
    evaluation.comparisons[-1].difference = evaluation.comparisons[-1].p_holm = math.nan
    row = Page(page_of(evaluation)).tables["Comparisons"][0][-1]
    assert row[3] == row[-1] == "–" and row[4] != "–"


@pytest.mark.parametrize("count, details", [(24, 0), (25, 1)])
def test_long_tables_are_folded(count, details, page_of):
    evaluation = make_evaluation(count=1)
    evaluation.paper_table = ["model", "CE"], [[f"gpt-{i}", "65.21"] for i in range(count)]
    folded = page_of(evaluation).partition('<h2 id="the-papers-table">')[2].partition("<h2")[0]
    assert folded.count("<details>") == folded.count(f"table of {count} lines") == details


# --- answers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["BERTScore F1", "chrF"])
def test_largest_differences_first(by, page_of):
    """Between the means of the two settings over their runs, in the first score that is there; unscored rows
    last."""
    evaluation = make_evaluation(count=9, bertscore=by == "BERTScore F1")
    sizes = np.array([i * 4 % 9 for i in range(9)])
    plain, first, second = (evaluation.row_scores[run] for run in RUNS)
    plain[by] = np.full(9, 1.0)
    first[by] = 1 + (-1.0) ** np.arange(9) * 0.1 * sizes
    second[by] = np.full(9, 1.0)
    plain[by][8] = math.nan
    sizes[8] = -1
    text = page_of(evaluation)
    order = [100 + int(i) for i in np.argsort(-sizes)]
    assert shown_rows(text) == order
    assert f"largest differences in {by} between runs/plain and runs/balanced come first" in text
    assert f"difference in {by} +0.4000" in text  # two runs: +0.8 and 0


def test_scores_of_an_answer(page_of):
    """Numbers, and of what is yes or no the name where it is yes."""
    evaluation = make_evaluation({"gpt2": ("none", 0)}, 2)
    columns = evaluation.row_scores["gpt2"]
    columns |= {"NLL": np.array([3.25, 2]), "urgent": np.array([1.0, 0]), "empty": np.zeros(2)}
    shown = [text for text in Page(page_of(evaluation)).texts if text.startswith("NLL 3.2500 · ")]
    assert len(shown) == 1 and shown[0].endswith(" · urgent") and "empty" not in shown[0]


def test_long_evaluations_are_cut_in_the_page_alone(tmp_path, page_of):
    text = page_of(make_evaluation({"gpt2": ("none", 0)}, 450))
    assert text.count("<article>") == 200 == len(shown_rows(text)) and "Of 450 rows 200 are shown" in text
    assert len((tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()) == 450
    assert len(text) < 2_000_000


def test_empty_answers_are_named(page_of):
    text = page_of(make_evaluation(count=3, answer=" \n"))
    assert Page(text).arabic.count(("(empty)", True)) == 3 * 3


def test_lines_of_rows(tmp_path, page_of):
    """A line a row, a line a row and run; nan and infinity become null, since JSON has neither."""
    evaluation = make_evaluation(count=5)
    evaluation.row_scores["runs/plain"]["NLL"][3] = math.nan
    evaluation.row_scores["runs/plain"]["BLEU"][3] = math.inf
    for a in evaluation.answers:
        a.rows[4].severity = None
    text = page_of(evaluation)

    def lines(name):
        def refuse(constant):
            raise AssertionError(constant)
        written = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line, parse_constant=refuse) for line in written]
    generations, scores = lines("generations.jsonl"), lines("scores.jsonl")
    names = [None if row.severity is None else CLASSES[row.severity] for row in evaluation.answers[0].rows]
    for i, (line, row) in enumerate(zip(generations, evaluation.answers[0].rows, strict=True)):
        answers = {a.name: a.rows[i].answer for a in evaluation.answers}
        assert line == {"row": row.row, "severity": names[i], "complaint": row.complaint,
                        "reference": row.reference,
                        "answers": answers}
    assert [(s["row"], s["run"], s["severity"]) for s in scores] == [
        (100 + i, run, names[i]) for i, run in product(range(5), RUNS)]
    assert scores[9]["NLL"] is None and scores[9]["BLEU"] is None
    assert scores[9]["chrF"] == evaluation.row_scores["runs/plain"]["chrF"][3]
    assert "severity unknown" in text


# --- what is known of the runs ------------------------------------------------------------------------------

def test_one_run_and_little_known(tmp_path):
    """A plain checkpoint: no comparison, classes, specialties, curves, weights."""
    answers = make_answers("gpt2", {}, 5, severity=None, probabilities=None, specialty="")
    write_evaluation(tmp_path, findings.evaluate([answers], {}, []))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).sections == ["Scores", "Answers"]
    assert shown_rows(text) == [100, 101, 102, 103, 104] and "come first" not in text
    assert "None" not in text and "nan" not in text.lower() and "<img" not in text
    assert "p(critical)" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"generations.jsonl", "report.html", "scores.jsonl"}


def test_sampling_is_told(page_of):
    evaluation = make_evaluation(count=3)
    evaluation.protocol |= {"temperature": 0.7, "top_p": 0.9, "seed": 4}
    introduction = Page(page_of(evaluation)).texts
    assert ("3 test rows of data/sample.jsonl. Answers have at most 64 tokens, sampled at temperature 0.7, "
            "top-p 0.9, seed 4. Recipe: default. Prompt and response together have at most 512 tokens. "
            "Evaluated: runs/plain; runs/balanced (runs/balanced-0, runs/balanced-1).") in introduction


def test_pictures_show_what_is_given(evaluation):
    """Points at the means, lines as long as the intervals; the loss as a mean over the last steps; a line at
    w = 1 for a plain run."""
    axes = report.draw_scores(evaluation).axes
    assert [a.get_title() for a in axes] == ["NLL ↓", "BERTScore F1", "chrF", "urgent"]
    groups = [group for group in evaluation.groups if not group.startswith("specialty")]
    means = [evaluation.means[s, "BERTScore F1", group]
             for s, group in product(("runs/plain", "runs/balanced"), groups)]
    assert [y for line in axes[1].lines for y in line.get_ydata()] == [m.mean for m in means]
    segments = [segment for c in axes[1].collections for segment in c.get_segments() if len(segment)]
    expected = [(m.low, m.high) for m in means if not math.isnan(m.low)]
    assert [segment[:, 1].tolist() for segment in segments] == [pytest.approx(interval)
                                                                for interval in expected]
    training, validation = report.draw_training(evaluation).axes
    steps, losses = training.lines[0].get_data()
    record = evaluation.runs["runs/plain"]
    assert steps[0] == 10
    assert losses[0] == pytest.approx(np.mean([line["loss"] for line in record.metrics[:10]]))
    assert validation.lines[0].get_xydata().tolist() == record.validation
    weights = report.draw_weights(evaluation).axes[0]
    assert weights.lines[0].get_xdata() == pytest.approx([1, 1], abs=1e-5)
    assert len(weights.patches) == 2  # two runs with balanced weights
