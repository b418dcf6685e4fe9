"""The report of an evaluation: what stands in its files, and that the page needs nothing but itself."""

import base64
import copy
import html.parser
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sevloss.evaluation import findings
from sevloss.evaluation import report as module
from sevloss.evaluation.report import write_evaluation
from sevloss.severity import CLASSES

SAMPLE = Path(__file__).parents[1] / "data" / "sample.jsonl"
NAMES = {"NLL": "NLL per token", "perplexity": "perplexity", "BERTScore F1": "BERTScore F1", "chrF": "chrF", "BLEU": "BLEU",
         "words": "words", "empty": "empty", "urgent": "sends to emergency care"}
SETTINGS = [{"name": "runs/plain", "runs": ["runs/plain"]},
            {"name": "weighting balanced", "runs": ["runs/balanced-0", "runs/balanced-1"]}]


def make_evaluation(settings=SETTINGS, names=NAMES, count=31, curves=True, specialties=True):
    """Rows of data/sample.jsonl; their answers are cut from other rows' answers, their scores drawn at random."""
    random, rows = np.random.default_rng(0), []
    table = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    runs = [run for setting in settings for run in setting["runs"]]
    for i in range(count):
        row = table[i % len(table)]
        answers = {run: " ".join(table[(i + 7 * r + 1) % len(table)]["Answer"].split()[:20]) for r, run in enumerate(runs)}
        scores = {run: {"NLL": random.normal(3.2 - 0.1 * r, 0.4), "perplexity": random.normal(25, 4),
                        "BERTScore F1": random.normal(0.66, 0.03), "chrF": random.normal(21, 5), "BLEU": random.normal(3, 0.5),
                        "words": float(random.integers(5, 40)), "empty": 0.0, "urgent": float(random.random() < 0.3)}
                  for r, run in enumerate(runs)}
        rows.append({"row": 100 + i, "complaint": row["Question"], "reference": row["Answer"], "severity": row["Severity"],
                     "p_critical": row["Critical"], "specialty": row["Specialty"] if specialties else "", "answers": answers,
                     "scores": {run: {key: scores[run][key] for key in names} for run in runs}})
    members = {"all": rows} | {name: [row for row in rows if row["severity"] == name] for name in CLASSES}
    members["weighted by p(critical)"] = rows
    for row in rows if specialties else []:
        members.setdefault(f"specialty: {row['specialty']}", []).append(row)
    members = {group: of for group, of in members.items() if of}
    means = []
    for setting in settings:
        for key in names:
            for group, of in members.items():
                values = np.array([[row["scores"][run][key] for row in of] for run in setting["runs"]])
                error = 2 * values.mean(0).std() / len(of) ** 0.5
                mean, enough = float(values.mean()), len(of) >= 10
                means.append({"setting": setting["name"], "score": key, "group": group, "mean": mean,
                              "low": mean - error if enough else None, "high": mean + error if enough else math.nan,
                              "sd_seeds": float(values.mean(1).std(ddof=1)) if len(values) > 1 else None})
    comparisons = []
    for b in settings[1:]:
        for key in names:
            for group in members:
                a, m = ([m for m in means if (m["setting"], m["score"], m["group"]) == (s["name"], key, group)][0]["mean"]
                        for s in (settings[0], b))
                few = len(members[group]) < 10
                comparisons.append({"a": settings[0]["name"], "b": b["name"], "score": key, "group": group, "difference": m - a,
                                    "low": math.nan if few else m - a - 0.1, "high": math.nan if few else m - a + 0.1,
                                    "p": math.nan if few else 0.0002, "p_holm": math.nan if few else 0.2,
                                    "sentence": f"{b['name']} and {settings[0]['name']} are not distinguishable in {names[key]}, {group} "
                                                f"(difference {m - a:.3g}, p = 0.2 after Holm)"})
    steps = range(1, 301) if curves else []
    return {
        "protocol": {"table": "data/sample.jsonl", "rows": count, "max_new_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0,
                     "recipe": "default", "BERTScore from": "bert-base-multilingual-cased"},
        "settings": settings, "groups": {group: len(of) for group, of in members.items()}, "score_names": names,
        "lower_is_better": ["NLL", "perplexity", "empty"], "means": means, "comparisons": comparisons,
        "paper_table": (["model", "base", "CE", "mild", "strong", "balanced"], [["tiny", "–", "65.21", "–", "–", "66.14"]]),
        "notes": ["12 of 31 references were cut to 512 tokens."], "rows": rows,
        "runs": {run: {"metrics": [{"step": s, "loss": 7 * 0.99 ** s + random.random(), "lr": 1e-4} for s in steps],
                       "validation": [[s, 3 + 4 * 0.985 ** s] for s in steps if s % 50 == 0],
                       "weights": [1 + (1e-6 if run == "runs/plain" else 0.8) * (random.random() - 0.5) for _ in rows if curves]}
                 for run in runs},
    }


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation()


