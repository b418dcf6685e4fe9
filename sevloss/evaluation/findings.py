"""From answers to findings: what models answered, stored and read; means, intervals and comparisons of
settings."""

import json
import math
import os
import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from sevloss import InputError
from sevloss.evaluation import compare, scores
from sevloss.inputs import hub
from sevloss.loss import severity_weights

# Runs of one setting may differ in these; the fingerprint of the data stands for the last three.
FREE_ARGUMENTS = ("seed", "out", "resume", "save_every", "device", "micro_tokens", "gradient_checkpointing",
                  "compile", "merge", "data", "columns", "classifier")


# --- answers, as they are stored ----------------------------------------------------------------------------

@dataclass
class Answer:
    """What one model made of one test row."""
    row: int  # of the table
    complaint: str
    reference: str
    severity: int | None  # index in severity.CLASSES
    probabilities: list | None  # of the three classes
    specialty: str
    answer: str
    finished: bool  # it came to its end within the most tokens allowed
    nll: float  # of the reference and EOS: nats, summed over `tokens` tokens
    tokens: int


@dataclass
class Answers:
    """What one model made of all test rows. protocol: what must be the same for answers to be compared; run:
    as read_run_json gives it."""
    name: str
    protocol: dict
    rows: list[Answer]  # in the table's order
    path: Path
    run: dict = field(default_factory=dict)


def read_answers(path):
    """Answers, maybe of a part of the rows; None where there are none yet. The file's first line says how it
    was made, each other one is a row."""
    records = _read_lines(path)
    if not records:
        return None
    try:
        by_row = {record["row"]: Answer(**record) for record in records[1:]}  # one may be there twice
        rows = sorted(by_row.values(), key=lambda row: row.row)
        return Answers(**records[0], rows=rows, path=Path(path))
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} is no answers file of evaluate.py, or has lost its first line: if so, "
                         "remove it and call again") from error


def load_answers(path):
    """The answers to all rows."""
    answers = read_answers(path)
    if answers is None or len(answers.rows) != answers.protocol.get("rows"):
        raise InputError(f"{path} is not finished: call evaluate.py with its run again")
    return answers


def check_same(protocols):
    """{name: protocol}. Refuses to compare what was not made on the same rows, with the same references and
    decoding."""
    (first, expected), *others = protocols.items()
    for name, protocol in others:
        for key, value in expected.items():
            found = protocol.get(key)
            if found == value or key == "table":  # the table's name: the fingerprint stands for what is in it
                continue
            what = "rows or references" if key == "fingerprint" else f"{key}: {value} and {found}"
            raise InputError(f"{first} and {name} cannot be compared, they were evaluated with different "
                             f"{what}: evaluate both in one call")


def run_folder(name):
    """The run that `name` is, or whose merged model it is; None for a plain checkpoint."""
    folder = Path(name).resolve()
    if folder.name == "merged" and not (folder / "run.json").is_file():
        folder = folder.parent
    return folder if (folder / "run.json").is_file() else None


def read_run_json(name):
    """run.json of the run that `name` is, or whose merged model it is; {} for a plain checkpoint."""
    folder = run_folder(name)
    return hub.read_json(folder / "run.json") if folder else {}


@contextmanager
def _reading(path):
    try:
        yield
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; if it was written here, remove it and "
                         "call again") from error


def _read_lines(path):
    """The lines of a .jsonl file, without what a stop left of the last one. Not splitlines(): a text may hold
    other line breaks, like U+2028."""
    path = Path(path)
    if not path.is_file():
        return []
    with _reading(path):
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


# --- settings -----------------------------------------------------------------------------------------------

@dataclass
class Setting:
    """Runs whose arguments differ in the seed alone."""
    name: str
    runs: list[str]


def settings_of(answers):
    """[Setting, ...] of the runs."""
    arguments = {}  # run -> what must be the same within a setting
    groups = defaultdict(list)
    repeats = Counter()
    for a in answers:
        given = a.run.get("arguments", {})
        arguments[a.name] = {key: value for key, value in given.items() if key not in FREE_ARGUMENTS}
        if given:
            arguments[a.name]["data_fingerprint"] = a.run.get("data_fingerprint")
        same = json.dumps(arguments[a.name], sort_keys=True)
        repeats[same, given.get("seed")] += 1  # the same seed again, or none, is a setting of its own
        groups[same, repeats[same, given.get("seed")]].append(a.name)
    groups = list(groups.values())
    return [Setting(name, runs) for name, runs in zip(_setting_names(groups, arguments), groups)]


