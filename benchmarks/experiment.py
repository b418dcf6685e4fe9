"""Does the weighting help, and for whom? The same data, model and seeds with w = 1, mild, balanced, strong,
and a control.

    python benchmarks/experiment.py --data maqa_severity.jsonl --ckpt aragpt2-base --out runs/experiment
                                    [--seeds 5] [--finetune ARGUMENTS] [--evaluate ARGUMENTS]

The control is `balanced` with the probabilities shuffled among the training rows (one permutation for all
seeds): the same weights, on the wrong complaints. If it does as well as `balanced`, it is not the severity
that helps. Runs differ in nothing but weights and seed; each is a call of finetune.py and of evaluate.py,
and what is done is not done again, so the experiment can be stopped and called again. At the end: table.md,
a report in OUT/report, of every setting against w = 1, and one in OUT/against-shuffled.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from turns import ROOT

from sevloss import InputError, checkpoint, data, report_errors
from sevloss.classifier.annotate import write_rows
from sevloss.inputs import hub, tables

SETTINGS = {  # name -> weighting
    "none": "none", "mild": "mild", "balanced": "balanced", "strong": "strong", "shuffled": "balanced"}
SCORES = ("NLL", "BERTScore F1", "chrF", "ROUGE-L", "urgent")


def write_shuffled(table, path):
    """The table with the probabilities of its training rows shuffled among them; other rows keep theirs."""
    pairs = tables.read_pairs(table, needed=("complaint", "response"), probabilities="required")
    train = [i for i, pair in enumerate(pairs) if data.split_of(pair.complaint) == "train"]
    shuffled = list(train)
    random.Random(0).shuffle(shuffled)
    probabilities = torch.tensor([pair.probabilities for pair in pairs], dtype=torch.float64)  # (n, 3)
    probabilities[train] = probabilities[shuffled]
    with open(path, "w", encoding="utf-8") as file:
        write_rows(file, ".jsonl", pairs, probabilities, header=False)


def call(script, *arguments):
    command = [sys.executable, ROOT / script, *arguments]
    print("$", *command[1:], flush=True)
    if subprocess.run(list(map(str, command))).returncode:
        raise InputError(f"{script} failed, with the message above; what was done stays: call this again")


def is_finished(run):
    if not (run / "validation.json").is_file():
        return False
    last_step, _ = json.loads((run / "validation.json").read_text())[-1]
    return last_step == hub.read_json(run / "run.json")["steps"]


def train(run, weighting, seed, table, args):
    """Trains the run, or goes on with it, or leaves it if it is finished."""
    if not is_finished(run):
        resume = ["--resume"] if (run / "state").is_dir() else []
        call("finetune.py", "--ckpt", args.ckpt, "--data", table, "--weighting", weighting, "--seed", seed,
             "--out", run, *args.finetune.split(), *resume)


def markdown_table(evaluation, settings):
    """Lines: the mean of each score, by group of rows and setting."""
    means = {(m["setting"], m["score"], m["group"]): m for m in evaluation["means"]}
    columns = [score for score in SCORES if score in evaluation["score_names"]]
    lines = [f"| rows | setting | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for group, rows in evaluation["groups"].items():
        if group.startswith("specialty"):
            continue
        for setting, name in settings.items():
            cells = []
            for column in columns:
                m = means[setting, column, group]
                spread = "" if m["sd_seeds"] is None else f" ± {m['sd_seeds']:.4f}"
                cells.append(f"{m['value']:.4f}{spread}")
            lines.append(f"| {group} ({rows:,}) | {name} | {' | '.join(cells)} |")
    return lines


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE, help="table with severity probabilities")
    parser.add_argument("--ckpt", default="tiny")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default="runs/experiment")
    parser.add_argument("--finetune", default="", metavar="ARGUMENTS", help='e.g. "--epochs 2 --lr 1e-4"')
    parser.add_argument("--evaluate", default="", metavar="ARGUMENTS", help='e.g. "--rows 500"')
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shuffled = out / "shuffled.jsonl"
    if not shuffled.exists():
        checkpoint.write_atomically(shuffled, lambda path: write_shuffled(args.data, path))

    # Train, seed by seed, then evaluate all runs together
    runs = {}  # run -> name of its setting
    for seed in range(args.seeds):
        for name in args.settings:
            run = out / f"{name}-{seed}"
            train(run, SETTINGS[name], seed, shuffled if name == "shuffled" else args.data, args)
            runs[str(run)] = name
    evaluate = ["evaluate.py", *runs, "--data", args.data, "--answers", 0, *args.evaluate.split()]
    call(*evaluate, "--out", out / "report")
    if "shuffled" in args.settings:
        call(*evaluate, "--out", out / "against-shuffled", "--against", out / "shuffled-0")

    evaluation = hub.read_json(out / "report" / "evaluation.json")
    settings = {setting["name"]: runs[setting["runs"][0]] for setting in evaluation["settings"]}
    lines = markdown_table(evaluation, settings)
    checkpoint.write_lines(out / "table.md", lines)
    print("\n".join(lines))
    print(f"± is the standard deviation over seeds; verdicts stand above and in the reports; wrote {out}")


if __name__ == "__main__":
    main()
