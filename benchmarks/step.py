"""A fine-tuning step against a plain loop around the model of `transformers`: examples/s and peak memory.

    python benchmarks/step.py [--model gpt2|qwen|qwen-lora] [--data TABLE] [--examples 16] [--steps 6]
                              [--pad-to 512] [--device cpu|cuda] [--dtype bf16|fp16|fp32] [--compile]
                              [--allocator default|tuned]

gpt2: GPT-2's base shape with 64,000 words; qwen: the shape of Qwen2.5-0.5B; all of it trained. qwen-lora: the
same with LoRA of rank 16 on q_proj and v_proj (`peft` on the peer's side), the base in bf16. Weights are
random, dropout is 0, pairs are real, matrix products run in --dtype. AdamW is fused on both sides. The peer
pads each batch to its longest row, or to --pad-to tokens as the published notebooks do. Each side is a
process of its own, and they take turns step by step; loss and gradient norm of the first step must agree
(LoRA: the loss alone) to 0.5% and 2%, in fp32 to 1e-5 and 1e-4, on a GPU to 1e-3. Memory is the largest
resident size (Linux), or what PyTorch allocates on the GPU. --compile is for a GPU, and for sevloss's side
alone. sevloss tells glibc by itself to keep freed memory (device.keep_freed_memory); --allocator tuned tells
both processes, by environment variables, so that the peer gains as much.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout

import numpy as np
import torch
import torch.nn.functional as F
import turns

from sevloss import data, device, report_errors
from sevloss.inputs import tables
from sevloss.loss import linear_weighted_token_ce, severity_weights
from sevloss.models import from_scratch, load_model, load_tokenizer, lora, save_model
from sevloss.models.tiny import tiny_gpt2

CONFIGS = {**turns.CONFIGS, "qwen-lora": turns.qwen2_config}
SHAPES = {**turns.SHAPES, "qwen-lora": "Qwen2.5-0.5B shape, LoRA 16"}
PEERS = {"gpt2": ("transformers",), "qwen": ("transformers",), "qwen-lora": ("transformers", "peft")}
RANK, ALPHA, TARGETS = 16, 32.0, ["q_proj", "v_proj"]
WARM_UP = {"cpu": 2, "cuda": 4}  # steps that are not timed
MICRO_TOKENS = 4096  # finetune.py's default
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}


def parameter_dtype(args):
    """A frozen base is stored in the dtype it is computed in."""
    return device.DTYPES[args.dtype] if args.model == "qwen-lora" else torch.float32


def make_checkpoint(args, folder):
    config = CONFIGS[args.model](**turns.size_of(args))
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"))
    texts = [data.PROMPT.format(complaint=pair.complaint) + pair.response for pair in pairs]
    _, tokenizer = tiny_gpt2(texts, vocab_size=min(64_000, config["vocab_size"]))
    config["eos_token_id"] = tokenizer.token_to_id("<|endoftext|>")
    torch.manual_seed(0)
    model = turns.enlarged(from_scratch(config))  # or the loss is nearly that of any other text
    save_model(model.to(parameter_dtype(args)), tokenizer, folder)


def read_steps(args, tokenizer):
    """-> (indices of the examples of each step, Examples, their severity weights (n,))"""
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"))
    eos_id = tokenizer.token_to_id("<|endoftext|>")
    examples, _ = data.encode_pairs(pairs, tokenizer, max_length=512, eos_id=eos_id, preprocess="none")
    weights = severity_weights(torch.from_numpy(examples.probabilities)).numpy()
    order = np.random.default_rng(0).permutation(len(examples))
    starts = range(0, len(order) - args.examples + 1, args.examples)
    return [order[start:start + args.examples] for start in starts], examples, weights


class Stopwatch:
    """Seconds of the parts of a step."""

    def __init__(self):
        self.parts = Counter()
        self.last = time.perf_counter()

    def lap(self, part):
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now


class Ours:
    """The step of finetune.py."""

    def __init__(self, args, folder):
        self.model = load_model(folder, dtype=parameter_dtype(args)).train()
        if args.model == "qwen-lora":
            torch.manual_seed(1)
            lora.attach(self.model, RANK, alpha=ALPHA, targets=TARGETS)
        self.model.to(args.device)
        if args.compile:
            for block in self.model.blocks:
                block.compile(dynamic=True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.compute = device.choose(args.device, args.dtype)
        self.scaler = self.compute.grad_scaler()

    def step(self, examples, weights, indices):
        """-> (loss, gradient norm, {part: seconds})"""
        watch = Stopwatch()
        loss_of_step = 0.0
        token_weights = weights / examples.target_counts
        for part in data.micro_batches(examples.input_lengths, indices, MICRO_TOKENS):
            batch = data.make_batch(examples, part, self.compute.device, token_weights)
            watch.lap("data")
            with self.compute.autocast():
                hidden = self.model(batch.tokens, batch.lengths)  # (N, D)
                watch.lap("forward")
                hidden = hidden.index_select(0, batch.supervised_index)  # (S, D)
                loss = linear_weighted_token_ce(hidden, self.model.head_weight, batch.targets, batch.weights,
                                                denominator=len(indices), ignore_index=None)
                watch.lap("head and loss")
            self.scaler.scale(loss).backward()
            loss_of_step += loss.detach()
            watch.lap("backward")
        norm = update(self)
        watch.lap("optimizer")
        return loss_of_step.item(), norm.item(), watch.parts


class Peer:
    """A plain loop: a padded batch, all its logits, cross_entropy."""

    def __init__(self, args, folder):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=parameter_dtype(args))
        if args.model == "qwen-lora":
            from peft import LoraConfig, get_peft_model
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS,
                                                     task_type="CAUSAL_LM"))
        self.model = model.to(args.device).train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        if args.device.type == "cuda":
            self.compute = device.choose(args.device, args.dtype)  # TF32, as on the other side
        else:  # device.choose would tune the allocator
            self.compute = device.Compute(args.device, device.DTYPES[args.dtype], "as asked")
        self.scaler = self.compute.grad_scaler()
        self.pad_to = args.pad_to

    def step(self, examples, weights, indices):
        rows = [examples[i].astype(np.int64) for i in indices]
        longest = max(self.pad_to, *map(len, rows))
        to = self.compute.device
        ids = torch.stack([F.pad(torch.from_numpy(row), (0, longest - len(row))) for row in rows])  # (B, T)
        ids = ids.to(to)
        positions = torch.arange(longest, device=to)
        mask = positions < torch.tensor([len(row) for row in rows], device=to)[:, None]
        prompt = positions < torch.from_numpy(examples.first_target[indices]).to(to)[:, None]
        labels = ids.masked_fill(prompt | ~mask, -100)
        token_weights = torch.from_numpy(weights[indices] / examples.target_counts[indices]).float().to(to)
        with self.compute.autocast():
            logits = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            logits = logits[:, :-1].float().flatten(0, 1)  # (B (T - 1), V)
            nll = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        loss = (nll.view(len(rows), -1).sum(1) * token_weights).mean()
        self.scaler.scale(loss).backward()
        norm = update(self)
        return loss.item(), norm.item(), {}


def update(side):
    """Clips and steps, the same for both -> gradient norm."""
    side.scaler.unscale_(side.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(side.parameters, 1.0)
    side.scaler.step(side.optimizer)
    side.scaler.update()
    side.optimizer.zero_grad(set_to_none=True)
    return norm


def work(args):
    """One side, in a process of its own: a step for every line of standard input."""
    tokenizer = load_tokenizer(args.folder)
    steps, examples, weights = read_steps(args, tokenizer)
    side = Ours(args, args.folder) if args.side == "sevloss" else Peer(args, args.folder)
    print(json.dumps("ready"), file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        indices = steps[int(line) % len(steps)]
        began = time.perf_counter()
        loss, norm, parts = side.step(examples, weights, indices)
        turns.synchronize(args.device)
        seconds = time.perf_counter() - began
        result = {"seconds": seconds, "loss": loss, "norm": norm, "parts": parts,
                  "peak": turns.peak_memory(args.device),
                  "tokens": int(examples.input_lengths[indices].sum())}
        print(json.dumps(result), file=sys.__stdout__, flush=True)


def read_answer(side, process):
    line = process.stdout.readline()
    if not line:
        code = process.wait()
        sys.exit(f"{side} ended with code {code}{': killed, for want of memory?' if code == -9 else ''}")
    return json.loads(line)


def measure(folder, steps):
    """Both sides in turn, step by step -> {side: [result of each step]}"""
    processes = {}
    for side in ("sevloss", "transformers"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for side, process in processes.items():
        read_answer(side, process)  # it is ready
    results = {side: [] for side in processes}
    for step in range(steps):
        for side, process in processes.items():
            print(step, file=process.stdin, flush=True)
            results[side].append(read_answer(side, process))
    for process in processes.values():
        process.communicate()
    return results


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="gpt2")
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--examples", type=int, default=16, help="per step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pad-to", type=int, default=0, help="tokens; 0: to the longest row of the batch")
    turns.add_device_arguments(parser, device.DTYPES)
    parser.add_argument("--compile", action="store_true", help="the blocks of sevloss's model")
    parser.add_argument("--allocator", choices=("default", "tuned"), default="default")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    turns.add_size_arguments(parser)
    args = turns.parse(parser)
    if args.side:
        with redirect_stdout(sys.stderr):  # what is printed about the table is not for the parent
            return work(args)
    turns.need(*PEERS[args.model])
    if args.allocator == "tuned":
        os.environ.update(TUNED)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(args, folder)
        warm_up = WARM_UP[args.device.type]
        results = measure(folder, warm_up + args.steps)

    ours, theirs = results["sevloss"], results["transformers"]
    if args.dtype != "fp32":
        tolerances = {"loss": 0.005, "norm": 0.02}
    elif args.device.type == "cpu":
        tolerances = {"loss": 1e-5, "norm": 1e-4}
    else:
        tolerances = {"loss": 1e-3, "norm": 1e-3}
    if args.model == "qwen-lora":  # each side draws A anew
        del tolerances["norm"]
    for name, tolerance in tolerances.items():
        first, other = ours[0][name], theirs[0][name]
        if abs(first - other) / other > tolerance:
            sys.exit(f"the first step differs in its {name}: {first:.5f} and {other:.5f}")
    tokens = statistics.mean(result["tokens"] for result in ours)
    print(f"{args.model}, {args.examples} examples a step of {tokens:,.0f} tokens, {args.dtype}, "
          f"{turns.machine(args.device)}; losses {ours[0]['loss']:.5f} and {theirs[0]['loss']:.5f}")
    seconds = {side: [r["seconds"] for r in steps[warm_up:]] for side, steps in results.items()}
    peaks = {side: steps[-1]["peak"] for side, steps in results.items()}
    for side in results:
        speed = args.examples * args.steps / sum(seconds[side])
        print(f"{side:13} {speed:6.2f} examples/s, peak {peaks[side] / 2 ** 30:5.2f} GiB")
    if args.device.type == "cpu":  # a GPU is still at work when Python goes on to the next part
        parts = sum((Counter(r["parts"]) for r in ours[warm_up:]), Counter())
        shares = [f"{part} {spent / parts.total():.0%}" for part, spent in parts.items()]
        print("a step of sevloss: " + ", ".join(shares))
    ratios = [b / a for a, b in zip(seconds["sevloss"], seconds["transformers"])]
    speed = sum(seconds["transformers"]) / sum(seconds["sevloss"])
    turns.print_row(
        f"step, {SHAPES[args.model]}, {args.examples} pairs, {args.dtype}, {args.allocator} allocator",
        f"`{'` + `'.join(PEERS[args.model])}`, padded to {args.pad_to or 'the longest'}",
        f"{speed:.1f} ({min(ratios):.1f} to {max(ratios):.1f} by step) times the examples/s, "
        f"{peaks['sevloss'] / peaks['transformers']:.2f} of the peak memory")


if __name__ == "__main__":
    main()
