"""Does the weighting shift a model towards critical complaints, and how much of that is the classifier?

    python benchmarks/experiment.py --data severity.jsonl --ckpt aragpt2-base --out runs/experiment
    python benchmarks/experiment.py --from docs/experiment      # the tables and the picture again, no model

Weights are 1 - k, 1, 1 + k for non-critical, neutral and critical. The settings differ in k and in whose
probabilities they use: the table's labels (one-hot: the best that any classifier could give), the table's
probabilities (a classifier's), or either of them shuffled among the training rows: the same weights, on the
wrong complaints. A table without labels: --settings none strong-classifier strong-classifier-shuffled.

Seed s is tested on the rows of fold s of `--folds` and trained on all others, so that each seed brings test
rows of its own: differences between seeds hold the chance of the rows too, and a t test over seeds is about
right (the seeds share most of their training rows).
The folds follow from the complaints' hash. Within a seed all settings have the same rows, order and steps.
The last step is evaluated: there is one save, so nothing is chosen by the test rows.

Each run is a call of finetune.py and of evaluate.py. What is kept of it is OUT/SETTING-SEED.tsv: row, NLL of
the reference (nats, summed over its tokens), tokens. Runs that have this file are not made again, so the
experiment can be stopped, called again, and shared by several calls with different --seeds.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from turns import ROOT

from sevloss import InputError, data, report_errors, write_atomically, write_text
from sevloss.classifier.annotate import write_rows
from sevloss.evaluation import compare, findings
from sevloss.inputs import tables
from sevloss.severity import CLASSES, class_name

SETTINGS = {  # in the order in which they are run: name -> k, whose probabilities
    "none": (0, "classifier"),  # all weights are 1, whatever the probabilities
    "strong-labels": (0.75, "labels"),
    "strong-labels-shuffled": (0.75, "labels-shuffled"),
    "one-labels": (1, "labels"),
    "balanced-labels": (0.5, "labels"),
    "strong-classifier": (0.75, "classifier"),
    "balanced-classifier": (0.5, "classifier"),
    "strong-classifier-shuffled": (0.75, "classifier-shuffled")}
PRIMARY = ("strong-labels", "strong-labels-shuffled")


# --- the runs -----------------------------------------------------------------------------------------------

def probabilities_of(pairs, source, seed):
    """(n, 3) of the training rows of a seed. source: labels, classifier, or one of them shuffled."""
    if source.startswith("labels"):
        if any(pair.severity is None for pair in pairs):
            raise InputError("rows without a label: choose --settings without labels, see --help")
        rows = torch.eye(3, dtype=torch.float64)[[pair.severity for pair in pairs]]
    else:
        rows = torch.tensor([pair.probabilities for pair in pairs], dtype=torch.float64)
    if source.endswith("shuffled"):
        order = list(range(len(pairs)))
        random.Random(seed).shuffle(order)
        rows = rows[order]
    return rows


def write_table(path, pairs, probabilities):
    """A .jsonl with these probabilities, (n, 3)."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            write_rows(file, ".jsonl", pairs, probabilities, header=False)
    write_atomically(path, write)


def call(script, *arguments):
    command = [sys.executable, ROOT / script, *arguments]
    print("$", *command[1:], flush=True)
    if subprocess.run(list(map(str, command))).returncode:
        raise InputError(f"{script} failed, with the message above; what was done stays: call this again")


def make_run(pairs, setting, seed, args, out):
    """Trains and evaluates one run, and keeps what the test rows got."""
    k, source = SETTINGS[setting]
    train = []
    test = []
    for pair in pairs:
        if data.fold_of(pair.complaint, args.folds, "experiment") == seed:
            test.append(pair)
        else:
            train.append(pair)
    train_table = out / "tables" / f"{source}-{seed}.jsonl"
    test_table = out / "tables" / f"test-{seed}.jsonl"
    train_table.parent.mkdir(exist_ok=True)
    if not train_table.exists():  # anew, it would be another table to a run that goes on
        write_table(train_table, train, probabilities_of(train, source, seed))
    if not test_table.exists():
        write_table(test_table, test, probabilities_of(test, source.removesuffix("-shuffled"), seed))

    run = out / "runs" / f"{setting}-{seed}"
    resume = ["--resume"] if run.exists() else []
    call("finetune.py", "--ckpt", args.ckpt, "--data", train_table, "--validation", test_table,
         "--weighting", f"{1 - k},1,{1 + k}", "--seed", seed, "--save-every", 10**9, "--out", run,
         *args.finetune.split(), *resume)
    call("evaluate.py", run, "--data", test_table, "--split", "all", "--rows", len(test),
         "--max-new-tokens", 0, *args.evaluate.split())

    answers, = (run / "evaluation").glob("answers-*.jsonl")
    lines = []
    for answer in findings.load_answers(answers).rows:  # one a complaint; their rows are the test table's
        pair = test[answer.row - 1]
        lines.append(f"{pair.row}\t{answer.nll:.4f}\t{answer.tokens}\n")
    write_text(out / f"{setting}-{seed}.tsv", "row\tnll\ttokens\n" + "".join(lines))


