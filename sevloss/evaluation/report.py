"""The report of evaluate.py: report.html with its pictures, generations.jsonl and scores.jsonl."""

import json
import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sevloss.checkpoint import write_lines
from sevloss.evaluation.findings import without_nan
from sevloss.evaluation.scores import LOWER_IS_BETTER
from sevloss.page import Table, picture, write_page
from sevloss.severity import CLASSES

MAIN_SCORES = ("NLL", "BERTScore F1", "chrF", "urgent")  # in pictures and by specialty
MOST_SENTENCES = 12  # more comparisons than that are a table
MOST_ANSWERS = 200  # in the page


def write_evaluation(folder, evaluation):
    """Fills `folder` with what evaluation.findings.evaluate found. A number that is nan is a dash in the page
    and null in the .jsonl files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, evaluation)
    pictures = []
    for name, title, draw in (
        ("scores.png", "Scores of all rows and by class, with 95% intervals", draw_scores),
        ("training.png", "Training", draw_training),
        ("weights.png", "Severity weights of the rows evaluated", draw_weights),
    ):
        figure = draw(evaluation)
        if figure:
            pictures.append(picture(figure, title, folder / name))

    main = main_scores(evaluation)
    others = [score for score in evaluation.score_names if score not in main]
    specialties = [group for group in evaluation.groups if group.startswith("specialty: ")]
    classes = [group for group in evaluation.groups if group != "all" and group not in specialties]
    told = [c for c in evaluation.comparisons if c.group == "all"]
    if len(told) > MOST_SENTENCES:
        told = []
    rest = [c for c in evaluation.comparisons if c not in told]
    by, differences = row_differences(evaluation)
    write_page(
        folder / "report.html", "evaluation/report.html",
        protocol=evaluation.protocol,
        settings=evaluation.settings,
        scores=score_table(evaluation, main + others, ["all"]),
        by_class=[score_table(evaluation, names, classes) for names in (main, others) if names and classes],
        by_specialty=score_table(evaluation, main, specialties) if specialties else None,
        sentences=[c.sentence for c in told],
        comparisons=comparison_table(rest) if rest else None,
        paper_table=Table(*evaluation.paper_table) if evaluation.paper_table else None,
        notes=evaluation.notes,
        pictures=pictures,
        by=by,
        differences=differences,
        order=np.argsort(-abs(differences), kind="stable")[:MOST_ANSWERS].tolist(),  # nan last
        answers={a.name: a.rows for a in evaluation.answers},
        rows=evaluation.answers[0].rows,
        score_lines=score_lines(evaluation),
        classes=CLASSES,
    )


def write_rows(folder, evaluation):
    """generations.jsonl: a line a row; scores.jsonl: a line a row and run."""
    generations, scores = [], []
    for i, row in enumerate(evaluation.answers[0].rows):
        severity = None if row.severity is None else CLASSES[row.severity]
        generations.append({
            "row": row.row, "severity": severity, "complaint": row.complaint, "reference": row.reference,
            "answers": {a.name: a.rows[i].answer for a in evaluation.answers},
        })
        for run, columns in evaluation.row_scores.items():
            values = {name: float(column[i]) for name, column in columns.items()}
            scores.append({"row": row.row, "run": run, "severity": severity, **without_nan(values)})
    write_lines(folder / "generations.jsonl", (json.dumps(line, ensure_ascii=False) for line in generations))
    write_lines(folder / "scores.jsonl", (json.dumps(line, ensure_ascii=False) for line in scores))


# --- tables -------------------------------------------------------------------------------------------------

def main_scores(evaluation):
    return [score for score in MAIN_SCORES if score in evaluation.score_names]


def score_table(evaluation, scores, groups):
    """A line per score and group, a column per setting: mean [95% interval] ± standard deviation between
    seeds."""
    settings = [setting.name for setting in evaluation.settings]
    lead = 1 if groups == ["all"] else 3
    rows = []
    for score in scores:
        means = [m for m in evaluation.means.values() if m.score == score]
        digits = decimals([x for m in means for x in (m.mean, m.low, m.high)])
        for group in groups:
            about = [with_arrow(score), group.removeprefix("specialty: "), f"{evaluation.groups[group]:,}"]
            cells = [mean_cell(evaluation.means[setting, score, group], digits) for setting in settings]
            rows.append(about[:lead] + cells)
    return Table(["score", "group", "rows"][:lead] + settings, rows, text_columns=min(lead, 2))


def mean_cell(m, digits):
    if not math.isfinite(m.mean):
        return "–"
    text = f"{m.mean:,.{digits}f}"
    if math.isfinite(m.low):
        text += f" [{m.low:,.{digits}f}, {m.high:,.{digits}f}]"
    if math.isfinite(m.sd_seeds):
        text += f" ± {m.sd_seeds:,.{digits}f}"
    return text


def comparison_table(comparisons):
    rows = []
    for c in comparisons:
        numbers = ["–" if math.isnan(x) else f"{x:+.3g}" for x in (c.difference, c.low, c.high)]
        chances = ["–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" for p in (c.p, c.p_holm)]
        rows.append([f"{c.b} − {c.a}", with_arrow(c.score), c.group, *numbers, *chances])
    header = ["settings", "score", "group", "difference", "low", "high", "p", "p (Holm)"]
    return Table(header, rows, text_columns=3)


def with_arrow(score):
    return score + (" ↓" if score in LOWER_IS_BETTER else "")


def decimals(values):
    """How many, for numbers that stand together."""
    values = [abs(x) for x in values if math.isfinite(x)]
    if all(x == int(x) for x in values):
        return 0
    largest = max(values)
    return 4 if largest < 10 else 2 if largest < 1000 else 1


# --- answers ------------------------------------------------------------------------------------------------

def row_differences(evaluation):
    """(score, (n,) differences of each row between the first two settings, the means over their runs); (None,
    nan) where there is one setting."""
    columns = evaluation.row_scores  # run -> score -> (n,)
    if len(evaluation.settings) == 1:
        return None, np.full(len(evaluation.answers[0].rows), np.nan)
    score = next(score for score in ("BERTScore F1", "chrF") if score in evaluation.score_names)
    a, b = (np.mean([columns[run][score] for run in s.runs], axis=0) for s in evaluation.settings[:2])
    return score, b - a


def score_lines(evaluation):
    """{run: n lines}: the scores of each answer; of a score that is 0 or 1 its name where it is 1."""
    columns = evaluation.row_scores
    lines = {run: [[] for _ in evaluation.answers[0].rows] for run in columns}
    for score in next(iter(columns.values())):
        values = np.concatenate([of_run[score] for of_run in columns.values()])
        digits = decimals(values)
        for run, of_run in columns.items():
            for line, value in zip(lines[run], of_run[score]):
                if not set(values) <= {0, 1}:
                    line.append(f"{score} {value:,.{digits}f}")
                elif value:
                    line.append(score)
    return {run: [" · ".join(line) for line in of_run] for run, of_run in lines.items()}


# --- pictures -----------------------------------------------------------------------------------------------
# A figure, or None where there is nothing to draw. No Arabic in them: matplotlib does not join its letters.

def draw_scores(evaluation):
    """A panel per main score: means and intervals of all rows, by class and weighted; a colour per
    setting."""
    settings = [setting.name for setting in evaluation.settings]
    groups = [group for group in evaluation.groups if not group.startswith("specialty: ")]
    if len(groups) * len(settings) == 1:
        return None  # one point is no picture
    scores = main_scores(evaluation)
    figure, panels = new_figure(len(scores))
    for axes, score in zip(panels, scores):
        for i, setting in enumerate(settings):
            places = np.arange(len(groups)) + (i - (len(settings) - 1) / 2) * 0.6 / len(settings)
            means = [evaluation.means[setting, score, group] for group in groups]
            mean, low, high = np.array([(m.mean, m.low, m.high) for m in means]).T
            axes.errorbar(places, mean, [mean - low, high - mean], fmt="o", color=f"C{i}", label=setting)
        axes.set_xticks(range(len(groups)), [textwrap.fill(group, 13) for group in groups])
        axes.set(title=with_arrow(score), xlim=(-0.5, len(groups) - 0.5))
    return finished(figure)


def draw_training(evaluation):
    """The training loss, a mean over the last steps, and the NLL on the validation rows; a line per run, a
    colour per setting."""
    training, validation = [], []  # (colour, setting, steps, values)
    for colour, setting, run in runs_of(evaluation):
        if run.metrics:
            steps = np.array([line["step"] for line in run.metrics])
            losses = np.array([line["loss"] for line in run.metrics], dtype=float)
            window = max(1, len(losses) // 30)
            smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
            training.append((colour, setting, steps[window - 1:], smooth))
        if run.validation:
            validation.append((colour, setting, *np.array(run.validation, dtype=float).T))
    curves = [("training loss (with severity weights)", training),
              ("validation NLL per token (no weights)", validation)]
    curves = [(title, lines) for title, lines in curves if lines]
    if not curves:
        return None
    figure, panels = new_figure(len(curves))
    for axes, (title, lines) in zip(panels, curves):
        for colour, setting, steps, values in lines:
            marker = "o" if len(steps) <= 20 else None
            axes.plot(steps, values, color=colour, label=setting, linewidth=1.5, marker=marker, markersize=4)
        axes.set(title=title, xlabel="optimizer step")
    return finished(figure)


def draw_weights(evaluation):
    """Histogram of the weights of each run; a vertical line where every row has the same."""
    runs = [(colour, setting, run.weights) for colour, setting, run in runs_of(evaluation) if run.weights]
    low = min((min(weights) for _, _, weights in runs), default=0)
    high = max((max(weights) for _, _, weights in runs), default=0)
    if high - low < 1e-3:  # probabilities add up to 1 only nearly
        return None
    figure, (axes,) = new_figure(1)
    for colour, setting, weights in runs:
        if max(weights) - min(weights) < 1e-3:
            axes.axvline(weights[0], color=colour, label=setting)
        else:
            bins = np.linspace(low, high, 21)
            axes.hist(weights, bins, histtype="step", color=colour, label=setting, linewidth=1.5)
    axes.set(title="severity weights", xlabel="weight", ylabel="rows")
    return finished(figure)


def runs_of(evaluation):
    """[(colour, setting, RunRecord), ...]"""
    runs = []
    for i, setting in enumerate(evaluation.settings):
        runs += [(f"C{i}", setting.name, evaluation.runs[run]) for run in setting.runs]
    return runs


def new_figure(count):
    """A figure with `count` panels, two in a line."""
    across = min(2, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(10, 0.6 + 2.9 * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def finished(figure):
    """The figure with grids and one legend for all panels."""
    lines = {}
    for axes in figure.axes:
        axes.grid(axis="y", alpha=0.3)
        for line, label in zip(*axes.get_legend_handles_labels()):
            lines[label] = line
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=3, frameon=False)
    return figure
