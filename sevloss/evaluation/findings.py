"""From answers to findings: what models answered, stored and read; scores per row; means, intervals and comparisons of settings."""

import json
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from sevloss import InputError, severity
from sevloss.evaluation import compare, scores
from sevloss.inputs import hub
from sevloss.loss import severity_weights

# Runs of one setting may differ in these; the fingerprint of the data stands for the last three.
FREE_ARGUMENTS = ("seed", "out", "resume", "save_every", "device", "micro_tokens", "gradient_checkpointing", "merge",
                  "data", "columns", "classifier")


@dataclass
class Answers:
    """What one model made of the test rows. rows: [{row, complaint, reference, severity, probabilities, specialty, answer, finished,
    nll, tokens}], in the table's order; protocol: what must be the same for answers to be compared; run: as read_run_json gives it."""
    name: str
    protocol: dict
    rows: list
    path: Path
    run: dict = field(default_factory=dict)


def read_answers(path):
    """(head, rows) of an answers file: its first line says how it was made, each other one holds a row. ({}, []) where there is none."""
    records = _records(Path(path))
    head, rows = records[0] if records else {}, records[1:]
    if records and not (isinstance(head, dict) and isinstance(head.get("protocol"), dict) and "rows" in head["protocol"]
                        and "name" in head and all(isinstance(row, dict) and "row" in row for row in rows)):
        raise InputError(f"{path} is no answers file of evaluate.py, or has lost its first line: if so, remove it and call again")
    return head, list({row["row"]: row for row in rows}.values())  # two calls at a time may have written a row twice


def load_answers(path):
    head, rows = read_answers(path)
    if not head or len(rows) != head["protocol"]["rows"]:
        raise InputError(f"{path} is not finished: call evaluate.py with its run again")
    return Answers(head["name"], head["protocol"], sorted(rows, key=lambda row: row["row"]), Path(path), head.get("run", {}))


def _records(path):
    """The lines of a .jsonl file. What a stop left of the last line does not count. Not splitlines(): a text may hold other line breaks,
    like U+2028."""
    return _parsed(path, lambda whole: [json.loads(line) for line in whole.split(b"\n")[:-1] if line])


def _parsed(path, parse):
    try:
        return parse(path.read_bytes()) if path.is_file() else []
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; if it was written here, remove it and call again") from error


def check_same(answers):
    """Refuses to compare what was not made on the same rows, with the same references and decoding."""
    for other in answers[1:]:
        for key, value in answers[0].protocol.items():
            if key != "table" and other.protocol.get(key) != value:  # its name; the fingerprint stands for what is in it
                what = "rows or references" if key == "fingerprint" else key
                values = "" if key == "fingerprint" else f": {value} and {other.protocol.get(key)}"
                raise InputError(f"{answers[0].name} and {other.name} cannot be compared, they were evaluated with different "
                                 f"{what}{values}: evaluate both in one call")


def read_run_json(name):
    """run.json of a run, and which of its models `name` is: {..., "model": "last", "best" or "merged"}; {} for a plain checkpoint."""
    folder = Path(name).resolve()
    inside = folder.name in ("best", "merged") and not (folder / "run.json").is_file()
    run = folder.parent if inside else folder
    return hub.read_json(run / "run.json") | {"model": folder.name if inside else "last"} if (run / "run.json").is_file() else {}


