"""The report of evaluate.py: report.md and report.html with the same content, pictures, generations.jsonl and scores.jsonl."""

import base64
import json
import re
import textwrap
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sevloss.checkpoint import write_lines
from sevloss.classifier.report import markdown_table
from sevloss.evaluation.findings import without_nan

MAIN_SCORES = ("NLL", "BERTScore F1", "chrF", "urgent")  # the scores in pictures, by specialty, and by class without a fold
MOST_SENTENCES = 12  # more comparisons than that become a table
ROWS_IN_MARKDOWN, ROWS_IN_HTML = 10, 200


def write_evaluation(folder, evaluation):
    """Fills `folder` with the findings of evaluation.evaluate. A score that is nan becomes a dash, and null in the .jsonl files."""
    folder, evaluation = Path(folder), without_nan(evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    rows = evaluation["rows"]
    generations = [{key: row[key] for key in ("row", "severity", "complaint", "reference", "answers")} for row in rows]
    scores = [{"row": row["row"], "run": run, "severity": row["severity"], **values}
              for row in rows for run, values in row["scores"].items()]
    for name, records in (("generations.jsonl", generations), ("scores.jsonl", scores)):
        write_lines(folder / name, (json.dumps(record, ensure_ascii=False) for record in records))
    pictures = []
    for name, title, draw in (("scores.png", "Scores of all rows and by class, with 95% intervals", draw_scores),
                              ("training.png", "Training", draw_training),
                              ("weights.png", "Severity weights of the rows evaluated", draw_weights)):
        figure = draw(evaluation)
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            pictures.append(("picture", name, title))
    content = sections(evaluation, pictures)
    (folder / "report.md").write_text(markdown(content), encoding="utf-8")
    (folder / "report.html").write_text(page(content, folder), encoding="utf-8")


# --- content: what both files show ----------------------------------------------------------------------------------------

def sections(evaluation, pictures):
    """[(title, blocks)], empty ones left out. Blocks: ("text", str), ("list", [str]), ("table", header, rows), ("picture", file, title),
    ("answers", as answer_blocks makes them)."""
    main, groups, comparisons = main_scores(evaluation), list(evaluation["groups"]), evaluation["comparisons"]
    others = [key for key in evaluation["score_names"] if key not in main]
    specialties = [g for g in groups if g.startswith("specialty: ")]
    classes = [g for g in groups if g != "all" and g not in specialties]
    legend = "In brackets: 95% interval; none for few rows. ↓: lower is better."
    if any(m["sd_seeds"] is not None for m in evaluation["means"]):
        legend += " ±: standard deviation between runs that differ only in the seed."
    header, rows = evaluation["paper_table"] or ([], [])
    found = [
        ("Evaluation", [("text", protocol(evaluation))]),
        ("Scores", [("text", legend), score_table(evaluation, main + others, ["all"])]),
        ("Scores by class", [score_table(evaluation, main, classes), score_table(evaluation, others, classes)]),
        ("Scores by specialty", [score_table(evaluation, main, specialties)]),
        ("Comparisons", [("text", "Differences and their 95% intervals. A dash: too few rows." if comparisons else ""),
                         comparison_block(evaluation, [c for c in comparisons if c["group"] == "all"]),
                         comparison_block(evaluation, [c for c in comparisons if c["group"] != "all"])]),
        ("The paper's table", [("text", "Mean BERTScore F1 in %."), ("table", header, rows)] if rows else []),
        ("Notes", [("list", evaluation["notes"])]),
        ("Pictures", pictures),
        ("Answers", answer_blocks(evaluation)),
    ]
    found = [(title, [block for block in blocks if block[-1]]) for title, blocks in found]
    return [(title, blocks) for title, blocks in found if blocks]


def protocol(evaluation):
    """What was evaluated and how, in a few sentences."""
    facts = dict(evaluation["protocol"])
    table, rows, most, temperature, top_p, seed = map(facts.pop, ("table", "rows", "max_new_tokens", "temperature", "top_p", "seed"))
    how = f"sampled at temperature {temperature:g}, top-p {top_p:g}, seed {seed}" if temperature else "the likeliest token each time"
    answered = any(row["answers"] for row in evaluation["rows"])
    answers = f"Answers have at most {most} tokens, {how}." if answered else "No answers were generated."
    settings = [s["name"] if s["runs"] == [s["name"]] else f"{s['name']} ({', '.join(s['runs'])})" for s in evaluation["settings"]]
    others = [f"{key[:1].upper()}{key[1:].replace('_', ' ')}: {value}." for key, value in facts.items() if key != "fingerprint"]
    return " ".join([f"{rows:,} test rows of {table}.", answers, *others, f"Evaluated: {'; '.join(settings)}."])


def score_table(evaluation, scores, groups):
    """A line per score and group that has a mean, a column per setting: mean [95% interval] ± standard deviation between seeds."""
    settings = [s["name"] for s in evaluation["settings"]]
    lead, lines = ["score"] if groups == ["all"] else ["score", "group", "rows"], []
    for score in scores:
        digits = decimals([m[key] for m in evaluation["means"] if m["score"] == score for key in ("mean", "low", "high")])
        for group in groups:
            of = {m["setting"]: m for m in evaluation["means"] if (m["score"], m["group"]) == (score, group) and m["mean"] is not None}
            if of:
                cells = [score_name(evaluation, score), group.removeprefix("specialty: "), f"{evaluation['groups'][group]:,}"]
                lines.append(cells[:len(lead)] + [mean_cell(of.get(setting), digits) for setting in settings])
    return "table", [*lead, *settings], lines


def mean_cell(m, digits):
    if m is None:
        return "–"
    interval = "" if None in (m["low"], m["high"]) else f" [{m['low']:,.{digits}f}, {m['high']:,.{digits}f}]"
    return f"{m['mean']:,.{digits}f}{interval}" + ("" if m["sd_seeds"] is None else f" ± {m['sd_seeds']:,.{digits}f}")


def comparison_block(evaluation, comparisons):
    if len(comparisons) <= MOST_SENTENCES:
        return "list", [c["sentence"] for c in comparisons]
    lines = []
    for c in comparisons:
        numbers = ["–" if c[key] is None else f"{c[key]:+.3g}" for key in ("difference", "low", "high")]
        chances = ["–" if c[key] is None else "<0.001" if c[key] < 0.001 else f"{c[key]:.3f}" for key in ("p", "p_holm")]
        lines.append([f"{c['b']} − {c['a']}", score_name(evaluation, c["score"]), c["group"], *numbers, *chances])
    return "table", ["settings", "score", "group", "difference", "low", "high", "p", "p (Holm)"], lines


def answer_blocks(evaluation):
    """A sentence, and the rows to show as (severity, facts, [(heading, text, scores of the text)])."""
    rows, settings, names = evaluation["rows"], evaluation["settings"], evaluation["score_names"]
    sentence, gaps, by = "", [None] * len(rows), None
    for by in ("BERTScore F1", "chrF", "NLL") if len(settings) > 1 else ():
        gaps = [gap(row, *settings[:2], by) for row in rows]
        if any(g is not None for g in gaps):
            sentence = f" The largest differences in {names[by]} between {settings[0]['name']} and {settings[1]['name']} come first."
            break
    values = {key: [s[key] for row in rows for s in row["scores"].values() if s.get(key) is not None] for key in names}
    digits, flags = {key: decimals(v) for key, v in values.items()}, [key for key, v in values.items() if set(v) <= {0, 1}]
    answers = []
    for i in sorted(range(len(rows)), key=lambda i: 1 if gaps[i] is None else -abs(gaps[i]))[:ROWS_IN_HTML]:
        row, texts = rows[i], [("complaint", rows[i]["complaint"], ""), ("reference", rows[i]["reference"], "")]
        for setting, run in ((s["name"], run) for s in settings for run in s["runs"]):
            scores = row["scores"].get(run, {})
            numbers = [f"{names[key]} {scores[key]:,.{digits[key]}f}" for key in names if key not in flags and scores.get(key) is not None]
            heading = run if run == setting else f"{setting}: {run}"
            scored = " · ".join(numbers + [names[key] for key in flags if scores.get(key)])
            texts.append((heading, row["answers"].get(run, "(not answered)"), scored))
        facts = [f"row {row['row']}", row["specialty"], "" if row["p_critical"] is None else f"p(critical) {row['p_critical']:.2f}",
                 "" if gaps[i] is None else f"difference in {names[by]} {gaps[i]:+.{digits[by]}f}"]
        answers.append((row["severity"] or "severity unknown", " · ".join(filter(None, facts)), texts))
    where = (f"Of {len(rows):,} rows, report.html shows {len(answers)} and report.md {len(answers[:ROWS_IN_MARKDOWN])}; "
             "generations.jsonl and scores.jsonl hold all.")
    return [("text", where + sentence), ("answers", answers)] if rows else []


def gap(row, a, b, score):
    """Score of setting b minus that of setting a, each the mean over its runs; None where one has none."""
    sides = [[row["scores"][run][score] for run in side["runs"] if row["scores"].get(run, {}).get(score) is not None] for side in (b, a)]
    return sum(sides[0]) / len(sides[0]) - sum(sides[1]) / len(sides[1]) if all(sides) else None


def main_scores(evaluation):
    there = [key for key in evaluation["score_names"] if any(m["score"] == key and m["mean"] is not None for m in evaluation["means"])]
    return [key for key in MAIN_SCORES if key in there] or there[:4]


def score_name(evaluation, score):
    return evaluation["score_names"][score] + " ↓" * (score in evaluation["lower_is_better"])


def decimals(values):
    """How many, for numbers that stand together."""
    values = [abs(v) for v in values if v is not None]
    if all(v == int(v) for v in values):
        return 0
    return 4 if max(values) < 10 else 2 if max(values) < 1000 else 1


# --- report.md ------------------------------------------------------------------------------------------------------------

def markdown(content):
    lines = []
    for i, (title, blocks) in enumerate(content):
        lines.append(f"{'##' if i else '#'} {title}")
        for block in blocks:
            match block:
                case "text", text:
                    lines.append(no_tags(text))
                case "list", items:
                    lines.append("\n".join(f"- {no_tags(item)}" for item in items))
                case "table", header, rows:
                    lines.append(folded(rows, f"\n\n{no_tags(markdown_table(header, rows))}\n\n").strip())
                case "picture", name, title:
                    lines.append(f"![{title}]({name})")
                case "answers", answers:
                    for severity, facts, texts in answers[:ROWS_IN_MARKDOWN]:
                        lines.append(f"### {severity} · {no_tags(facts)}")
                        for heading, text, scores in texts:
                            lines += [f"**{no_tags(heading)}** {scores}".rstrip(), arabic(text)]
    return "\n\n".join(lines) + "\n"


def folded(rows, table):
    return table if len(rows) <= 24 else f"<details><summary>table of {len(rows)} lines</summary>{table}</details>"


def no_tags(text):
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)


