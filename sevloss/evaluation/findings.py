"""From answers to findings: what models answered, stored and read; scores of settings; verdicts on them."""

import json
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from sevloss import InputError, checkpoint, interpreting
from sevloss.evaluation import compare, scores
from sevloss.severity import class_name

# Runs of one setting may differ in these; the fingerprint of the data stands for the last three.
FREE_ARGUMENTS = ("seed", "out", "resume", "save_every", "device", "micro_tokens", "gradient_checkpointing",
                  "compile", "deterministic", "merge", "data", "columns", "classifier")


# --- answers, as they are stored ----------------------------------------------------------------------------

@dataclass
class Answer:
    """What one model made of one test row."""
    row: int  # of the table
    complaint: str
    reference: str
    severity: int | None  # the label, an index in severity.CLASSES
    probabilities: list | None  # of the three classes
    specialty: str
    answer: str  # empty where likelihoods alone were asked for
    finished: bool  # it came to its end within the most tokens allowed
    nll: float  # of the reference and EOS: nats, summed over `tokens` tokens
    tokens: int

    @property
    def class_name(self):
        return class_name(self.severity, self.probabilities)


@dataclass
class Answers:
    """What one model made of all test rows. protocol: what must be the same for answers to be compared; run:
    as read_run_json gives it."""
    name: str
    protocol: dict
    rows: list[Answer]  # in the table's order
    path: Path
    run: dict = field(default_factory=dict)
    dtype: str = ""  # of matrix products

    @property
    def seed(self):
        """Of training; None of a plain checkpoint."""
        return self.run.get("arguments", {}).get("seed")


def read_answers(path):
    """Answers, maybe of a part of the rows; None where there are none yet. The file's first line says how it
    was made, each other one is a row; a last one without its end, where a stop cut it, does not count."""
    path = Path(path)
    # not splitlines(): a text may hold other line breaks, like U+2028
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    if not lines:
        return None
    with interpreting(path, "if evaluate.py wrote it, remove it and call again"):
        head, *records = map(json.loads, lines)
        by_row = {record["row"]: Answer(**record) for record in records}  # one may be there twice
        answers = Answers(**head, rows=[by_row[row] for row in sorted(by_row)], path=path)
        for row in answers.rows:
            texts = (row.complaint, row.reference, row.answer, row.specialty)
            numbers = [row.row, row.nll / row.tokens, *(row.probabilities or (1, 0, 0))]
            if not (all(isinstance(text, str) for text in texts) and row.severity in (None, 0, 1, 2)
                    and all(isinstance(number, (int, float)) for number in numbers) and len(numbers) == 5):
                raise ValueError(f"row {row.row} has a value of another type")
        check_run(answers.run)
        if not (isinstance(answers.protocol, dict) and isinstance(answers.dtype, str)):
            raise ValueError("its first line has a value of another type")
        return answers


def check_run(run):
    """ValueError unless a run.json has what is read here in the right types."""
    arguments = run.get("arguments", {})
    coefficients = run.get("coefficients", [])
    right = isinstance(arguments, dict) and isinstance(coefficients, list)
    if right and run.get("script") != "train_classifier.py":  # which may have several seeds
        right = isinstance(arguments.get("seed"), int | None)
    if not right or not all(isinstance(c, int | float) for c in coefficients):
        raise ValueError("its arguments or coefficients are of another type")


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
            if found != value and key != "table":  # the fingerprint stands for what is in the table
                what = "rows or references" if key == "fingerprint" else f"{key}: {value} and {found}"
                raise InputError(f"{first} and {name} cannot be compared, they were evaluated with different "
                                 f"{what}: evaluate both in one call")


def read_run_json(name):
    """As checkpoint.read_run_json, with what is read here in the right types."""
    run = checkpoint.read_run_json(name)
    with interpreting(f"{name}/run.json", "name a run of finetune.py"):
        check_run(run)
    return run


# --- settings -----------------------------------------------------------------------------------------------

@dataclass
class Setting:
    """Runs whose arguments differ in the seed alone."""
    name: str
    runs: list[str]
    seeds: list  # of the runs; [None] of a plain checkpoint


