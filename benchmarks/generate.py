"""generate() against transformers.generate: greedy, with a cache, the same weights, prompts and end tokens, both in one batch.

    python benchmarks/generate.py [--rows 32] [--new-tokens 64] [--vocabulary 64000] [--dtype bf16|fp32] [--repeat 3]

GPT-2's base shape with random weights; prompts of 20 to 150 random tokens. The end tokens are chosen from what the model says, so that
rows stop at different lengths. Both sides must answer the same in fp32; in bf16 likeliest tokens that nearly tie may differ.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from turns import DTYPE, machine, need, print_row, ratio, take_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss.generate import generate  # noqa: E402
from sevloss.models import from_scratch, load_model, save_model  # noqa: E402


def peer(model, prompts, new_tokens, eos_ids):
    """Left-padded, as its documentation says; the new ids of each row without the EOS."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(eos_ids),
                         pad_token_id=0)
    answers = out[:, longest:].tolist()
    return [a[:next((i for i, token in enumerate(a) if token in eos_ids), len(a))] for a in answers]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    need("transformers")
    from transformers import AutoModelForCausalLM
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = from_scratch(dict(model_type="gpt2", vocab_size=args.vocabulary, n_positions=1024, n_embd=768, n_layer=12, n_head=12))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 4 if parameter.dim() == 2 else 1  # or a random model says one token for ever
        save_model(model, Tokenizer(models.BPE()), folder)
        ours, theirs = load_model(folder, dtype=dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompts = [torch.randint(1, args.vocabulary, (int(n),)).tolist() for n in torch.linspace(20, 150, args.rows)]
    free = generate(ours, prompts, max_new_tokens=args.new_tokens)
    # Every other row stops somewhere, with a token that no row says early.
    earliest = {token: min(a.index(token) for a in free if token in a) for answer in free for token in answer}
    wanted = torch.linspace(0.1, 0.9, len(free[::2])) * args.new_tokens
    eos_ids = {min(answer, key=lambda token: abs(earliest[token] - w)) for answer, w in zip(free[::2], wanted.tolist())}

    seconds, answers = take_turns({
        "sevloss": lambda: generate(ours, prompts, max_new_tokens=args.new_tokens, eos_ids=tuple(eos_ids)),
        "transformers": lambda: peer(theirs, prompts, args.new_tokens, eos_ids)}, args.repeat)
    lengths = sorted(map(len, answers["sevloss"]))
    same = sum(a == b for a, b in zip(answers["sevloss"], answers["transformers"]))
    if args.dtype == "fp32" and same != args.rows:
        sys.exit(f"only {same} of {args.rows} answers are the same")
    tokens = sum(lengths)
    print(f"{args.rows} prompts, answers of {lengths[0]} to {lengths[-1]} tokens (median {statistics.median(lengths):.0f}), {args.dtype}, "
          f"{machine()}; {same} of {args.rows} answers are the same")
    for name, values in seconds.items():
        print(f"{name:13} {tokens / statistics.median(values):8.1f} tokens/s")
    print_row(f"decoding, GPT-2 base shape, {args.rows} prompts, answers of {lengths[0]} to {lengths[-1]} tokens, {args.dtype}",
              "`transformers.generate`", f"{ratio(seconds['transformers'], seconds['sevloss'])} times the tokens/s")


if __name__ == "__main__":
    main()
