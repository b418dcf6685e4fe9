"""Does the weighting help, and for whom? The same data, model and seeds with w = 1, mild, balanced, strong, and a control.

    python benchmarks/experiment.py --data maqa_severity.jsonl --ckpt aragpt2-base --out runs/experiment [--seeds 5] [--finetune ARGUMENTS]

The control is `balanced` with the probabilities shuffled among the training rows (one permutation for all seeds): the same weights, on the
wrong complaints. If it does as well as `balanced`, it is not the severity that helps. Runs differ in nothing but weights and seed; each is
a call of finetune.py and of evaluate.py, and what is done is not done again, so the experiment can be stopped and called again. At the end:
table.md and a report in OUT/report, with every setting compared with every other, over all rows and by severity.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sevloss import InputError, checkpoint, data, report_errors  # noqa: E402
from sevloss.classifier.annotate import write_rows  # noqa: E402
from sevloss.evaluation.findings import findings  # noqa: E402
from sevloss.inputs import hub, tables  # noqa: E402

SETTINGS = {"none": "none", "mild": "mild", "balanced": "balanced", "strong": "strong", "shuffled": "balanced"}  # name -> weighting
SCORES = ("NLL", "BERTScore F1", "chrF", "ROUGE-L", "urgent")


def write_shuffled(table, to):
    """The table with the probabilities of its training rows shuffled among them; the other rows stay as they are."""
    pairs = tables.read_pairs(table, needed=("complaint", "response", "critical"))
    train = data.split_pairs(pairs)["train"]
    probabilities = [pair.probabilities for pair in train]
    random.Random(0).shuffle(probabilities)
    for pair, p in zip(train, probabilities):
        pair.probabilities = p
    with open(to, "w", encoding="utf-8") as file:
        write_rows(file, ".jsonl", pairs, torch.tensor([pair.probabilities for pair in pairs], dtype=torch.float64), header=False)


def call(*arguments):
    print("$", *arguments, flush=True)
    if subprocess.run([sys.executable, *map(str, arguments)], cwd=Path.cwd()).returncode:
        raise InputError(f"{Path(arguments[0]).name} failed; the message is above. What was done before stays: call this again")


def train(run, name, seed, table, args):
    """Trains the run, or goes on with it, or leaves it if it is finished."""
    facts = findings.read_run_json(run)
    if facts and (run / "validation.json").is_file() and json.loads((run / "validation.json").read_text())[-1][0] == facts["steps"]:
        return
    again = ["--resume"] if (run / "state" / "training.pt").is_file() else []
    call(ROOT / "finetune.py", "--ckpt", args.ckpt, "--data", table, "--weighting", SETTINGS[name], "--seed", seed, "--out", run,
         *args.finetune.split(), *again)


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE, help="table with severity probabilities (of train_classifier.py --annotate)")
    parser.add_argument("--ckpt", default="tiny")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default="runs/experiment")
    parser.add_argument("--finetune", default="", metavar="ARGUMENTS", help='more of finetune.py, e.g. "--epochs 2 --lr 1e-4"')
    parser.add_argument("--evaluate", default="", metavar="ARGUMENTS", help='more of evaluate.py, e.g. "--rows 500 --bertscore none"')
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shuffled = out / "shuffled.jsonl"
    if not shuffled.exists():
        checkpoint.write_atomically(shuffled, lambda path: write_shuffled(args.data, path))
    for seed in range(args.seeds):
        for name in SETTINGS:
            train(out / f"{name}-{seed}", name, seed, shuffled if name == "shuffled" else args.data, args)
    runs = [out / f"{name}-{seed}" for name in SETTINGS for seed in range(args.seeds)]
    call(ROOT / "evaluate.py", *runs, "--data", args.data, "--out", out / "report", "--answers", 0, *args.evaluate.split())
    found = hub.read_json(out / "report" / "evaluation.json")
    names = {setting["name"]: Path(setting["runs"][0]).name.rpartition("-")[0] for setting in found["settings"]}
    for entry in found["means"]:
        entry["setting"] = names[entry["setting"]]
    means = {(m["setting"], m["score"], m["group"]): m for m in found["means"]}
    scores = [score for score in SCORES if ("none", score, "all") in means]
    groups = [group for group in found["groups"] if not group.startswith("specialty")]
    lines = [f"| rows | setting | {' | '.join(scores)} |", "|---" * (2 + len(scores)) + "|"]
    for group in groups:
        for name in SETTINGS:
            entries = [means[name, score, group] for score in scores]
            cells = [f"{m['mean']:.4f}" + (f" ± {m['sd_seeds']:.4f}" if args.seeds > 1 else "") for m in entries]
            lines.append(f"| {group} ({found['groups'][group]:,}) | {name} | {' | '.join(cells)} |")
    checkpoint.write_lines(out / "table.md", lines)
    print("\n".join(lines))
    for entry in found["comparisons"]:
        if entry["score"] in SCORES and {"none", "shuffled"} & {names[entry["a"]], names[entry["b"]]}:
            print(entry["sentence"])
    print(f"± is the standard deviation over {args.seeds} seeds; wrote {out / 'table.md'} and {out / 'report'}")


if __name__ == "__main__":
    main()
