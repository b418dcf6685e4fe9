"""From answers to findings: what models answered, stored and read; scores per row; means, intervals and comparisons of settings."""

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from sevloss import InputError, compare, hub, metrics, severity
from sevloss.loss import severity_weights

SEED_ARGUMENTS = ("seed", "out", "resume", "save_every", "device", "dtype", "micro_tokens")  # runs of one setting may differ in these


@dataclass
class Answers:
    """What one model made of the test rows. rows: [{row, complaint, reference, severity, probabilities, specialty, answer, finished,
    nll, tokens}], in the table's order; protocol: what must be the same for answers to be compared."""
    name: str
    protocol: dict
    rows: list
    path: Path


def read_answers(path):
    """(head, rows) of an answers file: its first line says how it was made, each other one holds a row. A last line that was cut
    off by a stop does not count."""
    # bytes: a stop may cut a letter in half, and splitlines() would also cut at U+2028, which JSON leaves inside a line
    lines = Path(path).read_bytes().split(b"\n")[:-1] if Path(path).is_file() else []
    try:
        records = [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} is no answers file: {error}") from error
    head = records[0] if records else {}
    if records and not (isinstance(head, dict) and isinstance(head.get("protocol"), dict) and "rows" in head["protocol"]):
        raise InputError(f"{path} is no answers file of evaluate.py")
    return (records[0], records[1:]) if records else ({}, [])


def load_answers(path):
    head, rows = read_answers(path)
    if not head or len(rows) != head["protocol"]["rows"]:
        raise InputError(f"{path} is not finished: call evaluate.py with its run again")
    return Answers(head["name"], head["protocol"], sorted(rows, key=lambda row: row["row"]), Path(path))


def check_same(answers):
    """Refuses to compare what was not made on the same rows, with the same references and decoding."""
    for other in answers[1:]:
        for key, value in answers[0].protocol.items():
            if other.protocol.get(key) != value:
                what = "rows or references" if key == "fingerprint" else key
                values = "" if key == "fingerprint" else f": {value} and {other.protocol.get(key)}"
                raise InputError(f"{answers[0].name} and {other.name} cannot be compared, they were evaluated with different "
                                 f"{what}{values}: evaluate both in one call")


def run_facts(name):
    """run.json of a run or of its best/; {} for a plain checkpoint."""
    for folder in (Path(name), Path(name).resolve().parent):
        if (folder / "run.json").is_file():
            return hub.read_json(folder / "run.json")
    return {}


def settings_of(names):
    """{setting: [runs]}: runs whose arguments differ in the seed alone are one setting. It is called what its runs' names have in common
    (plain-0, plain-1: plain), or where that does not tell settings apart, by the arguments in which they differ."""
    arguments = {}
    for name in names:
        facts = run_facts(name)
        given = {key: value for key, value in facts.get("arguments", {}).items() if key not in SEED_ARGUMENTS}
        part = "" if (Path(name) / "run.json").is_file() else Path(name).name  # best/ and merged/ are no other seeds of their run
        arguments[name] = given | {"data": facts["data_fingerprint"], "part": part} if given else {"ckpt": name}
    groups = defaultdict(list)
    for name in names:
        groups[json.dumps(arguments[name], sort_keys=True)].append(name)
    stems = [runs[0] if len(runs) == 1 else os.path.commonprefix(runs).rstrip("-_0123456789") for runs in groups.values()]
    if len(set(stems)) == len(stems) and not any(stem.endswith("/") or not stem for stem in stems):
        return dict(zip(stems, groups.values()))
    keys = sorted({key for a in arguments.values() for key in a})
    differing = [key for key in keys if len({json.dumps(a.get(key)) for a in arguments.values()}) > 1] or ["ckpt"]
    return {", ".join(f"{key} {arguments[runs[0]].get(key)}" for key in differing): runs for runs in groups.values()}


def scores_of(answers, bertscore=None):
    """[Score, ...] of one model's answers; bertscore: (n,) F1 or None."""
    def column(key):
        return [row[key] for row in answers.rows]
    scores = [metrics.Score("NLL", column("nll"), column("tokens"))]
    scores += [metrics.Score("BERTScore F1", bertscore)] if bertscore is not None else []
    return scores + metrics.answer_scores(column("complaint"), column("answer"), column("reference"), [not f for f in column("finished")])