def settings_of(answers):
    """{setting: [names of its runs]}: runs whose arguments differ in the seed alone are one setting. It is called what its runs' names
    have in common (plain-0, plain-1: plain), or where that does not tell settings apart, by the arguments in which they differ."""
    given, groups, seeds = {}, defaultdict(list), Counter()
    for a in answers:
        arguments = a.run.get("arguments", {})
        given[a.name] = {key: value for key, value in arguments.items() if key not in FREE_ARGUMENTS}
        given[a.name] |= {key: a.run.get(key) for key in ("model", "data_fingerprint")} if arguments else {}
        same, seed = json.dumps(given[a.name], sort_keys=True), arguments.get("seed")
        seeds[same, seed] += 1
        groups[same, seeds[same, seed]].append(a.name)  # the same seed again, or none, is a setting of its own
    groups = list(groups.values())

    def by(keys):
        return [", ".join(f"{key} {given[runs[0]].get(key)}" for key in keys) if given[runs[0]] else runs[0] for runs in groups]
    stems = [runs[0] if len(runs) == 1 else re.sub(r"[-_]*\d*$", "", os.path.commonprefix(runs)) for runs in groups]
    keys = [key for key in dict.fromkeys(key for g in given.values() for key in g)
            if len({json.dumps(g.get(key)) for g in given.values() if g}) > 1]
    for names in (stems, by([key for key in keys if key != "data_fingerprint"]), by(keys)):
        if len(set(names)) == len(names) and not any(name.endswith("/") or not name for name in names):
            return dict(zip(names, groups))
    return {", ".join(runs): runs for runs in groups}


def scores_of(answers, bertscore=None):
    """[Score, ...] of one model's answers; bertscore: (n,) F1 or None."""
    def column(key):
        return [row[key] for row in answers.rows]
    row_scores = [scores.Score("NLL", column("nll"), column("tokens"))]
    row_scores += [scores.Score("BERTScore F1", bertscore)] if bertscore is not None else []
    return row_scores + scores.answer_scores(column("complaint"), column("answer"), column("reference"), [not f for f in column("finished")])


def evaluate(answers, bertscores, notes):
    """Everything the report tells, as a dict that JSON can hold. answers: [Answers], all of the same rows; bertscores: {name: (n,) F1},
    maybe empty."""
    rows, names = answers[0].rows, [a.name for a in answers]
    settings = settings_of(answers)
    scores_by_run = {a.name: scores_of(a, bertscores.get(a.name)) for a in answers}
    known = [score.name for score in scores_by_run[names[0]]]
    probabilities = [row["probabilities"] for row in rows]
    groups = scores.row_groups([row["severity"] for row in rows], [p[2] for p in probabilities] if all(probabilities) else None)
    compared = [i for i, w in enumerate(groups.values()) if (w > 0).sum() >= compare.FEWEST_ROWS]  # and no specialties: they are too many
    specialties = sorted({row["specialty"] for row in rows if row["specialty"]})
    groups |= {f"specialty: {s}": np.array([float(row["specialty"] == s) for row in rows]) for s in specialties}
    weights = np.stack(list(groups.values()), axis=1)  # (n, g)

    values = {setting: np.stack([np.stack([score.values for score in scores_by_run[run]], axis=1) for run in runs])
              for setting, runs in settings.items()}  # each (seeds, n, k)
    counts = {setting: np.stack([score.counts for score in scores_by_run[runs[0]]], axis=1) for setting, runs in settings.items()}  # each (n, k)

    means, comparisons = [], []
    if len(settings) > 1 and not compared:
        notes.append(f"Differences are not tested: there are fewer than {compare.FEWEST_ROWS} rows")
    for setting, runs in settings.items():
        mean, low, high = compare.bootstrap_mean(values[setting].mean(0), counts[setting], weights)  # (g, k)
        each = np.array([[list(of.values()) for of in scores.summary(scores_by_run[run], groups).values()] for run in runs])  # (seeds, g, k)
        _, spread = compare.seed_spread(each)
        for g, group in enumerate(groups):
            for k, score in enumerate(known):
                numbers = dict(mean=mean[g, k], low=low[g, k], high=high[g, k])
                means.append(dict(setting=setting, score=score, group=group, **numbers, sd_seeds=spread[g, k]))
                if score == "NLL":
                    numbers = {key: scores.perplexity(nll) for key, nll in numbers.items()}
                    means.append(dict(setting=setting, score="perplexity", group=group, **numbers, sd_seeds=None))

    family = math.comb(len(settings), 2) * len(compared) * len(known)
    resamples = max(10_000, 100 * family)  # the least p-value is 2 / resamples, and Holm multiplies it by the size of the family
    for a, b in combinations(settings, 2) if compared else ():
        same_tokens = np.array_equal(counts[a], counts[b])
        if not same_tokens:
            notes.append(f"NLL of {a} and {b} is not compared: the references are not the same number of tokens for both")
        comparison = compare.compare_settings(values[a], values[b], counts[a], weights[:, compared], resamples=resamples)  # each (g, k)
        for g, group in enumerate(list(groups)[i] for i in compared):
            for k, score in enumerate(known):
                if score != "NLL" or same_tokens:
                    numbers = {key: of_all[g, k] for key, of_all in comparison._asdict().items()}
                    comparisons.append({"a": a, "b": b, "score": score, "group": group, **numbers})
    for c, p in zip(comparisons, compare.holm([c["p"] for c in comparisons])):
        c |= {"p_holm": p, "sentence": compare.sentence(c["a"], c["b"], c["score"], c["difference"], (c["low"], c["high"]), p, c["group"])}

    columns = {name: {score.name: score.values / np.maximum(score.counts, 1) for score in scores_by_run[name]} for name in names}
    return without_nan({
        "protocol": answers[0].protocol, "settings": [{"name": name, "runs": runs} for name, runs in settings.items()],
        "groups": {name: int((w > 0).sum()) for name, w in groups.items()},
        "score_names": {name: name for name in [known[0], "perplexity", *known[1:]]},
        "lower_is_better": list(scores.LOWER_IS_BETTER), "means": means, "comparisons": comparisons,
        "paper_table": paper_table(settings, means, {a.name: a.run for a in answers}), "notes": notes,
        "rows": [{"row": row["row"], "complaint": row["complaint"], "reference": row["reference"], "specialty": row["specialty"],
                  "severity": None if row["severity"] is None else severity.CLASSES[row["severity"]],
                  "p_critical": p[2] if p else None, "answers": {a.name: a.rows[i]["answer"] for a in answers},
                  "scores": {name: {score: float(v[i]) for score, v in columns[name].items()} for name in names}}
                 for i, (row, p) in enumerate(zip(rows, probabilities))],
        "runs": {a.name: run_records(a, probabilities) for a in answers},
    })