def make_runs(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"), probabilities="required")
    lines = [f"{pair.row}\t{class_name(pair.severity, pair.probabilities)}\n" for pair in pairs]
    about = {"ckpt": str(args.ckpt), "folds": args.folds, "finetune": args.finetune,
             "evaluate": args.evaluate, "rows": len(pairs), "data_fingerprint": str(data.Fingerprint(pairs))}
    if max(args.seeds) >= args.folds:
        raise InputError(f"a seed needs a fold of its own: with --folds {args.folds}, seeds are below that")
    if (out / "about.json").exists() and json.loads((out / "about.json").read_text()) != about:
        raise InputError(f"{out} holds an experiment with other arguments or data: give another --out")
    write_text(out / "rows.tsv", "row\tclass\n" + "".join(lines))
    write_text(out / "about.json", json.dumps(about, indent=1) + "\n")
    for setting in args.settings:
        for seed in args.seeds:
            if not (out / f"{setting}-{seed}.tsv").exists():
                make_run(pairs, setting, seed, args, out)


# --- what came out ------------------------------------------------------------------------------------------

def read_results(folder):
    """{setting: {seed: {group: NLL per token, mean over rows}}} of a folder; groups: all, each class, and
    contrast, which is critical minus non-critical: as in evaluate.py. Rows that a setting of the seed lacks
    count in none of the seed's settings."""
    classes = dict(line.split("\t") for line in (folder / "rows.tsv").read_text().splitlines()[1:])
    if not set(classes.values()) & set(CLASSES):  # no labels at all: by predicted class
        classes = {row: name.removeprefix("predicted ") for row, name in classes.items()}

    nll = {}  # (setting, seed) -> {row: NLL per token}
    for setting in SETTINGS:
        for path in sorted(folder.glob(f"{setting}-*.tsv")):
            seed = path.stem.removeprefix(f"{setting}-")
            if seed.isdigit():  # else of a setting whose name is longer
                cells = [line.split("\t") for line in path.read_text().splitlines()[1:]]
                nll[setting, int(seed)] = {row: float(total) / int(tokens) for row, total, tokens in cells}
    if not nll:
        raise InputError(f"{folder} holds no results: files such as none-0.tsv")

    results = {}
    for (setting, seed), of_rows in nll.items():
        in_all = set.intersection(*(set(other) for (_, of_seed), other in nll.items() if of_seed == seed))
        rows = [row for row in of_rows if row in in_all]
        groups = {"all": np.mean([of_rows[row] for row in rows])}
        for name in CLASSES:
            groups[name] = np.mean([of_rows[row] for row in rows if classes[row] == name])
        groups["contrast"] = groups["critical"] - groups["non-critical"]
        results.setdefault(setting, {})[seed] = groups
    return results


def t_test(values):
    """compare.Estimate of the mean of one value a seed, against 0."""
    n = len(values)
    error = np.std(values, ddof=1) / n**0.5
    margin = compare.student_quantile(0.05, n - 1) * error
    mean = np.mean(values)
    return compare.Estimate(mean, mean - margin, mean + margin, error, n - 1, np.nan, n,
                            p=compare.student_p(mean, error, n - 1))


def difference(results, setting, control, group):
    """The t test of setting minus control over the seeds that both have; None of fewer than three."""
    a, b = results.get(setting, {}), results.get(control, {})
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < compare.FEWEST_SEEDS:
        return None
    return t_test([a[seed][group] - b[seed][group] for seed in seeds])


def slope(results):
    """The t test of the contrast's slope over k, one least-squares line a seed through the settings with
    labels; None of fewer than three seeds that have them all."""
    with_labels = [name for name in results if name == "none" or SETTINGS[name][1] == "labels"]
    by_k = {SETTINGS[name][0]: results[name] for name in with_labels}
    if len(by_k) < 3:
        return None
    seeds = sorted(set.intersection(*map(set, by_k.values())))
    if len(seeds) < compare.FEWEST_SEEDS:
        return None
    return t_test([np.polyfit(list(by_k), [by_k[k][seed]["contrast"] for k in by_k], 1)[0] for seed in seeds])


def sentence(name, test, p, alpha):
    found = "found" if p < 0.05 else "not found"
    chance = "< 0.001" if p < 0.001 else f"{p:.3f}"
    detectable = compare.detectable_difference(test, alpha)
    return (f"| {name} | {test.value:+.4f} [{test.low:+.4f}, {test.high:+.4f}] | {test.seeds} | {chance} | "
            f"{found} | {detectable:.4f} |")


def tests_table(results):
    """Markdown lines: the primary test alone at 0.05, the slope, and all others under Holm together."""
    lines = ["| test | difference in nats [95% interval] | seeds | p | an effect is | would be found (80%) |",
             "|---|---|---|---|---|---|"]
    if primary := difference(results, *PRIMARY, "contrast"):
        lines.append(sentence(f"primary: contrast, {' minus '.join(PRIMARY)}", primary, primary.p, 0.05))
    if second := slope(results):
        lines.append(sentence("second: slope of the contrast over k", second, second.p, 0.05))
    others = {}
    for setting in results:
        for group in ("contrast", "all", *CLASSES):
            name = f"{'NLL of ' * (group != 'contrast')}{group}, {setting} minus none"
            if setting != "none" and (test := difference(results, setting, "none", group)):
                others[name] = test
    if test := difference(results, "strong-classifier", "strong-classifier-shuffled", "contrast"):
        others["contrast, strong-classifier minus its shuffled control"] = test
    adjusted = compare.holm([test.p for test in others.values()])
    for (name, test), p in zip(others.items(), adjusted):
        lines.append(sentence(name, test, p, 0.05 / len(others)))
    return lines


def means_table(results):
    """Markdown lines: NLL per token, mean of the rows, and its mean and standard deviation over seeds."""
    groups = ("all", *CLASSES, "contrast")
    lines = [f"| setting | k | seeds | {' | '.join(groups)} |", "|---" * (3 + len(groups)) + "|"]
    for setting, seeds in results.items():
        cells = []
        for group in groups:
            values = [value[group] for value in seeds.values()]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        lines.append(f"| {setting} | {SETTINGS[setting][0]} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def draw_dose_response(results, path):
    """The contrast's change against `none`, with 95% intervals, over k; a line for each source."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for source, colour in (("labels", "C3"), ("classifier", "C0"), ("labels-shuffled", "C7"),
                           ("classifier-shuffled", "C8")):
        points = []
        for setting, (k, whose) in SETTINGS.items():
            if whose == source and k and (test := difference(results, setting, "none", "contrast")):
                points.append((k, test.value, test.value - test.low))
        if points:
            k, change, margin = zip(*sorted([(0, 0, 0), *points]))
            axes.errorbar(k, change, margin, color=colour, capsize=3, marker="o", label=source)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xlabel="k (weights 1 - k, 1, 1 + k)", ylabel="change of the contrast (nats per token)",
             title="NLL of critical minus non-critical test rows, against k = 0")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", metavar="FOLDER", help="only evaluate the results there")
    parser.add_argument("--data", default=tables.SAMPLE, help="table with labels and severity probabilities")
    parser.add_argument("--ckpt", default="tiny")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="below --folds")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--out", default="runs/experiment")
    parser.add_argument("--finetune", default="", metavar="ARGUMENTS", help='e.g. "--lora 16 --lr 2e-4"')
    parser.add_argument("--evaluate", default="", metavar="ARGUMENTS", help='e.g. "--dtype fp32"')
    args = parser.parse_args()
    if not args.folder:
        make_runs(args)
    folder = Path(args.folder or args.out)
    results = read_results(folder)
    text = "\n".join([*means_table(results), "", *tests_table(results)]) + "\n"
    write_text(folder / "table.md", text)
    draw_dose_response(results, folder / "dose-response.png")
    print(f"{text}\nwrote {folder / 'table.md'} and {folder / 'dose-response.png'}")


if __name__ == "__main__":
    main()
