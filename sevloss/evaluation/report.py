"""The report of evaluate.py: report.html with its pictures, generations.jsonl and scores.jsonl."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sevloss import write_text
from sevloss.evaluation.findings import decimals, with_interval, without_nan
from sevloss.evaluation.scores import RATES
from sevloss.page import Table, picture, write_page

MAIN_SCORES = ("NLL", "BERTScore F1", "chrF", "urgent")  # in the first table and by specialty
MOST_ANSWERS = 200  # in the page
PICTURES = {"NLL": "Left of the line: the doctors' words are likelier than to the control",
            "contrast": "Left of the line: shifted towards critical rows"}


def write_evaluation(folder, evaluation):
    """Fills `folder` with what evaluation.findings.evaluate found. A number that is nan is a dash in the page
    and null in the .jsonl files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, evaluation)
    pictures = []
    for endpoint, title in PICTURES.items():
        if figure := draw_differences(evaluation, endpoint):
            pictures.append(picture(figure, title, folder / f"{endpoint.lower()}.png"))

    constant = {}  # scores that are the same in all rows of all runs
    for score in evaluation.row_scores[evaluation.answers[0].name]:
        values = np.stack([columns[score] for columns in evaluation.row_scores.values()])
        if np.ptp(values) == 0:
            constant[score] = f"{values.flat[0]:.4g}"
    scores = [score for score in evaluation.score_names if score not in constant]
    main = [(score, "all") for score in MAIN_SCORES if score in scores]
    if evaluation.contrast:
        main.insert(1, ("NLL", evaluation.contrast))
    specialties = [group for group in evaluation.groups if group.startswith("specialty: ")]
    classes = [group for group in evaluation.groups if group not in specialties]  # "all" among them
    by_specialty = product([score for score, _ in main], specialties)
    tables = {
        "All scores, by class": score_table(evaluation, evaluation.means, product(scores, classes)),
        "By specialty": score_table(evaluation, evaluation.means, by_specialty),
        f"Differences from {evaluation.control}": score_table(evaluation, evaluation.differences,
                                                              product(scores, classes)),
    }
    write_page(
        folder / "report.html", "evaluation/report.html", found=evaluation, constant=constant, rates=RATES,
        main=score_table(evaluation, evaluation.means, main),
        rest={title: table for title, table in tables.items() if table.rows},
        pictures=pictures,
        shown=evaluation.most_critical_first()[:MOST_ANSWERS],
        answers={a.name: a.rows for a in evaluation.answers})


def write_rows(folder, evaluation):
    """generations.jsonl: a line a row; scores.jsonl: a line a row and run."""
    generations, scores = [], []
    for i, row in enumerate(evaluation.answers[0].rows):
        generations.append({
            "row": row.row, "severity": row.class_name, "complaint": row.complaint,
            "reference": row.reference, "answers": {a.name: a.rows[i].answer for a in evaluation.answers},
        })
        for run, columns in evaluation.row_scores.items():
            values = {score: float(column[i]) for score, column in columns.items()}
            scores.append({"row": row.row, "run": run, "severity": row.class_name, **without_nan(values)})
    for name, lines in (("generations", generations), ("scores", scores)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(folder / f"{name}.jsonl", text)


def score_table(evaluation, estimates, lines):
    """estimates: means, or differences from the control; lines: (score, group); a column a setting."""
    settings = list(dict.fromkeys(setting for setting, _, _ in estimates))
    sign = "+" if estimates is evaluation.differences else ""
    rows = []
    for score, group in lines:
        of_line = [estimates.get((setting, score, group)) for setting in settings]
        about = score if group == "all" else f"{score}: {group} ({evaluation.groups[group]:,})"
        margins = [e.high - e.value for e in of_line if e and e.high > e.value]
        places = decimals(min(margins, default=math.nan))
        cells = ["–" if e is None or math.isnan(e.value) else with_interval(e, places, sign) for e in of_line]
        if any(of_line):
            # a line may break before the bracket alone
            rows.append([about, *(text.replace(", ", ",\N{NO-BREAK SPACE}") for text in cells)])
    return Table(["score", *settings], rows)


def draw_differences(evaluation, endpoint):
    """A figure of each setting's difference from the control with its interval, filled if it is a finding;
    None where nothing is compared. No Arabic in it: matplotlib does not join its letters."""
    verdicts = [v for v in evaluation.verdicts
                if v.endpoint == endpoint and math.isfinite(v.difference.value)]
    if not verdicts:
        return None
    figure = Figure(figsize=(5.6, 1.3 + 0.4 * len(verdicts)), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", nbins=5)
    axes.axvline(0, color="grey", linewidth=1)
    for place, v in enumerate(verdicts):
        value, low, high = v.difference[:3]
        found = v.p_holm < 0.05
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=3,
                      color="C0" if found else "grey", markerfacecolor="C0" if found else "white")
    axes.set(yticks=range(len(verdicts)), yticklabels=[v.setting[:30] for v in verdicts],
             ylim=(len(verdicts) - 0.5, -0.5), xlabel=f"{endpoint} minus that of {evaluation.control[:30]}")
    return figure