def paper_table(settings, means, runs):
    """(header, rows): mean BERTScore F1 in %, a checkpoint a row, a weighting a column, as the paper prints it; None without BERTScore.

    runs: {name: what read_run_json gives}. A setting whose cell is taken, say by another learning rate, has a row of its own."""
    columns = {"base": "base", "none": "CE", "mild": "mild", "strong": "strong", "balanced": "balanced"}
    cells = defaultdict(dict)
    for entry in means:
        if entry["score"] == "BERTScore F1" and entry["group"] == "all":
            setting = entry["setting"]
            first = settings[setting][0]
            arguments = runs[first].get("arguments", {"ckpt": first, "weighting": "base"})
            row, column = arguments["ckpt"], columns.get(arguments["weighting"], arguments["weighting"])
            spread = "" if np.isnan(entry["sd_seeds"]) else f" ± {100 * entry['sd_seeds']:.2f}"
            cells[f"{row} ({setting})" if column in cells[row] else row][column] = f"{100 * entry['mean']:.2f}{spread}"
    if not cells:
        return None
    shown = [*columns.values(), *sorted({c for row in cells.values() for c in row} - set(columns.values()))]
    return ["model", *shown], [[ckpt, *(row.get(column, "") for column in shown)] for ckpt, row in cells.items()]


def run_records(answers, probabilities):
    """Training curves of a run, as far as its folder is here, and the weights that its weighting gives the evaluated rows."""
    run, steps, validation = Path(answers.name).resolve(), [], []
    run = run if answers.run.get("model") == "last" else run.parent
    if answers.run and read_run_json(answers.name) == answers.run:
        steps, validation = _records(run / "metrics.jsonl"), _parsed(run / "validation.json", json.loads)
    coefficients = answers.run.get("coefficients")
    weights = severity_weights(torch.tensor(probabilities), coefficients).tolist() if coefficients and all(probabilities) else []
    return {"metrics": steps, "validation": validation, "weights": weights}


def without_nan(value):
    """`value` with None for every nan and infinity, which JSON does not have, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