def _setting_names(groups, arguments):
    """What the names of the runs have in common (plain-0, plain-1: plain); where that does not tell settings
    apart, the arguments in which they differ; else all names. groups: lists of runs."""
    stems = []
    for runs in groups:
        stem = re.sub(r"[-_]*\d*$", "", os.path.commonprefix(runs))
        stems.append(runs[0] if len(runs) == 1 else stem)

    given = [of_run for of_run in arguments.values() if of_run]  # a plain checkpoint has none
    keys = dict.fromkeys(key for of_run in given for key in of_run)
    differing = [key for key in keys if len({json.dumps(of_run.get(key)) for of_run in given}) > 1]

    def by_arguments(keys):
        names = []
        for runs in groups:
            of_run = arguments[runs[0]]
            names.append(", ".join(f"{key} {of_run.get(key)}" for key in keys) if of_run else runs[0])
        return names

    readable = [key for key in differing if key != "data_fingerprint"]
    for names in (stems, by_arguments(readable), by_arguments(differing)):
        if len(set(names)) == len(names) and all(name and not name.endswith("/") for name in names):
            return names
    return [", ".join(runs) for runs in groups]


# --- findings -----------------------------------------------------------------------------------------------
# In numbers nan stands for what there is none of, like an interval of few rows.

@dataclass
class Mean:
    setting: str
    score: str
    group: str
    mean: float  # over the setting's runs
    low: float  # 95% interval
    high: float
    sd_seeds: float  # standard deviation between the setting's runs


@dataclass
class Difference:
    """Setting b minus setting a."""
    a: str
    b: str
    score: str
    group: str
    difference: float
    low: float  # 95% interval
    high: float
    p: float
    p_holm: float = math.nan  # corrected for all comparisons
    sentence: str = ""


@dataclass
class RunRecord:
    """What a run's folder tells, as far as it is here."""
    metrics: list  # lines of metrics.jsonl
    validation: list  # [step, NLL]
    weights: list  # that its weighting gives the evaluated rows


@dataclass
class Evaluation:
    """All that is printed and reported."""
    protocol: dict
    settings: list[Setting]
    groups: dict  # group -> number of rows
    score_names: list
    means: dict  # (setting, score, group) -> Mean
    comparisons: list[Difference]
    paper_table: tuple | None  # (header, rows)
    notes: list
    runs: dict  # run -> RunRecord
    answers: list[Answers]
    row_scores: dict  # run -> {score: (n,)}

    def to_json(self):
        """What evaluation.json holds: all but what is said of each row, which is in .jsonl files."""
        values = asdict(replace(self, answers=[], row_scores={}))
        del values["answers"], values["row_scores"]
        values["means"] = list(values["means"].values())
        values["lower_is_better"] = scores.LOWER_IS_BETTER
        return without_nan(values)


def evaluate(answers, bertscores, notes):
    """[Answers] of the same rows -> Evaluation. bertscores: {name: (n,) F1}, maybe empty; notes: sentences
    for the report, to which more are added."""
    rows = answers[0].rows
    row_scores = {a.name: scores_of(a, bertscores.get(a.name)) for a in answers}
    score_names = [score.name for score in row_scores[answers[0].name]]

    # Groups of rows; specialties are not compared, they are too many
    probabilities = [row.probabilities for row in rows]
    if not all(probabilities):
        probabilities = None
    critical = [p[2] for p in probabilities] if probabilities else None
    groups = scores.row_groups([row.severity for row in rows], critical)
    compared = {name: w for name, w in groups.items() if (w > 0).sum() >= compare.FEWEST_ROWS}
    for specialty in sorted({row.specialty for row in rows if row.specialty}):
        groups[f"specialty: {specialty}"] = np.array([float(row.specialty == specialty) for row in rows])

    # Settings: the values of each of their runs, and the counts, which runs of one setting share
    settings = settings_of(answers)
    values, counts = {}, {}
    for setting in settings:
        of_runs = [np.stack([score.values for score in row_scores[run]], axis=1) for run in setting.runs]
        values[setting.name] = np.stack(of_runs)  # (seeds, n, k)
        first = row_scores[setting.runs[0]]
        counts[setting.name] = np.stack([score.counts for score in first], axis=1)  # (n, k)

    # Means and comparisons
    means = {}
    for name in values:
        for m in means_of(name, values[name], counts[name], score_names, groups):
            means[name, m.score, m.group] = m
    comparisons = []
    if compared:
        comparisons = compare_all(values, counts, score_names, compared, notes)
    elif len(settings) > 1:
        notes.append(f"Differences are not tested: there are fewer than {compare.FEWEST_ROWS} rows")

    columns = {}
    for run, of_run in row_scores.items():
        columns[run] = {score.name: score.values / np.maximum(score.counts, 1) for score in of_run}
    return Evaluation(
        protocol=answers[0].protocol,
        settings=settings,
        groups={name: int((w > 0).sum()) for name, w in groups.items()},
        score_names=[score_names[0], "perplexity", *score_names[1:]],
        means=means,
        comparisons=comparisons,
        paper_table=paper_table(settings, means, {a.name: a.run for a in answers}) if bertscores else None,
        notes=notes,
        runs={a.name: run_record(a, probabilities) for a in answers},
        answers=answers,
        row_scores=columns,
    )