def arabic(text):
    """A text as HTML on one line, in which Markdown changes nothing."""
    return f'<div dir="rtl" lang="ar">{"<br>".join(map(escape, text.strip().splitlines())) or "(empty)"}</div>'


# --- report.html: one file without scripts; it loads nothing --------------------------------------------------------------

HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Evaluation</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --box: #fff; --text: #1d2430; --soft: #5b6573; --line: #d9dee5;
        --critical: #b3261e; --neutral: #8a5a00; --non-critical: #1f7a3f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --box: #1c2027; --text: #e4e8ee; --soft: #a0a9b6; --line: #343b46;
          --critical: #ff8a80; --neutral: #f0b95b; --non-critical: #7fd69b; }
  img { filter: invert(.89) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; background: var(--page); color: var(--text);
       font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: break-word; }
h1 { margin-bottom: .3rem; } h2 { margin: 2.2rem 0 .6rem; } h3 { margin: 0; font-size: .95rem; } h4 { margin: 0 0 .25rem; }
p, ul { max-width: 52rem; } ul { padding-left: 1.2rem; } a { color: inherit; } figure { margin: 0 0 1.5rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; } summary { cursor: pointer; padding: .5rem 0; }
nav, figcaption, summary, .scores, h4 { font-size: .875rem; color: var(--soft); overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-width: max-content; margin: .7rem 0; border: 1px solid var(--line); border-radius: .5rem;
        background: var(--box); }
