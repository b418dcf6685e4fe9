"""What a token of a fine-tuning step costs: by the length of documents and by the number of rows.

    python benchmarks/scaling.py [--model gpt2|qwen-lora] [--lengths 16 64 256 900] [--rows 1 4 16 64] [--most-tokens 16384]

Forward, loss and backward pass of benchmarks/step.py's models, without the optimizer; random ids, every second token supervised, bf16
where the processor has it.
Lengths above 16 differ by up to a tenth, so that hardly two documents share an attention call: the worst case on a CPU. Microseconds a
token, the median of --repeat steps. A column of the table that stays level says that length costs nothing; a row that falls says that few
tokens cannot fill the processor.
"""

import argparse
import statistics
import tempfile

import numpy as np
import step
import torch
from turns import DTYPE, machine


def documents(rows, length, vocabulary):
    """Examples of `length` ids on average, the second half of each supervised."""
    random = np.random.default_rng(0)
    lengths = random.integers(round(0.9 * length), round(1.1 * length) + 1, rows) if length > 16 else np.full(rows, length)
    return step.data.Examples(random.integers(1, vocabulary, lengths.sum(), dtype=np.int32), np.cumsum([0, *lengths]), lengths // 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=step.SHAPES, default="gpt2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 900])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--most-tokens", type=int, default=16_384, help="combinations with more are left out")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    args.dtype, args.data = DTYPE, step.tables.SAMPLE
    with tempfile.TemporaryDirectory() as folder:
        step.make_checkpoint(args, folder)
        side = step.Ours(args, folder)
    print(f"{args.model}, {DTYPE}, {machine()}; microseconds a token\n"
          f"{'tokens a document':>18} " + "".join(f"{r:>8} rows" for r in args.rows))
    for length in args.lengths:
        cells = []
        for rows in args.rows:
            if rows * length > args.most_tokens:
                cells.append(f"{'':13}")
                continue
            examples, seconds = documents(rows, length, step.SHAPES[args.model]["vocab_size"]), []
            for _ in range(args.repeat + 1):
                before = sum(side.parts.values()) - side.parts["optimizer"]
                side.step(examples, torch.ones(rows), np.arange(rows))
                seconds.append(sum(side.parts.values()) - side.parts["optimizer"] - before)
            cells.append(f"{1e6 * statistics.median(seconds[1:]) / examples.input_lengths.sum():13.0f}")  # the first warms up
        print(f"{length:>18} " + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
