"""On a GPU: a fine-tuning step, the loss and decoding against `transformers`, with peak memory.

    python benchmarks/gpu.py [--dtype bf16|fp16|fp32] [--examples 32] [--steps 20] [--device cuda]

GPT-2's base shape with 64,000 words and the shape of Qwen2.5-0.5B, random weights, no dropout. Texts are
random tokens, their lengths those of the pairs in --data. Both sides run on the same device, one after the
other; the first losses must agree to 1% (fp32: 1e-3). The step of `transformers` pads to the longest row of
the batch and forms all logits. Times include all that the device has to do (torch.cuda.synchronize); memory
is CUDA's peak allocation.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from generate import choose_eos_ids, padded_generate
from tokenizers import Tokenizer, models
from turns import add_size_arguments, gpt2_config, need, print_row, qwen2_config, ratio, size_of

from sevloss import data, device
from sevloss.generate import generate
from sevloss.inputs import tables
from sevloss.loss import linear_weighted_token_ce
from sevloss.models import from_scratch, load_model, save_model
from sevloss.models.tiny import tiny_gpt2
from sevloss.optimizer import adamw

SHAPES = {"GPT-2 base shape": gpt2_config, "Qwen2.5-0.5B shape": qwen2_config}
WARM_UP = 4  # rounds that are not timed


def measure(sides, rounds, compute):
    """sides: {name: function that makes a function of the round}; one side at a time, as memory is counted.

    -> ({name: seconds of each timed round}, {name: peak bytes}, {name: result of each round})
    """
    seconds = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    results = {name: [] for name in sides}
    on_cuda = compute.device.type == "cuda"
    for name, make in sides.items():
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        function = make()
        for turn in range(WARM_UP + rounds):
            began = time.perf_counter()
            results[name].append(function(turn))
            if on_cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
        del function
    return seconds, peaks, results


def report(work, seconds, peaks):
    """A row for each side but the last, which the others are compared with."""
    *ours, peer = seconds
    for name, values in seconds.items():
        milliseconds = 1000 * statistics.median(values)
        print(f"  {name:17} {milliseconds:8.1f} ms, peak {peaks[name] / 2 ** 30:5.2f} GiB")
    for name in ours:
        result = f"{ratio(seconds[peer], seconds[name])} times as fast"
        if peaks[peer]:
            result += f", {peaks[name] / peaks[peer]:.2f} of the peak memory"
        print_row(f"{work}, {name}", peer, result)


def make_examples(args, vocabulary):
    """data.Examples of random tokens, as long as the pairs of --data are in the words of a tokenizer trained
    on them."""
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"))
    texts = [text for pair in pairs for text in (data.PROMPT.format(complaint=pair.complaint), pair.response)]
    _, tokenizer = tiny_gpt2(texts, vocab_size=8000)
    examples, _ = data.encode_pairs(pairs, tokenizer, max_length=512, eos_id=0, preprocess="none")
    examples.ids = np.random.default_rng(0).integers(1, vocabulary, len(examples.ids), dtype=np.int32)
    return examples


def our_step(folder, compute, examples, order, size, compiled=False):
    model = load_model(folder, device=compute.device).train()
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)
    optimizer = adamw(model, 1e-5, 0.0)
    scaler = compute.grad_scaler()
    token_weights = 1 / examples.target_counts

    def step(turn):
        indices = np.take(order, range(turn * size, (turn + 1) * size), mode="wrap")
        batch = data.make_batch(examples, indices, compute.device, token_weights)
        with compute.autocast():
            hidden = model(batch.tokens, batch.lengths).index_select(0, batch.supervised_index)
            loss = linear_weighted_token_ce(hidden, model.head_weight, batch.targets, batch.weights,
                                            denominator=size, ignore_index=None)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def their_step(folder, compute, examples, order, size):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(compute.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    scaler = compute.grad_scaler()

    def step(turn):
        indices = np.take(order, range(turn * size, (turn + 1) * size), mode="wrap")
        rows = [torch.from_numpy(examples[i].astype(np.int64)) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(compute.device)
        lengths = torch.tensor([len(row) for row in rows], device=compute.device)[:, None]
        first = torch.from_numpy(examples.first_target[indices].astype(np.int64)).to(compute.device)[:, None]
        position = torch.arange(ids.shape[1], device=compute.device)
        labels = ids.masked_fill((position < first) | (position >= lengths), -100)
        with compute.autocast():
            logits = model(input_ids=ids, attention_mask=(position < lengths).long(), use_cache=False).logits
            nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
            loss = (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def our_loss(hidden, head, targets, weights):
    return linear_weighted_token_ce(hidden, head, targets, weights, denominator=len(hidden),
                                    ignore_index=None)


def plain_loss(hidden, head, targets, weights):
    nll = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
    return (nll * weights).sum() / len(hidden)


def loss_step(loss, compute, rows, width, vocabulary):
    """Forward and backward of the head and the loss alone."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=compute.device, dtype=compute.dtype, requires_grad=True)
    head = (0.05 * torch.randn(vocabulary, width, device=compute.device)).to(compute.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=compute.device)
    weights = torch.rand(rows, device=compute.device) + 0.5

    def step(turn):
        hidden.grad = head.grad = None
        value = loss(hidden, head, targets, weights)
        value.backward()
        return value.item()
    return step


