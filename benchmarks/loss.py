"""linear_weighted_token_ce against what people would otherwise write: forward and backward, time and added peak memory.

    python benchmarks/loss.py [--rows 2048] [--width 768] [--vocabulary 64000] [--dtype bf16|fp32] [--repeat 5] [--without-torch]

All contenders run in turn, on the same tensors, in one process under the same allocator and threads; their gradients must agree to 1%
(fp32: 1e-5). Ratios are of our time to that of each other one, round by round. Memory is the peak of the resident size above its level
before the call (Linux).
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from turns import DTYPE, machine, memory, print_row, ratio, reset_peak

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss.loss import linear_weighted_token_ce  # noqa: E402


def ours(hidden, head, targets, weights, denominator):
    return linear_weighted_token_ce(hidden, head, targets, weights, denominator=denominator)


def naive(hidden, head, targets, weights, denominator):
    nll = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    return (nll * weights).sum() / denominator


def checkpointed(hidden, head, targets, weights, denominator):
    """Chunks of 256 rows whose logits are computed again in the backward pass."""
    parts = zip(hidden.split(256), targets.split(256), weights.split(256))
    return sum(checkpoint(naive, h, head, t, w, denominator, use_reentrant=False) for h, t, w in parts)


def torch_chunked(hidden, head, targets, weights, denominator):
    """PyTorch's own chunks: per-token weights only through reduction="none"."""
    nll = F.linear_cross_entropy(hidden, head, targets, reduction="none", options=torch.nn.LinearCrossEntropyOptions())
    return (nll.float() * weights).sum() / denominator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--without-torch", action="store_true", help="leave F.linear_cross_entropy out: it takes ten times as long")
    args = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    torch.manual_seed(0)
    hidden = torch.randn(args.rows, args.width).to(dtype).requires_grad_()
    head = (torch.randn(args.vocabulary, args.width) * 0.05).to(dtype).requires_grad_()
    targets, weights = torch.randint(args.vocabulary, (args.rows,)), torch.rand(args.rows) + 0.5
    contenders = {"naive": naive, "checkpointed chunks": checkpointed, "F.linear_cross_entropy": torch_chunked,
                  "linear_weighted_token_ce": ours}
    if args.without_torch:
        del contenders["F.linear_cross_entropy"]
    seconds, peaks, gradients = {n: [] for n in contenders}, {n: [] for n in contenders}, {}
    for turn in range(args.repeat + 1):
        for name, function in contenders.items():
            hidden.grad = head.grad = None
            gc.collect()
            reset_peak()
            before, began = memory()["VmRSS"], time.perf_counter()
            function(hidden, head, targets, weights, 1000.0).backward()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
                peaks[name].append(memory()["VmHWM"] - before)
            elif name == "naive":
                gradients = hidden.grad.clone(), head.grad.clone()
            else:
                for a, b in zip((hidden.grad, head.grad), gradients):
                    difference = ((a.float() - b.float()).norm() / b.float().norm()).item()
                    if difference > (0.01 if args.dtype == "bf16" else 1e-5):
                        sys.exit(f"{name}: gradient differs by {difference:.1e}")
    shape = f"{args.rows:,} × {args.width} × {args.vocabulary:,}, {args.dtype}"
    print(f"{shape}, {machine()}; all gradients agree")
    added = {name: statistics.median(values) for name, values in peaks.items()}
    for name in contenders:
        print(f"{name:26} {statistics.median(seconds[name]):6.2f} s, {added[name] / 2 ** 20:5,.0f} MiB added")
    ours_seconds = seconds.pop("linear_weighted_token_ce")
    for name, theirs in seconds.items():
        print_row(f"loss, {shape}", name, f"{ratio(ours_seconds, theirs)} of the time, "
                                          f"{added['linear_weighted_token_ce'] / added[name]:.2f} of the added memory")


if __name__ == "__main__":
    main()
