"""finetune.py on several ranks of this machine: what a killed rank does, what ranks and large tables cost.

    python benchmarks/ranks.py kills [--trials 10]
    python benchmarks/ranks.py efficiency [--steps 6]
    python benchmarks/ranks.py rows [--rows 250000 500000 1000000]

kills: a random rank gets SIGKILL at a random step; half of the runs go on by `torchrun --max-restarts`, half
by hand with one process. The final weights are compared with those of one process that nobody killed.
efficiency: two ranks of one thread against one process of two, the same rows, in turn.
rows: made-up pairs, written and deleted; the peak of memory without a file behind it, by the number of rows.
Linux alone.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import turns
from safetensors.torch import load_file

import finetune
from sevloss import InputError, checkpoint, distributed
from sevloss.inputs import tables
from sevloss.models import from_scratch, save_model
from sevloss.models.tiny import tiny_gpt2

MOST_SECONDS = 300  # for a run to end after a kill
BOUND = 1e-4  # distance of the weights, as a share of how far they moved
SAMPLE = str(Path(tables.SAMPLE).resolve())
EXACT = ["--device=cpu", "--dtype=fp32", "--preprocess=none"]


def command(script, arguments, ranks=1, restarts=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                f"--max-restarts={restarts}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(script), *map(str, arguments)]


def start(folder, *arguments, threads=1, **options):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command(*arguments, **options), cwd=folder, env=environment,
                                stdout=log, stderr=log)


def finish(process, folder):
    if process.wait():
        sys.exit((folder / "log").read_text()[-3000:])


def rank_processes(launcher):
    """{rank: process id} of those that torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")}
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# --- kills --------------------------------------------------------------------------------------------------

def distance(a, b):
    return torch.stack([(a[name].double() - b[name].double()).norm() for name in a]).norm()


def kill_one(folder, arguments, steps, chance, restarts):
    """-> (seconds until all ranks were gone, whether the state was valid, at which step)"""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    launcher = start(folder, turns.ROOT / "finetune.py", arguments, ranks=2, restarts=restarts)
    at = chance.randrange(steps - 1)
    while len(rank_processes(launcher)) < 2 or lines_of(run / "metrics.jsonl") < at:
        if launcher.poll() is not None:
            sys.exit(f"it ended before step {at}: " + (folder / "log").read_text()[-3000:])
        time.sleep(0.01)
    processes = rank_processes(launcher)
    time.sleep(chance.random() * 0.2)
    os.kill(processes[chance.randrange(2)], signal.SIGKILL)
    began = time.perf_counter()
    while any(map(is_running, processes.values())):
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if not restarts:
        launcher.wait()
    valid = True
    if checkpoint.has_state(run):
        try:
            checkpoint.read_state(run)
        except InputError as error:
            print(error)
            valid = False
    if not restarts:
        launcher = start(folder, turns.ROOT / "finetune.py", arguments)
    try:
        launcher.wait(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"it did not go on in {MOST_SECONDS} s")
        launcher.terminate()
        launcher.wait()
    return seconds, valid, at


def kills(args):
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        arguments = ["--ckpt=tiny", f"--data={SAMPLE}", *EXACT, f"--max-steps={args.steps}", "--save-every=4",
                     "--batch-size=4", "--micro-tokens=300", "--resume", "--out=run"]
        first = [*arguments, "--lr=1e-30"]  # the weights that it begins with
        first[first.index("--out=run")] = "--out=first"
        first[first.index(f"--max-steps={args.steps}")] = "--max-steps=1"
        finish(start(folder, turns.ROOT / "finetune.py", first), folder)
        finish(start(folder, turns.ROOT / "finetune.py", arguments), folder)
        before = load_file(folder / "first" / "model.safetensors")
        reference = torch.load(folder / "run" / "state" / "training.pt", weights_only=True)["model"]
        moved = distance(reference, before)
        outcomes = []
        for trial in range(args.trials):
            restarts = 3 * (trial % 2)
            seconds, valid, at = kill_one(folder, arguments, args.steps, chance, restarts)
            weights = torch.load(folder / "run" / "state" / "training.pt", weights_only=True)["model"]
            share = distance(weights, reference) / moved
            outcomes.append((restarts, seconds, valid, share))
            print(f"{'--max-restarts' if restarts else 'by hand'}: killed after step {at}, all gone in "
                  f"{seconds:.1f} s, state {'' if valid else 'NOT '}valid, weights differ by {share:.1e}",
                  flush=True)
    print("\n| goes on | trials | down within a minute | longest, s | state valid | weights within 1e-4 "
          "| largest |\n" + "|---" * 7 + "|")
    for name, wanted in (("`--max-restarts 3`, two ranks", 3), ("by hand, one process", 0)):
        of_kind = [outcome[1:] for outcome in outcomes if outcome[0] == wanted]
        if of_kind:
            seconds, valid, shares = zip(*of_kind)
            within = sum(bool(share < BOUND) for share in shares)
            print(f"| {name} | {len(of_kind)} | {sum(s < 60 for s in seconds)} | {max(seconds):.1f} "
                  f"| {sum(valid)} | {within} | {max(shares):.1e} |")