def scores_of(answers, bertscore=None):
    """[Score, ...] of one model's answers, NLL first; bertscore: (n,) F1 or None."""
    rows = answers.rows
    row_scores = [scores.Score("NLL", [row.nll for row in rows], [row.tokens for row in rows])]
    if bertscore is not None:
        row_scores.append(scores.Score("BERTScore F1", bertscore))
    complaints = [row.complaint for row in rows]
    texts = [row.answer for row in rows]
    references = [row.reference for row in rows]
    unfinished = [not row.finished for row in rows]
    return row_scores + scores.answer_scores(complaints, texts, references, unfinished)


def means_of(setting, values, counts, score_names, groups):
    """[Mean, ...] of a setting. values: (seeds, n, k), counts: (n, k), groups: {name: weights (n,)}."""
    weights = np.stack(list(groups.values()), axis=1)  # (n, g)
    mean, low, high = compare.bootstrap_mean(values, counts, weights)  # each (g, k)
    with np.errstate(invalid="ignore"):
        of_seeds = (weights.T @ values) / (weights.T @ counts)  # (seeds, g, k)
    spread = compare.seed_spread(of_seeds)
    means = []
    for g, group in enumerate(groups):
        for k, score in enumerate(score_names):
            numbers = [float(x[g, k]) for x in (mean, low, high)]
            means.append(Mean(setting, score, group, *numbers, sd_seeds=float(spread[g, k])))
            if score == "NLL":
                numbers = [scores.perplexity(nll) for nll in numbers]
                means.append(Mean(setting, "perplexity", group, *numbers, sd_seeds=math.nan))
    return means


def compare_all(values, counts, score_names, groups, notes):
    """[Difference, ...] of every two settings in every group and score. values: {setting: (seeds, n, k)},
    counts: {setting: (n, k)}, groups: {name: weights (n,)}."""
    weights = np.stack(list(groups.values()), axis=1)  # (n, g)
    # The least p-value is 2 / resamples, and Holm multiplies it by the number of comparisons.
    number = math.comb(len(values), 2) * len(groups) * len(score_names)
    resamples = max(10_000, 100 * number)
    differences = []
    for a, b in combinations(values, 2):
        same_tokens = np.array_equal(counts[a], counts[b])
        if not same_tokens:
            notes.append(f"NLL of {a} and {b} is not compared: the references are not the same number of "
                         "tokens for both")
        result = compare.compare_settings(values[a], values[b], counts[a], weights, resamples=resamples)
        for g, group in enumerate(groups):
            for k, score in enumerate(score_names):
                if score != "NLL" or same_tokens:
                    differences.append(Difference(a, b, score, group, *(float(x[g, k]) for x in result)))
    for d, p in zip(differences, compare.holm([d.p for d in differences])):
        d.p_holm = float(p)
        d.sentence = compare.sentence(d.a, d.b, d.score, d.difference, (d.low, d.high), p, d.group)
    return differences


def paper_table(settings, means, runs):
    """(header, rows): mean BERTScore F1 in %, a checkpoint a row, a weighting a column, as the paper prints
    it.

    runs: {name: what read_run_json gives}. A setting whose cell is taken, say by another learning rate, has a
    row of its own.
    """
    columns = {"base": "base", "none": "CE", "mild": "mild", "strong": "strong", "balanced": "balanced"}
    table = defaultdict(dict)  # row -> column -> text
    for setting in settings:
        run = setting.runs[0]
        arguments = runs[run].get("arguments", {"ckpt": run, "weighting": "base"})
        row = arguments["ckpt"]
        column = columns.setdefault(arguments["weighting"], arguments["weighting"])
        if column in table[row]:
            row = f"{row} ({setting.name})"
        m = means[setting.name, "BERTScore F1", "all"]
        spread = "" if math.isnan(m.sd_seeds) else f" ± {100 * m.sd_seeds:.2f}"
        table[row][column] = f"{100 * m.mean:.2f}{spread}"
    header = list(columns.values())
    return ["model", *header], [[row, *(cells.get(c, "") for c in header)] for row, cells in table.items()]


def run_record(answers, probabilities):
    """RunRecord of a run; of no run that only bears the same name here. probabilities: of the rows, or
    None."""
    metrics, validation, weights = [], [], []
    folder = run_folder(answers.name)
    if folder and read_run_json(answers.name) == answers.run:
        metrics = _read_lines(folder / "metrics.jsonl")
        if (folder / "validation.json").is_file():
            with _reading(folder / "validation.json"):
                validation = json.loads((folder / "validation.json").read_bytes())
    coefficients = answers.run.get("coefficients")
    if coefficients and probabilities:
        weights = severity_weights(torch.tensor(probabilities), coefficients).tolist()
    return RunRecord(metrics, validation, weights)


def without_nan(value):
    """`value`, which json can write, with None for every nan and infinity: JSON itself has neither."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
