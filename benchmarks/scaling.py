"""What a token of a fine-tuning step costs: by the length of documents and by the number of rows.

    python benchmarks/scaling.py [--model gpt2|qwen-lora] [--lengths 16 64 256 900] [--rows 1 4 16 64]
                                 [--most-tokens 16384] [--repeat 3]

Forward, loss and backward pass of benchmarks/step.py's models, without the optimizer; random ids, every
second token supervised, bf16 where the processor has it. Lengths above 16 differ by up to a tenth, so that
hardly two documents share an attention call: the worst case on a CPU. Microseconds a token, the median of
--repeat steps. A column of the table that stays level says that length costs nothing; a row that falls says
that few tokens cannot fill the processor.
"""

import argparse
import statistics
import tempfile

import numpy as np
import step
from turns import CPU, DTYPE, add_size_arguments, machine, size_of

from sevloss.data import Examples
from sevloss.inputs import tables


def random_examples(rows, length, vocabulary):
    """Examples of `length` ids on average, the second half of each supervised."""
    random = np.random.default_rng(0)
    if length > 16:
        lengths = random.integers(round(0.9 * length), round(1.1 * length) + 1, rows)
    else:
        lengths = np.full(rows, length)
    ids = random.integers(1, vocabulary, lengths.sum(), dtype=np.int32)
    return Examples(ids, lengths, lengths // 2, probabilities=np.zeros((rows, 3), np.float32))


def microseconds_a_token(side, examples, repeat):
    indices = np.arange(len(examples))
    seconds = []
    for _ in range(repeat + 1):
        _, _, parts = side.step(examples, np.ones(len(examples)), indices)
        seconds.append(parts.total() - parts["optimizer"])
    return 1e6 * statistics.median(seconds[1:]) / examples.input_lengths.sum()  # the first warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=step.CONFIGS, default="gpt2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 900])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--most-tokens", type=int, default=16_384, help="combinations with more are left out")
    parser.add_argument("--repeat", type=int, default=3)
    add_size_arguments(parser)
    args = parser.parse_args()
    args.device, args.dtype, args.compile, args.data = CPU, DTYPE, False, tables.SAMPLE  # of step.py
    vocabulary = step.CONFIGS[args.model](**size_of(args))["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        step.make_checkpoint(args, folder)
        side = step.Ours(args, folder)

    print(f"{args.model}, {DTYPE}, {machine()}; microseconds a token\n"
          f"{'tokens a document':>18} " + "".join(f"{rows:>8} rows" for rows in args.rows))
    for length in args.lengths:
        print(f"{length:>18} ", end="")
        for rows in args.rows:
            if rows * length <= args.most_tokens:
                cost = microseconds_a_token(side, random_examples(rows, length, vocabulary), args.repeat)
                print(f"{cost:13.0f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