def settings_of(answers):
    """[Setting, ...] of the runs. The same seed again is another setting, and so is each plain checkpoint."""
    groups = defaultdict(list)
    repeats = Counter()
    for a in answers:
        same = "\n".join(arguments_of(a)) + str(a.run.get("data_fingerprint"))
        repeats[same, a.seed] += 1
        groups[same, repeats[same, a.seed]].append(a)
    groups = list(groups.values())
    return [Setting(name, [a.name for a in group], [a.seed for a in group])
            for name, group in zip(_setting_names(groups), groups)]


def arguments_of(answers):
    """["lr 0.001", ...]: what must be the same within a setting."""
    given = answers.run.get("arguments", {"checkpoint": answers.name})
    return [f"{key} {value}" for key, value in given.items() if key not in FREE_ARGUMENTS]


def _setting_names(groups):
    """What the names of a setting's runs share (runs/plain-0, runs/plain-1: plain), without the folder that
    all lie in; where that does not tell settings apart, the arguments in which they differ; else the first
    runs' names."""
    shared = []
    for group in groups:
        name = os.path.commonprefix([a.name for a in group])
        shared.append(name if len(group) == 1 else re.sub(r"[-_/]*\d*$", "", name))
    folder = os.path.commonprefix(shared).rpartition("/")[0]
    shared = [name.removeprefix(folder + "/") for name in shared]
    arguments = [arguments_of(group[0]) for group in groups]
    common = set(arguments[0]).intersection(*arguments)
    different = [", ".join(word for word in words if word not in common) for words in arguments]
    for names in (shared, different):
        if len(set(names)) == len(names) and all(names):
            return names
    return [group[0].name for group in groups]


def choose_control(settings, answers, against):
    """The setting with the run `against`; else the first one with equal weights; else the first one."""
    equal = [a.name for a in answers if len(set(a.run.get("coefficients", ()))) == 1]
    for run in [against, *equal]:
        for setting in settings:
            if run in setting.runs:
                return setting
    return settings[0]


def pair_runs(control, setting):
    """(runs of the control, runs of the setting, seeds): those with a seed in common. A plain checkpoint,
    which no seed made, goes with every run."""
    a, b = (dict(zip(side.seeds, side.runs)) for side in (control, setting))
    if None in a:
        return control.runs, setting.runs, setting.seeds
    if None in b:
        return control.runs, setting.runs, control.seeds
    seeds = sorted(a.keys() & b.keys())
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds], seeds


# --- findings -----------------------------------------------------------------------------------------------
# In numbers nan stands for what there is none of, like an interval of few rows.

@dataclass
class Verdict:
    """What is said of a setting and the control in one of the two endpoints. Nothing else gets a verdict."""
    setting: str
    control: str
    endpoint: str  # "NLL", of all rows, or "contrast": of critical minus non-critical rows
    seeds: list  # in common
    difference: compare.Estimate  # setting minus control
    p_holm: float = math.nan  # corrected for all that is tested in this call
    detectable: float = math.nan  # the difference that 60 to 80% of such comparisons would find
    finding: str = "no verdict"
    sentence: str = ""


@dataclass
class Evaluation:
    """All that is printed and reported."""
    protocol: dict
    settings: list[Setting]
    control: str
    groups: dict  # group -> number of rows, of the contrast that of its smaller class
    contrast: str | None  # the group that is a difference of two
    score_names: list
    means: dict  # (setting, score, group) -> Estimate
    differences: dict  # the same of setting minus control
    verdicts: list[Verdict]
    summary: list  # of the verdicts, in two sentences
    notes: list
    answers: list[Answers]
    row_scores: dict  # run -> {score: (n,)}

    def most_critical_first(self):
        """Indices of the rows: first those labelled critical, each part by p(critical)."""
        def criticality(i):
            row = self.answers[0].rows[i]
            return row.class_name == "critical", row.probabilities[2] if row.probabilities else 0
        return sorted(range(self.protocol["rows"]), key=criticality, reverse=True)

    def to_json(self):
        """What evaluation.json holds: all but what is said of each row, which is in .jsonl files."""
        values = dict(vars(self))
        del values["answers"], values["row_scores"]
        values["settings"] = [asdict(setting) for setting in self.settings]
        for key in ("means", "differences"):
            values[key] = [{"setting": setting, "score": score, "group": group, **estimate._asdict()}
                           for (setting, score, group), estimate in values[key].items()]
        values["verdicts"] = [asdict(v) | {"difference": v.difference._asdict()} for v in self.verdicts]
        return without_nan(values)