def evaluate(answers, bertscores, notes):
    """Everything the report tells, as a dict. answers: [Answers], all of the same rows; bertscores: {name: (n,) F1}, maybe empty."""
    rows, names = answers[0].rows, [a.name for a in answers]
    settings = settings_of(names)
    scores = {a.name: scores_of(a, bertscores.get(a.name)) for a in answers}
    known = [score.name for score in scores[names[0]]]
    probabilities = [row["probabilities"] for row in rows]
    groups = metrics.row_groups([row["severity"] for row in rows], [p[2] for p in probabilities] if all(probabilities) else None)
    compared = len(groups)  # specialties have too few rows for comparisons
    specialties = sorted({row["specialty"] for row in rows if row["specialty"]})
    groups |= {f"specialty: {s}": np.array([float(row["specialty"] == s) for row in rows]) for s in specialties}
    weights = np.stack(list(groups.values()), axis=1)  # (n, g)

    def values(setting):  # (seeds, n, k)
        return np.stack([np.stack([score.values for score in scores[run]], axis=1) for run in settings[setting]])

    def counts(setting):  # (n, k)
        return np.stack([score.counts for score in scores[settings[setting][0]]], axis=1)

    means, comparisons = [], []
    for setting, runs in settings.items():
        mean, low, high = compare.bootstrap_mean(values(setting).mean(0), counts(setting), weights)  # (g, k)
        each = np.array([[[score.mean(w) for score in scores[run]] for w in groups.values()] for run in runs])  # (seeds, g, k)
        _, spread = compare.seed_spread(each)
        for g, group in enumerate(groups):
            for k, score in enumerate(known):
                entry = dict(setting=setting, score=score, group=group, mean=mean[g, k], low=low[g, k], high=high[g, k],
                             sd_seeds=np.broadcast_to(spread, mean.shape)[g, k])
                means.append({key: _plain(value) for key, value in entry.items()})
                if score == "NLL":
                    means.append({key: math.exp(min(value, 700)) if isinstance(value, float) and key != "sd_seeds" else value
                                  for key, value in means[-1].items()} | {"score": "perplexity", "sd_seeds": None})

    for a, b in combinations(settings, 2):
        same_tokens = np.array_equal(counts(a), counts(b))
        if not same_tokens:
            notes.append(f"NLL of {a} and {b} is not compared: their tokenizers cut the references into different tokens")
        comparison = compare.compare_settings(values(a), values(b), counts(a), weights[:, :compared])  # each (g, k)
        for g, group in enumerate(list(groups)[:compared]):
            for k, score in enumerate(known):
                if score != "NLL" or same_tokens:
                    entry = {key: _plain(getattr(comparison, key)[g, k]) for key in comparison._fields}
                    comparisons.append({"a": a, "b": b, "score": score, "group": group, **entry})
    adjusted = compare.holm([math.nan if c["p"] is None else c["p"] for c in comparisons])
    for entry, p in zip(comparisons, adjusted):
        numbers = [math.nan if entry[key] is None else entry[key] for key in ("difference", "low", "high")]
        entry |= {"p_holm": _plain(p), "sentence": compare.sentence(entry["a"], entry["b"], entry["score"], numbers[0], numbers[1:], p,
                                                                    group=entry["group"])}

    columns = {name: {score.name: score.values / np.maximum(score.counts, 1) for score in scores[name]} for name in names}
    return {
        "protocol": answers[0].protocol, "settings": [{"name": name, "runs": runs} for name, runs in settings.items()],
        "groups": {name: int((w > 0).sum()) for name, w in groups.items()},
        "score_names": {name: name for name in [known[0], "perplexity", *known[1:]]},
        "lower_is_better": list(metrics.LOWER_IS_BETTER), "means": means, "comparisons": comparisons,
        "paper_table": paper_table(settings, means), "notes": notes,
        "rows": [{"row": row["row"], "complaint": row["complaint"], "reference": row["reference"], "specialty": row["specialty"],
                  "severity": None if row["severity"] is None else severity.CLASSES[row["severity"]],
                  "p_critical": p[2] if p else None, "answers": {a.name: a.rows[i]["answer"] for a in answers},
                  "scores": {name: {score: float(v[i]) for score, v in columns[name].items()} for name in names}}
                 for i, (row, p) in enumerate(zip(rows, probabilities))],
        "runs": {name: run_records(name, probabilities) for name in names},
    }


def paper_table(settings, means):
    """(header, rows): mean BERTScore F1 in %, a checkpoint a row, a weighting a column, as the paper prints it; None without BERTScore."""
    columns = {"base": "base", "none": "CE", "mild": "mild", "strong": "strong", "balanced": "balanced"}
    cells = defaultdict(dict)
    for entry in means:
        if entry["score"] == "BERTScore F1" and entry["group"] == "all":
            facts = run_facts(settings[entry["setting"]][0]).get("arguments")
            ckpt, column = (facts["ckpt"], facts["weighting"]) if facts else (settings[entry["setting"]][0], "base")
            spread = "" if entry["sd_seeds"] is None else f" ± {100 * entry['sd_seeds']:.2f}"
            cells[ckpt][columns.get(column, column)] = f"{100 * entry['mean']:.2f}{spread}"
    if not cells:
        return None
    shown = [*columns.values(), *sorted({c for row in cells.values() for c in row} - set(columns.values()))]
    return ["model", *shown], [[ckpt, *(row.get(column, "") for column in shown)] for ckpt, row in cells.items()]


def run_records(name, probabilities):
    """Training curves of a run, and the weights that its weighting gives the evaluated rows; empty lists for a plain checkpoint."""
    facts, folder = run_facts(name), Path(name)
    folder = folder if (folder / "run.json").is_file() else folder.parent
    steps = [json.loads(line) for line in _lines(folder / "metrics.jsonl")] if facts else []
    validation = json.loads("\n".join(_lines(folder / "validation.json")) or "[]") if facts else []
    coefficients = facts.get("coefficients")
    weights = severity_weights(torch.tensor(probabilities), coefficients).tolist() if coefficients and all(probabilities) else []
    return {"metrics": steps, "validation": validation, "weights": weights}


def _lines(path):
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _plain(value):
    """A float, or None for nan: what JSON knows."""
    return value if isinstance(value, str) else None if np.isnan(value) else float(value)
