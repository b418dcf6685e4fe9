"""generate() against transformers.generate: greedy, the same weights, prompts and end tokens; tokens/s.

    python benchmarks/generate.py [--model gpt2|qwen] [--rows 32] [--new-tokens 64] [--device cpu|cuda]
                                  [--dtype bf16|fp16|fp32] [--repeat 3]

GPT-2's base shape with random weights and 64,000 words, or the shape of Qwen2.5-0.5B; prompts of 20 to 150
random tokens, all in one batch. The end tokens are chosen from what the model says, so that rows stop at
different lengths. Both sides must answer the same in fp32 on a CPU; else likeliest tokens that nearly tie may
differ.
"""

import argparse
import statistics
import sys
import tempfile

import torch
from tokenizers import Tokenizer, models
from turns import (
    CONFIGS,
    SHAPES,
    add_device_arguments,
    add_size_arguments,
    enlarged,
    machine,
    need,
    parse,
    print_row,
    ratio,
    size_of,
    take_turns,
)

from sevloss import report_errors
from sevloss.device import DTYPES
from sevloss.generate import generate
from sevloss.models import from_scratch, load_model, save_model


def padded_generate(model, prompts, new_tokens, eos_ids):
    """Left-padded, as its documentation says; the new ids of each row without the EOS."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts],
                       device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts],
                        device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                         eos_token_id=list(eos_ids), pad_token_id=0)
    answers = []
    for answer in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(answer) if token in eos_ids), len(answer))
        answers.append(answer[:end])
    return answers


def choose_eos_ids(answers, new_tokens):
    """For every other row a token of it that no row says long before: rows then end at different lengths."""
    first_position = {}  # of each token, in any of the answers
    for answer in answers:
        for position, token in enumerate(answer):
            first_position[token] = min(position, first_position.get(token, position))
    some = answers[::2]
    wanted = (torch.linspace(0.1, 0.9, len(some)) * new_tokens).tolist()
    return {min(answer, key=lambda token: abs(first_position[token] - end))
            for answer, end in zip(some, wanted)}


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="gpt2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    add_device_arguments(parser, DTYPES)
    parser.add_argument("--repeat", type=int, default=3)
    add_size_arguments(parser)
    args = parse(parser)
    need("transformers")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIGS[args.model](**size_of(args))
    model = enlarged(from_scratch(config))  # or a random model says one token for ever
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Tokenizer(models.BPE()), folder)
        ours = load_model(folder, dtype=DTYPES[args.dtype], device=args.device)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
        theirs.to(args.device).eval()
    lengths = torch.linspace(20, 150, args.rows).int().tolist()
    prompts = [torch.randint(1, config["vocab_size"], (length,)).tolist() for length in lengths]
    eos_ids = choose_eos_ids(generate(ours, prompts, max_new_tokens=args.new_tokens), args.new_tokens)

    seconds, answers = take_turns({
        "sevloss": lambda: generate(ours, prompts, max_new_tokens=args.new_tokens, eos_ids=tuple(eos_ids)),
        "transformers": lambda: padded_generate(theirs, prompts, args.new_tokens, eos_ids)},
        args.repeat, args.device)
    same = sum(a == b for a, b in zip(answers["sevloss"], answers["transformers"]))
    if args.dtype == "fp32" and args.device.type == "cpu" and same != args.rows:
        sys.exit(f"only {same} of {args.rows} answers are the same")

    lengths = sorted(map(len, answers["sevloss"]))
    work = f"{args.rows} prompts, answers of {lengths[0]} to {lengths[-1]} tokens, {args.dtype}"
    print(f"{work}, {machine(args.device)}; {same} of {args.rows} answers are the same")
    for name, values in seconds.items():
        print(f"{name:13} {sum(lengths) / statistics.median(values):8.1f} tokens/s")
    print_row(f"decoding, {SHAPES[args.model]}, {work}", "`transformers.generate`",
              f"{ratio(seconds['transformers'], seconds['sevloss'])} times the tokens/s")


if __name__ == "__main__":
    main()