def evaluate(answers, bertscores, notes, against=None):
    """[Answers] of the same rows -> Evaluation. bertscores: {name: (n,) F1}, maybe empty; notes: sentences
    for the report, to which more are added; against: the run whose setting is the control."""
    groups = scores.row_groups(answers[0].rows)
    contrast = next((name for name, weights in groups.items() if "minus" in weights), None)
    row_scores = {a.name: scores_of(a, bertscores.get(a.name)) for a in answers}
    tokens = {a.name: np.array([row.tokens for row in a.rows]) for a in answers}
    score_names = ["NLL", "NLL over tokens", *list(row_scores[answers[0].name])[1:]]

    def of_runs(runs, score, group):
        """Values of the rows, (S, n), and what the rows weigh."""
        weights = groups[group]
        if score == "NLL over tokens":
            score = "NLL"
            weights = {name: w * tokens[runs[0]] for name, w in weights.items()}
        return np.stack([row_scores[run][score] for run in runs]), weights

    # Scores of settings
    settings = settings_of(answers)
    if len(dtypes := {a.dtype for a in answers if a.dtype}) > 1:
        notes.append(f"answers were made in different number formats: {', '.join(sorted(dtypes))}")
    means = {}
    for setting, score, group in product(settings, score_names, groups):
        values, weights = of_runs(setting.runs, score, group)
        is_rate = score in scores.RATES and group != contrast
        mean = compare.rate if is_rate else compare.estimate
        means[setting.name, score, group] = mean(values, **weights)

    # Differences from the control, paired by seed
    control = choose_control(settings, answers, against)
    differences, verdicts = {}, []
    for setting in settings:
        if setting is control:
            continue
        a_runs, b_runs, seeds = pair_runs(control, setting)
        pair = f"{setting.name} and {control.name}"
        if alone := sorted(set(control.seeds + setting.seeds) - set(seeds) - {None}):
            notes.append(f"{pair}: left out, as only one of them has it: seed {', '.join(map(str, alone))}")
        if not seeds:
            verdicts.append(Verdict(setting.name, control.name, "NLL", [], compare.Estimate(math.nan)))
            continue
        comparable = score_names
        if not np.array_equal(tokens[a_runs[0]], tokens[b_runs[0]]):
            comparable = [score for score in score_names if not score.startswith("NLL")]
            notes.append(f"NLL of {pair} is not compared: the references are not the same number of tokens")
        for score, group in product(comparable, groups):
            a, weights = of_runs(a_runs, score, group)
            b, _ = of_runs(b_runs, score, group)
            difference = compare.paired_t(a, b, **weights)
            differences[setting.name, score, group] = difference._replace(p=math.nan)  # only verdicts have p
            endpoint = {"all": "NLL", contrast: "contrast"}.get(group)
            if score == "NLL" and endpoint:
                verdicts.append(Verdict(setting.name, control.name, endpoint, seeds, difference))
    judge(verdicts, differences, contrast)
    counts = {name: min(int((w > 0).sum()) for w in weights.values()) for name, weights in groups.items()}
    return Evaluation(answers[0].protocol, settings, control.name, counts, contrast, score_names, means,
                      differences, verdicts, summarise(verdicts, control.name), notes, answers, row_scores)


def scores_of(answers, bertscore=None):
    """{score: (n,)} of one model's answers, NLL first; bertscore: (n,) F1 or None."""
    columns = {"NLL": [row.nll / row.tokens for row in answers.rows]}
    if bertscore is not None:
        columns["BERTScore F1"] = bertscore
    if answers.protocol["max_new_tokens"]:
        lines = [scores.answer_scores(row.complaint, row.answer, row.reference, not row.finished)
                 for row in answers.rows]
        columns |= {score: [line[score] for line in lines] for score in lines[0]}
    return {score: np.array(values, dtype=np.float64) for score, values in columns.items()}