def written(folder, evaluation):
    """report.md and report.html."""
    write_evaluation(folder, evaluation)
    return [(folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]


def without_pictures(evaluation):
    """The same texts, without the time that drawing takes."""
    content = module.sections(module.without_nan(evaluation), [])
    return module.markdown(content), module.page(content, None)


@pytest.fixture(scope="module")
def report(tmp_path_factory, evaluation):
    folder = tmp_path_factory.mktemp("report")
    return folder, *written(folder, evaluation)


class Page(html.parser.HTMLParser):
    """The tags of a page, its visible texts, and the texts inside Arabic blocks. Fails where tags are not closed in order."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.arabic = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)
        if any(attributes.get("lang") == "ar" for _, attributes in self.open):
            self.arabic.append((data, any(attributes.get("dir") == "rtl" for _, attributes in self.open)))


def test_page_loads_nothing(report):
    """It opens offline: pictures are inside, there is no script, and no address of anything."""
    text, tags = report[2], Page(report[2]).tags
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed"}
    assert all(a["href"].startswith("#") for tag, a in tags if tag == "a")
    sources = [a["src"] for _, a in tags if "src" in a]
    assert len(sources) == 3 and all(s.startswith("data:image/png;base64,") for s in sources)
    pictures = [(report[0] / name).read_bytes() for name in ("scores.png", "training.png", "weights.png")]
    assert [base64.b64decode(s.partition(",")[2]) for s in sources] == pictures


def test_links_of_the_page_lead_somewhere(report):
    tags = Page(report[2]).tags
    targets = [a["href"][1:] for tag, a in tags if tag == "a"]
    assert len(targets) > 5 and set(targets) < {a.get("id") for _, a in tags}


def test_arabic_runs_right_to_left(report, evaluation):
    """Every complaint, reference and answer, in both files."""
    in_page = dict(Page(report[2]).arabic)
    texts = [text for row in evaluation["rows"] for text in (row["complaint"], row["reference"], *row["answers"].values())]
    assert all(in_page[text] for text in texts)
    assert report[1].count('<div dir="rtl" lang="ar">') == 10 * 5  # complaint, reference, three runs
    assert report[1].count("\n**runs/plain** ") == report[1].count("\n**weighting balanced: runs/balanced-1** ") == 10


def test_texts_are_not_markup():
    hostile = "<script>alert(1)</script> & </div>\n\n# عنوان | <b>"
    evaluation = make_evaluation(count=12)
    for row in evaluation["rows"]:
        row |= {"complaint": hostile, "reference": hostile, "answers": dict.fromkeys(row["answers"], hostile)}
    evaluation["notes"], evaluation["protocol"]["table"] = [hostile], "<script>.csv"
    evaluation["groups"] |= {"specialty: <script>": 3}
    evaluation["means"].append(evaluation["means"][0] | {"group": "specialty: <script>"})
    markdown, page = without_pictures(evaluation)
    assert "<script" not in page and "<script" not in markdown and "<b>" not in page + markdown
    assert "<script>alert(1)</script> & </div>" in Page(page).texts  # and it is still shown as it is
    block = next(line for line in markdown.splitlines() if line.startswith("<div dir"))
    assert block.endswith("&lt;/div&gt;<br><br># عنوان | &lt;b&gt;</div>")  # a blank line would end the block


def test_numbers_are_those_given(report, evaluation):
    """In the order of the settings' columns, with interval and spread where there are some."""
    in_page, lines = set(Page(report[2]).texts), report[1].splitlines()
    for m in evaluation["means"]:
        digits = {"perplexity": 2, "chrF": 2, "words": 2, "empty": 0}.get(m["score"], 4)
        cell = f"{m['mean']:.{digits}f}"
        if m["low"] is not None:
            cell += f" [{m['low']:.{digits}f}, {m['high']:.{digits}f}]"
        if m["sd_seeds"] is not None:
            cell += f" ± {m['sd_seeds']:.{digits}f}"
        name = NAMES[m["score"]] + (" ↓" if m["score"] in ("NLL", "perplexity", "empty") else "")
        group = m["group"].removeprefix("specialty: ")
        lead = [name] if group == "all" else [name, group, str(evaluation["groups"][m["group"]])]
        if group != m["group"] and m["score"] not in module.MAIN_SCORES:
            continue
        line = next(line for line in lines if line.startswith(f"| {' | '.join(lead)} | "))
        assert line.split(" | ")[len(lead):][m["setting"] != "runs/plain"].removesuffix(" |") == cell
        assert cell in in_page
    assert "| tiny | – | 65.21 | – | – | 66.14 |" in report[1]


def test_comparisons_all_rows_first(report):
    """Few are sentences, many a table."""
    text = report[1][report[1].index("## Comparisons"):]
    sentences = [line for line in text.splitlines() if line.startswith("- weighting balanced and runs/plain are not")]
    assert len(sentences) == len(NAMES) and all(", all (" in line for line in sentences)
    assert text.index(sentences[-1]) < text.index("| weighting balanced − runs/plain | NLL per token ↓ | non-critical | ")
    assert "| sends to emergency care | weighted by p(critical) | " in text and " | <0.001 | 0.200 |" in text
    assert all("<details><summary>table of 168 lines</summary>" in text for text in report[1:])


def shown_rows(markdown):
    return [int(line.split(" · ")[1].removeprefix("row ")) for line in markdown.splitlines() if line.startswith("### ")]


@pytest.mark.parametrize("there", [["BERTScore F1", "chrF", "NLL"], ["chrF", "NLL"], ["NLL"]])
def test_largest_differences_first(there):
    """Between the means of the first two settings over their runs, in the first score of three that is there; unscored rows last."""
    evaluation = make_evaluation(names={key: NAMES[key] for key in NAMES if key in there}, count=9)
    sizes = {}
    for i, row in enumerate(evaluation["rows"]):
        scores = row["scores"]
        scores["runs/plain"][there[0]] = 1.0
        scores["runs/balanced-0"][there[0]], scores["runs/balanced-1"][there[0]] = 1 + (-1) ** i * 0.1 * (i * 4 % 9), 1.0
        sizes[row["row"]] = i * 4 % 9
    evaluation["rows"][8]["scores"]["runs/plain"][there[0]] = math.nan
    sizes[108] = -1
    markdown, page = without_pictures(evaluation)
    assert shown_rows(markdown) == sorted(sizes, key=sizes.get, reverse=True)
    assert f"largest differences in {NAMES[there[0]]} between runs/plain and weighting balanced come first" in markdown
    first = next(line for line in markdown.splitlines() if line.startswith("### "))
    assert first.endswith(f"difference in {NAMES[there[0]]} +0.4000")  # the setting's two runs: +0.8 and 0; balanced minus plain
    assert page.index(f"row {shown_rows(markdown)[0]} ") < page.index(f"row {shown_rows(markdown)[1]} ")


def test_long_evaluations_are_cut_in_the_page_alone(tmp_path):
    markdown, page = written(tmp_path, make_evaluation(count=450, curves=False))
    assert page.count("<article>") == 200 and len(shown_rows(markdown)) == 10
    assert "Of 450 rows, report.html shows 200 and report.md 10" in markdown
    assert len((tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()) == 450
    assert len(page) < 2_000_000


def test_lines_of_rows(tmp_path, evaluation):
    """A line a row, a line a row and run; nan and infinity become null, since JSON has neither."""
    evaluation = copy.deepcopy(evaluation)
    evaluation["rows"][3]["scores"]["runs/plain"] |= {"NLL": math.nan, "perplexity": math.inf}
    evaluation["rows"][4]["severity"] = None
    markdown, page = written(tmp_path, evaluation)

    def lines(name):
        def refuse(constant):
            raise AssertionError(constant)
        return [json.loads(line, parse_constant=refuse) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    rows = evaluation["rows"]
    keys = ("row", "severity", "complaint", "reference", "answers")
    assert lines("generations.jsonl") == [{key: row[key] for key in keys} for row in rows]
    scores = lines("scores.jsonl")
    assert [(s["row"], s["run"], s["severity"]) for s in scores] == [(r["row"], run, r["severity"]) for r in rows for run in r["scores"]]
    assert scores[9]["NLL"] is None and scores[9]["perplexity"] is None and scores[9]["chrF"] == rows[3]["scores"]["runs/plain"]["chrF"]
    assert "nan" not in markdown and "inf " not in markdown and "severity unknown" in page


def test_one_run_and_little_known(tmp_path):
    """A plain checkpoint, likelihood alone: no comparison, classes, specialties, curves, weights, answers."""
    evaluation = make_evaluation([{"name": "gpt2", "runs": ["gpt2"]}], {"NLL": "NLL per token"}, count=5, curves=False, specialties=False)
    for row in evaluation["rows"]:
        row |= {"severity": None, "p_critical": None, "answers": {}}
    evaluation |= {"means": [m for m in evaluation["means"] if m["group"] == "all"], "groups": {"all": 5}, "paper_table": None, "notes": []}
    markdown, page = written(tmp_path, evaluation)
    assert [line for line in markdown.splitlines() if line.startswith(("# ", "## "))] == [
        "# Evaluation", "## Scores", "## Answers"]
    assert shown_rows(markdown) == [100, 101, 102, 103, 104] and "come first" not in markdown
    assert "No answers were generated." in markdown and "(not answered)" in page
    assert "None" not in markdown + page and "<img" not in page and "p(critical)" not in markdown
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"generations.jsonl", "report.html", "report.md", "scores.jsonl"}


def test_empty_answers_are_named():
    evaluation = make_evaluation(count=3)
    evaluation["rows"][0]["answers"]["runs/plain"] = " \n"
    assert all('<div dir="rtl" lang="ar">(empty)</div>' in text for text in without_pictures(evaluation))


def test_sampling_is_told():
    evaluation = make_evaluation(count=3)
    evaluation["protocol"] |= {"temperature": 0.7, "top_p": 0.9, "seed": 4}
    markdown = without_pictures(evaluation)[0]
    assert "Answers have at most 64 tokens, sampled at temperature 0.7, top-p 0.9, seed 4. Recipe: default." in markdown
    assert "weighting balanced (runs/balanced-0, runs/balanced-1)" in markdown


def test_pictures_show_what_is_given(evaluation):
    """Points at the means, lines as long as the intervals; the loss as a mean over the last steps; a line at w = 1 for a plain run."""
    axes = module.draw_scores(evaluation).axes
    assert [a.get_title() for a in axes] == ["NLL per token ↓", "BERTScore F1", "chrF", "sends to emergency care"]
    means = [m for m in evaluation["means"] if m["score"] == "BERTScore F1" and not m["group"].startswith("specialty")]
    assert [y for line in axes[1].lines for y in line.get_ydata()] == [m["mean"] for m in means]
    intervals = [tuple(c.get_segments()[0][:, 1]) for c in axes[1].collections]
    assert intervals == [pytest.approx((m["low"], m["high"])) for m in means if m["low"] is not None]
    training, validation = module.draw_training(evaluation).axes
    steps, losses = training.lines[0].get_data()
    assert steps[0] == 10 and losses[0] == pytest.approx(np.mean([m["loss"] for m in evaluation["runs"]["runs/plain"]["metrics"][:10]]))
    assert validation.lines[0].get_xydata().tolist() == evaluation["runs"]["runs/plain"]["validation"]
    weights = module.draw_weights(evaluation).axes[0]
    assert weights.lines[0].get_xdata() == pytest.approx([1, 1], abs=1e-5) and len(weights.patches) == 2  # two runs with balanced weights


def test_findings_of_evaluate_fit(tmp_path):
    """What evaluation.evaluate returns is what the report reads: the sections, the main scores, the order of the answers."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()][:30]
    protocol = {"table": "sample.jsonl", "rows": 30, "fingerprint": "0123", "recipe": "default", "max_new_tokens": 64, "max_length": 512,
                "temperature": 0.0, "top_p": 1.0, "seed": 0}

    def answers(name, shift):
        return findings.Answers(name, protocol, [
            {"row": i, "complaint": row["Question"], "reference": row["Answer"], "severity": CLASSES.index(row["Severity"]),
             "probabilities": [row["Non-Critical"], row["Neutral"], row["Critical"]], "specialty": row["Specialty"],
             "answer": rows[i - shift]["Answer"], "finished": True, "nll": 90.0 + i, "tokens": 30} for i, row in enumerate(rows)], None)
    f1 = {"a": [0.6] * 30, "b": [0.6 + 0.001 * i for i in range(30)]}
    found = findings.evaluate([answers("a", 1), answers("b", 2)], f1, ["a note"])
    markdown, page = written(tmp_path, found)
    assert [line[3:] for line in markdown.splitlines() if line.startswith("## ")] == [
        "Scores", "Scores by class", "Scores by specialty", "Comparisons", "The paper's table", "Notes", "Pictures", "Answers"]
    assert [axes.get_title() for axes in module.draw_scores(found).axes] == ["NLL ↓", "BERTScore F1", "chrF", "urgent"]
    assert shown_rows(markdown) == list(range(29, 19, -1))
    assert "| NLL ↓ | 3.4833 [" in markdown and "b is better than a in BERTScore F1" in markdown and "fingerprint" not in markdown.lower()