def our_answers(folder, compute, prompts, new_tokens, eos_ids):
    model = load_model(folder, dtype=compute.dtype, device=compute.device)
    return lambda turn: generate(model, prompts, max_new_tokens=new_tokens, eos_ids=eos_ids)


def their_answers(folder, compute, prompts, new_tokens, eos_ids):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute.dtype).to(compute.device).eval()
    return lambda turn: padded_generate(model, prompts, new_tokens, eos_ids)


def check_equal(results, compute):
    """The first losses of all sides agree to 1% (fp32: 1e-3)."""
    first = {name: values[0] for name, values in results.items()}
    bound = 1e-3 if compute.dtype == torch.float32 else 1e-2
    if max(first.values()) > (1 + bound) * min(first.values()):
        sys.exit(f"the losses of the first step differ: {first}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--dtype", choices=("auto", *device.DTYPES), default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--examples", type=int, default=32, help="per step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8192, help="of the loss alone")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    add_size_arguments(parser)
    args = parser.parse_args()
    need("transformers")
    compute = device.choose(args.device, args.dtype)
    name = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else "CPU"
    print(f"{name}; {compute}; torch {torch.__version__}")

    for shape, make_config in SHAPES.items():
        config = make_config(**size_of(args))
        vocabulary = config["vocab_size"]
        torch.manual_seed(0)
        examples = make_examples(args, vocabulary)
        order = np.random.default_rng(0).permutation(len(examples))
        with tempfile.TemporaryDirectory() as folder:
            save_model(from_scratch(config), Tokenizer(models.BPE()), folder)

            # a fine-tuning step: weights in fp32, products in --dtype
            arguments = folder, compute, examples, order, args.examples
            sides = {"sevloss": partial(our_step, *arguments)}
            if compute.device.type == "cuda":
                sides["sevloss, --compile"] = partial(our_step, *arguments, compiled=True)
            sides["transformers"] = partial(their_step, *arguments)
            seconds, peaks, losses = measure(sides, args.steps, compute)
            check_equal(losses, compute)
            report(f"step, {shape}, {args.examples} pairs", seconds, peaks)

            # decoding, weights in --dtype
            lengths = np.linspace(20, 150, args.prompts).astype(int)
            prompts = [torch.randint(1, vocabulary, (length,)).tolist() for length in lengths]
            whole = our_answers(folder, compute, prompts, args.new_tokens, ())(0)
            eos_ids = tuple(choose_eos_ids(whole, args.new_tokens))
            arguments = folder, compute, prompts, args.new_tokens, eos_ids
            sides = {"sevloss": partial(our_answers, *arguments),
                     "transformers": partial(their_answers, *arguments)}
            seconds, peaks, answers = measure(sides, 3, compute)
            same = sum(a == b for a, b in zip(answers["sevloss"][0], answers["transformers"][0]))
            print(f"  {same} of {args.prompts} answers are the same")
            report(f"decoding, {shape}, {args.prompts} prompts", seconds, peaks)

        # the head and the loss alone
        arguments = compute, args.rows, config.get("n_embd") or config.get("hidden_size"), vocabulary
        sides = {"sevloss": partial(loss_step, our_loss, *arguments),
                 "plain logits": partial(loss_step, plain_loss, *arguments)}
        seconds, peaks, losses = measure(sides, 5, compute)
        check_equal(losses, compute)
        report(f"loss, {args.rows:,} × {arguments[2]} × {vocabulary:,}", seconds, peaks)


if __name__ == "__main__":
    main()
