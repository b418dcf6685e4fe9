"""linear_weighted_token_ce against what people would otherwise write: time and added memory.

    python benchmarks/loss.py [--rows 2048] [--width 768] [--vocabulary 64000] [--device cpu|cuda]
                              [--dtype bf16|fp32] [--repeat 5] [--without-torch]

All of them run forward and backward in turn, on the same tensors, in one process with the same threads and
allocator; their gradients must agree to 1% (fp32 on a CPU: 1e-5). Ratios are of our time to that of each
other one, round by round. Memory is the peak above its level before the call: of the resident size (Linux),
or of what PyTorch allocates on the GPU.
"""

import argparse
import gc
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from turns import add_device_arguments, machine, parse, peak_memory, print_row, ratio, reset_peak, synchronize

from sevloss import report_errors
from sevloss.device import DTYPES
from sevloss.loss import linear_weighted_token_ce


def ours(hidden, head, targets, weights, denominator):
    return linear_weighted_token_ce(hidden, head, targets, weights, denominator=denominator)


def naive(hidden, head, targets, weights, denominator):
    nll = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    return (nll * weights).sum() / denominator


def checkpointed(hidden, head, targets, weights, denominator):
    """Chunks of 256 rows whose logits are computed again in the backward pass."""
    chunks = zip(hidden.split(256), targets.split(256), weights.split(256))
    return sum(checkpoint(naive, h, head, t, w, denominator, use_reentrant=False) for h, t, w in chunks)


def torch_chunked(hidden, head, targets, weights, denominator):
    """PyTorch's own chunks: per-token weights only through reduction="none"."""
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)
    return (nll.float() * weights).sum() / denominator


def measure(function, hidden, head, *rest):
    """One forward and backward pass -> seconds, bytes added, loss."""
    hidden.grad = head.grad = None
    gc.collect()
    before = reset_peak(hidden.device)
    synchronize(hidden.device)
    began = time.perf_counter()
    loss = function(hidden, head, *rest)
    loss.backward()
    synchronize(hidden.device)
    seconds = time.perf_counter() - began
    return seconds, peak_memory(hidden.device) - before, loss.item()


def check_same(name, results, reference, tolerance):
    """results: loss, and gradients of hidden states and head."""
    for ours, theirs in zip(results, reference):
        difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
        if difference > tolerance:
            sys.exit(f"{name}: loss or gradient differs by {difference:.1e}")


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    add_device_arguments(parser)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--without-torch", action="store_true",
                        help="leave F.linear_cross_entropy out: it takes ten times as long")
    args = parse(parser)
    tolerance = 1e-5 if args.dtype == "fp32" and args.device.type == "cpu" else 0.01
    functions = {"naive": naive, "checkpointed chunks": checkpointed, "F.linear_cross_entropy": torch_chunked,
                 "linear_weighted_token_ce": ours}
    if args.without_torch:
        del functions["F.linear_cross_entropy"]

    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    hidden = torch.randn(args.rows, args.width).to(args.device, dtype).requires_grad_()
    head = (torch.randn(args.vocabulary, args.width) * 0.05).to(args.device, dtype).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.rows,)).to(args.device)
    weights = (torch.rand(args.rows) + 0.5).to(args.device)
    seconds = {name: [] for name in functions}
    added = {name: [] for name in functions}
    for turn in range(args.repeat + 1):
        for name, function in functions.items():
            taken, grown, loss = measure(function, hidden, head, targets, weights, 1000.0)
            if turn > 0:  # the first round warms up, and compares
                seconds[name].append(taken)
                added[name].append(grown)
                continue
            results = torch.tensor(loss), hidden.grad.clone(), head.grad.clone()
            if name == "naive":
                reference = results
            check_same(name, results, reference, tolerance)

    shape = f"{args.rows:,} × {args.width} × {args.vocabulary:,}, {args.dtype}"
    print(f"{shape}, {machine(args.device)}; loss and gradients agree")
    added = {name: statistics.median(values) for name, values in added.items()}
    for name in functions:
        print(f"{name:26} {statistics.median(seconds[name]):8.4f} s, {added[name] / 2 ** 20:5,.0f} MiB added")
    our_seconds, our_memory = seconds.pop("linear_weighted_token_ce"), added.pop("linear_weighted_token_ce")
    for name in seconds:
        print_row(f"loss, {shape}", name, f"{ratio(our_seconds, seconds[name])} of the time, "
                                          f"{our_memory / max(1, added[name]):.2f} of the added memory")


if __name__ == "__main__":
    main()