# --- efficiency ---------------------------------------------------------------------------------------------

def timed_finetune(arguments):
    """finetune.py in this process: writes the seconds of the parts of each step to times-RANK.json."""
    times = []
    parts = dict.fromkeys(("waiting for the other rank", "all-reduce", "clip and AdamW"), 0.0)
    add_up, clip, step = distributed.add_up_gradients, torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def timing(part, function):
        def timed(*given, **options):
            if part == "all-reduce":
                began = time.perf_counter()
                distributed.wait_for_all()
                parts["waiting for the other rank"] += time.perf_counter() - began
            began = time.perf_counter()
            result = function(*given, **options)
            parts[part] += time.perf_counter() - began
            if function is step:
                times.append(dict(parts))
                parts.update(dict.fromkeys(parts, 0.0))
                Path(f"times-{distributed.rank()}.json").write_text(json.dumps(times))
            return result
        return timed

    distributed.add_up_gradients = timing("all-reduce", add_up)
    torch.nn.utils.clip_grad_norm_ = timing("clip and AdamW", clip)
    torch.optim.AdamW.step = timing("clip and AdamW", step)
    sys.argv = ["finetune.py", *arguments]
    finetune.main()


def efficiency(args):
    pairs = tables.read_pairs(SAMPLE, needed=("complaint", "response"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, tokenizer = tiny_gpt2([pair.complaint + pair.response for pair in pairs], args.vocabulary)
        config = turns.gpt2_config(args.layers, args.width, max(args.vocabulary, tokenizer.get_vocab_size()))
        torch.manual_seed(0)
        save_model(from_scratch(config), tokenizer, folder / "model")
        print("| | tokens a step | one process, s | two ranks, s | ratio | forward and backward | waiting "
              "| all-reduce | clip and AdamW |\n" + "|---" * 9 + "|")
        for name, more in (("full", []), ("LoRA 16", ["--lora=16"])):
            seconds = {1: [], 2: []}
            parts = []
            for _ in range(args.rounds):
                for ranks in (1, 2):
                    shutil.rmtree(folder / "run", ignore_errors=True)
                    arguments = ["--time", "--ckpt=model", f"--data={SAMPLE}", *EXACT, "--out=run", *more,
                                 f"--max-steps={args.steps}", f"--batch-size={args.batch_size}"]
                    finish(start(folder, __file__, arguments, threads=3 - ranks, ranks=ranks), folder)
                    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
                    metrics = [json.loads(line) for line in lines][1:]  # the first step makes what is kept
                    seconds[ranks].append(statistics.median(line["seconds"] for line in metrics))
                    if ranks == 2:
                        for rank in (0, 1):
                            times = json.loads((folder / f"times-{rank}.json").read_text())[1:]
                            parts += [{**part, "step": line["seconds"]} for part, line in zip(times, metrics)]
            shares = [sum(part[key] for part in parts) / sum(part["step"] for part in parts)
                      for key in ("waiting for the other rank", "all-reduce", "clip and AdamW")]
            tokens = statistics.mean(line["tokens"] for line in metrics)
            print(f"| {name} | {tokens:,.0f} | {statistics.median(seconds[1]):.2f} "
                  f"| {statistics.median(seconds[2]):.2f} | {turns.ratio(seconds[2], seconds[1])} "
                  f"| {1 - sum(shares):.0%} | "
                  + " | ".join(f"{share:.0%}" for share in shares) + " |", flush=True)


# --- rows ---------------------------------------------------------------------------------------------------

def write_pairs(path, rows):
    chance = random.Random(0)
    letters = "ابتثجحخدذرزسشصضطظعغفقكلمنهوي"
    words = ["".join(chance.choices(letters, k=chance.randrange(3, 8))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            text = chance.choices(words, k=14)
            row = {"Question": f"{' '.join(text[:8])} {i}", "Answer": " ".join(text[8:]),
                   "Non-Critical": 0.2, "Neutral": 0.5, "Critical": 0.3}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return words


def watched(folder, arguments):
    """finetune.py on two ranks -> seconds to the first step, largest RssAnon of a rank in bytes"""
    metrics = folder / "run" / "metrics.jsonl"
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.perf_counter()
    launcher = start(folder, turns.ROOT / "finetune.py", arguments, ranks=2)
    first = None
    peak = 0
    while launcher.poll() is None:
        for pid in rank_processes(launcher).values():
            with contextlib.suppress(OSError):  # it has just ended
                peak = max(peak, turns.memory(pid).get("RssAnon", 0))
        if first is None and lines_of(metrics):
            first = time.perf_counter() - began
        time.sleep(0.05)
    finish(launcher, folder)
    return first or time.perf_counter() - began, peak


def rows(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        words = write_pairs(folder / "table.jsonl", 10)
        _, tokenizer = tiny_gpt2(words, 2000)
        torch.manual_seed(0)
        model = from_scratch(turns.gpt2_config(2, 128, tokenizer.get_vocab_size()))
        save_model(model, tokenizer, folder / "model")
        arguments = ["--ckpt=model", "--data=table.jsonl", *EXACT, "--max-steps=3", "--out=run"]
        print("| pairs | table, MB | first step, s | the second time, s | peak of a rank, MiB: encoding "
              "| again | bytes a row beyond the smallest: encoding | again |\n" + "|---" * 8 + "|")
        base = None
        for count in [args.smallest, *args.rows]:
            write_pairs(folder / "table.jsonl", count)
            shutil.rmtree(folder / "runs", ignore_errors=True)
            first, encoding = watched(folder, arguments)
            again, training = watched(folder, arguments)
            base = base or (count, encoding, training)
            a_row = ["–", "–"]
            if count > base[0]:
                a_row = [f"{(peak - least) / (count - base[0]):.0f}" for peak, least in
                         ((encoding, base[1]), (training, base[2]))]
            size = (folder / "table.jsonl").stat().st_size / 1e6
            print(f"| {count:,} | {size:,.0f} | {first:.0f} | {again:.0f} | {encoding / 2 ** 20:,.0f} "
                  f"| {training / 2 ** 20:,.0f} | {a_row[0]} | {a_row[1]} |", flush=True)


def main():
    if sys.argv[1:2] == ["--time"]:
        return timed_finetune(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("kills")
    part.set_defaults(measure=kills)
    part.add_argument("--trials", type=int, default=10)
    part.add_argument("--steps", type=int, default=16)
    part.add_argument("--seed", type=int, default=0)
    part = parts.add_parser("efficiency")
    part.set_defaults(measure=efficiency)
    part.add_argument("--layers", type=int, default=4)
    part.add_argument("--width", type=int, default=512)
    part.add_argument("--vocabulary", type=int, default=8000)
    part.add_argument("--batch-size", type=int, default=16)
    part.add_argument("--steps", type=int, default=6)
    part.add_argument("--rounds", type=int, default=2)
    part = parts.add_parser("rows")
    part.set_defaults(measure=rows)
    part.add_argument("--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    part.add_argument("--smallest", type=int, default=20_000)
    args = parser.parse_args()
    args.measure(args)


if __name__ == "__main__":
    main()
