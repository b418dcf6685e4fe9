"""What the benchmarks share: both sides in turn, the ratio with its spread, and a row for the README's table."""

import os
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss.device import cpu_has_bf16  # noqa: E402

DTYPE = "bf16" if cpu_has_bf16() else "fp32"  # what is measured unless --dtype says otherwise
PEERS = {"transformers": "transformers==5.23.0", "peft": "peft==0.21.2", "datasets": "datasets==5.2.0", "pandas": "pandas",
         "bert_score": "bert-score==0.3.13", "openpyxl": "openpyxl"}


def need(*packages):
    """Exits with 1 and what to install where a package to compare with is missing."""
    if missing := [PEERS[package] for package in packages if not find_spec(package)]:
        sys.exit(f"a package to compare with is missing: pip install {' '.join(missing)}")


def take_turns(sides, repeat):
    """sides: {name: function}. Calls each once untimed, then `repeat` rounds of all -> ({name: seconds of each round}, {name: result})."""
    seconds, results = {name: [] for name in sides}, {}
    for turn in range(repeat + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            results[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds, results


def ratio(seconds, to):
    """Seconds of each round of two sides -> "median (least to most)" of the ratio, round by round."""
    ratios = [a / b for a, b in zip(seconds, to)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine():
    """Threads, processor, allocator and version, which are the same for both sides."""
    tuned = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]
    return (f"{torch.get_num_threads()} threads, bf16 {'in hardware' if cpu_has_bf16() else 'emulated'}, "
            f"allocator {' '.join(tuned) or 'default'}, torch {torch.__version__}")


def memory(process="self"):
    """Bytes: VmRSS, its parts RssAnon and RssFile, and VmHWM, the largest VmRSS since reset_peak() (Linux)."""
    lines = (line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")}


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def print_row(work, peer, result):
    """The row of the README's table."""
    words = [os.path.relpath(sys.argv[0], Path(__file__).resolve().parent.parent), *sys.argv[1:]]
    print(f"| {work} | {peer} | {result} | `{' '.join(words)}` |")