def without_nan(value):
    """`value`, which json can write, with None for every nan and infinity: JSON itself has neither."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


# --- verdicts -----------------------------------------------------------------------------------------------

NO_DIFFERENCE = "is not distinguishable from"
FINDINGS = {  # of a negative difference, and of a positive one
    "NLL": ("is better than", "is worse than"),
    "contrast": ("shifts towards critical rows against", "shifts away from critical rows against")}


def judge(verdicts, differences, contrast):
    """Fills in p_holm, detectable, finding and sentence. contrast: the name of its group."""
    adjusted = compare.holm([v.difference.p for v in verdicts])
    tests = int(np.isfinite(adjusted).sum())
    for v, p in zip(verdicts, adjusted.tolist()):
        v.p_holm = p
        if math.isfinite(p):
            v.detectable = compare.detectable_difference(v.difference, 0.05 / tests)
            v.finding = FINDINGS[v.endpoint][v.difference.value > 0] if p < 0.05 else NO_DIFFERENCE
        v.sentence = sentence_of(v)
        if v.endpoint == "contrast":
            changes = [f"{with_interval(differences[v.setting, 'NLL', name])} in {name} rows"
                       for name in contrast.split(" minus ")]
            v.sentence += f" NLL changes by {' and '.join(changes)}."
            if contrast.startswith("predicted"):
                v.sentence += " This is by predicted class: what the loss did, not whom it helped."


def sentence_of(v):
    """The finding with its numbers, or why there is none."""
    what = {"NLL": "NLL", "contrast": "the contrast (NLL of critical minus non-critical rows)"}[v.endpoint]
    rows = f"{v.difference.rows:.0f} rows{' of the smaller class' if v.endpoint == 'contrast' else ''}"
    remedy = ""
    if v.endpoint == "NLL" and v.seeds != [None]:
        new = min({0, 1, 2} - set(v.seeds), default=0)
        remedy = (f" To settle it, train both with three seeds (python finetune.py --seed {new} ..., the "
                  "rest unchanged) and evaluate all runs in one call.")
    if not v.seeds:
        return f"{v.setting} and {v.control} have no seed in common and are not compared.{remedy}"
    differ = f"{v.setting} and {v.control} differ by {with_interval(v.difference)} in {what}"
    if len(v.seeds) < compare.FEWEST_SEEDS:
        return f"{differ}; fewer than three seeds say nothing about the settings.{remedy}"
    if v.finding == "no verdict":
        return f"{differ}; {rows} are too few for a verdict."
    chance = "p < 0.001" if v.p_holm < 0.001 else f"p = {v.p_holm:.3f}"
    return (f"{v.setting} {v.finding} {v.control} in {what}: {with_interval(v.difference)}, {chance}, over "
            f"{len(v.seeds)} seeds and {rows}. A difference of {v.detectable:.2g} would be found in 60 to "
            "80% of such cases.")


def summarise(verdicts, control):
    """[how well, for whom] in words; one sentence where there is no verdict; [] where nothing is compared."""
    if verdicts and all(v.finding == "no verdict" for v in verdicts):
        return [f"No verdict: it takes three seeds in common with {control}, and {compare.FEWEST_ROWS} rows."]
    sentences = []
    for endpoint, lead in (("NLL", "How well the model foresees what doctors wrote"),
                           ("contrast", "Whether it shifts towards critical complaints")):
        parts = []
        for v in verdicts:
            if v.endpoint == endpoint and v.finding == "no verdict":
                parts.append(f"no verdict on {v.setting}")
            elif v.endpoint == endpoint:
                parts.append(f"{v.setting} {v.finding} {control}")
        if parts:
            sentences.append(f"{lead}: {'; '.join(parts)}.")
    return sentences


def with_interval(estimate, places=None, sign="+"):
    """Value and 95% interval, in as many digits as mean something, or `places` decimals."""
    places = decimals(estimate.high - estimate.value) if places is None else places
    value, low, high = (f"{x:{sign}z,.{places}f}" for x in estimate[:3])
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def decimals(margin):
    """So many that a margin of error has two digits; 4 where there is none."""
    return min(6, max(0, 1 - math.floor(math.log10(margin)))) if 0 < margin < math.inf else 4