img { display: block; width: 62rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); } tr:last-child td { border-bottom: 0; } .number { text-align: right; }
article { border: 1px solid var(--line); border-radius: .6rem; background: var(--box); padding: .8rem 1rem 1rem; margin: 1rem 0; }
.label { border: 1px solid; border-radius: 1rem; padding: .05rem .6rem; margin-right: .4rem; font-size: .8rem; color: var(--soft); }
.critical { color: var(--critical); } .neutral { color: var(--neutral); } .non-critical { color: var(--non-critical); }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem 1.6rem; margin-top: .7rem; }
.scores { margin: .4rem 0 0; line-height: 1.4; }
[lang=ar] { font: 1.08rem/1.85 "Noto Naskh Arabic", "Noto Sans Arabic", "Geeza Pro", "Segoe UI", Tahoma, Arial, sans-serif;
            overflow-wrap: anywhere; }
@media (max-width: 40rem) { th, td { padding: .35rem .45rem; } table { font-size: .8rem; } td:not(.number) { white-space: normal; } }
</style>
"""


def page(content, folder):
    """The whole page. Pictures are read from `folder` and embedded."""
    parts = [HEAD]
    for i, (title, blocks) in enumerate(content):
        tag = "h2" if i else "h1"
        parts += [f'<{tag} id="s{i}">{escape(title)}</{tag}>', *(html_block(block, folder) for block in blocks)]
        if i == 0:
            parts.append("<nav>" + "".join(f'<a href="#s{j}">{escape(t)}</a>' for j, (t, _) in enumerate(content) if j) + "</nav>")
    return "\n".join(parts) + "\n</html>\n"


def html_block(block, folder):
    match block:
        case "text", text:
            return f"<p>{escape(text)}</p>"
        case "list", items:
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case "table", header, rows:
            sides = ["number" if all(re.match(r"[-+−<]?\d|–?$", row[i]) for row in rows) else "" for i in range(len(header))]
            lines = ["".join(f'<{tag} class="{side}">{escape(cell)}</{tag}>' for cell, side in zip(row, sides))
                     for tag, row in [("th", header), *(("td", row) for row in rows)]]
            return folded(rows, '<div class="wide"><table><tr>' + "</tr>\n<tr>".join(lines) + "</tr></table></div>")
        case "picture", name, title:
            data = base64.b64encode((folder / name).read_bytes()).decode()
            return (f'<figure><div class="wide"><img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'
                    f"<figcaption>{escape(title)}</figcaption></figure>")
        case "answers", answers:
            articles = [article(*answer) for answer in answers]
            more = f"<details><summary>{len(articles) - 20} more</summary>" + "\n".join(articles[20:]) + "</details>"
            return "\n".join(articles[:20]) + (more if len(articles) > 20 else "")


def article(severity, facts, texts):
    columns = [f'<div><h4>{escape(heading)}</h4>{arabic(text)}<p class="scores">{escape(scores)}</p></div>'
               for heading, text, scores in texts]
    return (f'<article><h3><span class="label {severity}">{severity}</span>{escape(facts)}</h3>'
            f'<div class="texts">{"".join(columns)}</div></article>')


# --- pictures: a figure, or None where there is nothing to draw. No Arabic in them: matplotlib does not join its letters --

def draw_scores(evaluation):
    """A panel per main score: means and intervals of all rows, by class and weighted; a colour per setting."""
    settings, scores = [s["name"] for s in evaluation["settings"]], main_scores(evaluation)
    groups = [g for g in evaluation["groups"] if not g.startswith("specialty: ")]
    means = [m for m in evaluation["means"] if m["group"] in groups and m["mean"] is not None]

    def draw(axes, score):
        for i, setting in enumerate(settings):
            found = [m for m in means if (m["setting"], m["score"]) == (setting, score)]
            places = [groups.index(m["group"]) + (i - (len(settings) - 1) / 2) * 0.6 / len(settings) for m in found]
            axes.plot(places, [m["mean"] for m in found], "o", color=f"C{i}", label=setting)
            for x, m in zip(places, found):
                if None not in (m["low"], m["high"]):
                    axes.vlines(x, m["low"], m["high"], color=f"C{i}", linewidth=2)
        axes.set_xticks(range(len(groups)), [textwrap.fill(g, 13) for g in groups])
        axes.set(title=score_name(evaluation, score), xlim=(-0.5, len(groups) - 0.5))
    return panels(scores if len(groups) * len(settings) > 1 else [], draw)  # one point is no picture


def draw_training(evaluation):
    """The training loss, a mean over the last steps, and the NLL on the validation rows; a line per run, a colour per setting."""
    training, validation = "training loss (with severity weights)", "validation NLL per token (no weights)"
    curves = {training: [], validation: []}
    for i, setting, run in runs_of(evaluation):
        if run["metrics"]:
            steps, losses = np.array([(m["step"], m["loss"]) for m in run["metrics"]], dtype=float).T
            window = max(1, len(losses) // 30)
            curves[training].append((i, setting, steps[window - 1:], np.convolve(losses, np.full(window, 1 / window), "valid")))
        if run["validation"]:
            curves[validation].append((i, setting, *np.array(run["validation"], dtype=float).T))

    def draw(axes, title):
        for i, setting, steps, values in curves[title]:
            axes.plot(steps, values, color=f"C{i}", label=setting, linewidth=1.5, marker="o" if len(steps) <= 20 else None, markersize=4)
        axes.set(title=title, xlabel="optimizer step")
    return panels([title for title, lines in curves.items() if lines], draw)


def draw_weights(evaluation):
    """Histogram of the weights of each run; a vertical line where every row has the same."""
    runs = [(i, setting, run["weights"]) for i, setting, run in runs_of(evaluation) if run["weights"]]
    low, high = (best((best(w) for *_, w in runs), default=0) for best in (min, max))

    def draw(axes, title):
        for i, setting, weights in runs:
            if max(weights) - min(weights) < 1e-3:  # probabilities add up to 1 only nearly
                axes.axvline(weights[0], color=f"C{i}", label=setting)
            else:
                axes.hist(weights, np.linspace(low, high, 21), histtype="step", color=f"C{i}", label=setting, linewidth=1.5)
        axes.set(title=title, xlabel="weight", ylabel="rows")
    return panels(["severity weights"] if high - low > 1e-3 else [], draw)


def runs_of(evaluation):
    return [(i, s["name"], evaluation["runs"][run]) for i, s in enumerate(evaluation["settings"]) for run in s["runs"]]


def panels(titles, draw):
    """A figure with a panel per title, drawn by draw(axes, title), and one legend; None without titles."""
    if not titles:
        return None
    across = min(2, len(titles))
    down = -(-len(titles) // across)
    figure, legend = Figure(figsize=(10, 0.6 + 2.9 * down), layout="constrained"), {}
    for i, title in enumerate(titles):
        axes = figure.add_subplot(down, across, i + 1)
        draw(axes, title)
        axes.grid(axis="y", alpha=0.3)
        legend |= {label: line for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=min(3, len(legend)), frameon=False)
    return figure
