"""A fine-tuning step against a plain loop around the model of `transformers` (with `peft` for LoRA): examples/s and peak memory.

    python benchmarks/step.py [--model gpt2|qwen-lora] [--data TABLE] [--examples 16] [--steps 6] [--pad-to 512] [--allocator default|tuned]

gpt2: GPT-2's base shape with 64,000 words, all of it trained; qwen-lora: the shape of Qwen2.5-0.5B, LoRA of rank 16 on q_proj and
v_proj, the base in bf16. Weights are random, dropout is 0, pairs are real, matrix products run in bf16 where the processor has it (and
with --dtype bf16), else all is fp32. AdamW is fused on both sides. The peer pads each batch to its longest row, or to --pad-to tokens as
the published notebooks do. Each side is a process of its own, and they take turns step by step; the losses of the first step must agree to
0.5% (fp32: 1e-5). sevloss tells glibc by itself to keep freed memory (device.keep_freed_memory); --allocator tuned tells both processes,
by environment variables, so that the peer gains as much.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from turns import DTYPE, machine, need, print_row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss import data, device  # noqa: E402
from sevloss.inputs import tables  # noqa: E402
from sevloss.loss import linear_weighted_token_ce, severity_weights  # noqa: E402
from sevloss.models import FAMILIES, build, initial, load_model, load_tokenizer, lora, save_model  # noqa: E402
from sevloss.models.tiny import tiny_gpt2  # noqa: E402

SHAPES = {
    "gpt2": dict(model_type="gpt2", vocab_size=64_000, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
                 embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "qwen-lora": dict(model_type="qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                      num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6,
                      tie_word_embeddings=True),
}
WARM_UP = 2  # steps that are not timed
RANK, ALPHA, TARGETS = 16, 32.0, ["q_proj", "v_proj"]
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}


def make_checkpoint(args, folder):
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"))
    _, tokenizer = tiny_gpt2([t for p in pairs for t in (data.PROMPT.format(complaint=p.complaint), p.response)], vocab_size=64_000)
    shape = SHAPES[args.model] | {"eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.model == "qwen-lora" and args.dtype == "bf16" else torch.float32
    model = build(FAMILIES[shape["model_type"]], shape)
    model.load_state_dict({name: initial(name, t.shape).to(dtype) for name, t in model.state_dict().items()}, assign=True)
    save_model(model, tokenizer, folder)


def batches(args, tokenizer, eos):
    """(list of Examples indices per step, Examples, weights)"""
    pairs = [p for p in tables.read_pairs(args.data, needed=("complaint", "response"))]
    examples = data.encode_pairs(pairs, tokenizer, max_length=512, eos_id=eos, preprocess="none")
    weights = severity_weights(torch.tensor([p.probabilities or (0.2, 0.3, 0.5) for p in pairs]))
    order = np.random.default_rng(0).permutation(len(examples))
    steps = [order[i * args.examples:(i + 1) * args.examples] for i in range(len(order) // args.examples)]
    return steps, examples, weights


class Ours:
    def __init__(self, args, folder):
        low = args.dtype == "bf16"
        self.lora = args.model == "qwen-lora"
        self.model = load_model(folder, dtype=torch.bfloat16 if self.lora and low else torch.float32).train()
        if self.lora:
            torch.manual_seed(1)
            lora.attach(self.model, RANK, alpha=ALPHA, targets=TARGETS)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.compute = device.choose("cpu", args.dtype)
        self.parts = dict.fromkeys(("data", "forward", "head and loss", "backward", "optimizer"), 0.0)

    def step(self, examples, weights, chosen):
        loss_of_step, began = 0.0, time.perf_counter()

        def lap(part):
            nonlocal began
            now = time.perf_counter()
            self.parts[part] += now - began
            began = now
        with self.compute.autocast():
            for part in data.micro_batches(examples.input_lengths, chosen, 4096):
                batch = data.make_batch(examples, part, weights=weights.numpy() / examples.target_counts)
                lap("data")
                hidden = self.model(batch.tokens, batch.lengths)
                lap("forward")
                loss = linear_weighted_token_ce(hidden[batch.supervised_index], self.model.head_weight, batch.targets, batch.weights,
                                                denominator=len(chosen), ignore_index=None)
                lap("head and loss")
                with torch.autocast("cpu", enabled=False):
                    loss.backward()
                loss_of_step += loss.item()
                lap("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lap("optimizer")
        return loss_of_step


class Peer:
    def __init__(self, args, folder):
        from transformers import AutoModelForCausalLM
        low = args.dtype == "bf16"
        self.pad_to = args.pad_to
        lora_run = args.model == "qwen-lora"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if lora_run and low else torch.float32)
        if lora_run:
            from peft import LoraConfig, get_peft_model
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"))
        self.model = model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.dtype = device.DTYPES[args.dtype]
        self.parts = {}

    def step(self, examples, weights, chosen):
        rows = [torch.from_numpy(examples.ids[examples.starts[i]:examples.starts[i + 1]].astype(np.int64)) for i in chosen]
        longest = self.pad_to or max(map(len, rows))
        ids = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
        labels = torch.stack([F.pad(row, (0, longest - len(row)), value=-100) for row in rows])
        labels[torch.arange(longest) < torch.from_numpy(examples.first_target[chosen])[:, None]] = -100
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")  # (B, T - 1)
        loss = (nll.sum(1) * weights[chosen] / torch.from_numpy(examples.target_counts[chosen])).mean()
        loss.backward()
        value = loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value


def work(args, folder):
    """One side, in a process of its own: a step for every line of standard input."""
    tokenizer = load_tokenizer(folder)
    steps, examples, weights = batches(args, tokenizer, tokenizer.token_to_id("<|endoftext|>"))
    side = (Ours if args.side == "sevloss" else Peer)(args, folder)
    print(json.dumps("ready"), file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        chosen = steps[int(line) % len(steps)]
        began = time.perf_counter()
        loss = side.step(examples, weights, chosen)
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss, "tokens": int(examples.input_lengths[chosen].sum()),
                          "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "parts": side.parts}),
              file=sys.__stdout__, flush=True)


def answer(side, process):
    if line := process.stdout.readline():
        return json.loads(line)
    sys.exit(f"{side} ended with code {process.wait()}{': killed, for want of memory?' if process.returncode == -9 else ''}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--examples", type=int, default=16, help="per step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pad-to", type=int, default=0, help="tokens; 0: to the longest row of the batch")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--allocator", choices=("default", "tuned"), default="default")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        with redirect_stdout(sys.stderr):  # what is printed about the table is not for the parent
            return work(args, args.folder)
    need("transformers", *(["peft"] if args.model == "qwen-lora" else []))

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(args, folder)
        os.environ.update(TUNED if args.allocator == "tuned" else {})
        sides = {side: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                 for side in ("sevloss", "transformers")}
        results = {side: [] for side in sides}
        for side, process in sides.items():
            answer(side, process)
        for step in range(WARM_UP + args.steps):
            for side, process in sides.items():
                process.stdin.write(f"{step}\n")
                process.stdin.flush()
                results[side].append(answer(side, process))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    ours, theirs = results["sevloss"], results["transformers"]
    difference = abs(ours[0]["loss"] - theirs[0]["loss"]) / theirs[0]["loss"]
    if difference > (0.005 if args.dtype == "bf16" else 1e-5):
        sys.exit(f"the losses of the first step differ: {ours[0]['loss']:.5f} and {theirs[0]['loss']:.5f}")
    timed = {side: [r["seconds"] for r in steps[WARM_UP:]] for side, steps in results.items()}
    ratios = [b / a for a, b in zip(*timed.values())]
    print(f"{args.model}, {args.examples} examples a step of {statistics.mean(r['tokens'] for r in ours):,.0f} tokens, "
          f"{args.dtype}, {machine()}; losses of the first step {ours[0]['loss']:.5f} and {theirs[0]['loss']:.5f}")
    for side, steps in results.items():
        speed = args.examples * args.steps / sum(timed[side])
        print(f"{side:13} {speed:6.2f} examples/s, peak {steps[-1]['peak'] / 2 ** 30:5.2f} GiB")
    spent = {part: ours[-1]["parts"][part] - ours[WARM_UP - 1]["parts"][part] for part in ours[0]["parts"]}
    print("a step of sevloss: " + ", ".join(f"{part} {seconds / sum(spent.values()):.0%}" for part, seconds in spent.items()))
    shape = {"gpt2": "GPT-2 base shape", "qwen-lora": "Qwen2.5-0.5B shape, LoRA 16"}[args.model]
    print_row(f"step, {shape}, {args.examples} pairs, {args.dtype}, {args.allocator} allocator",
              f"`transformers`{' + `peft`' if args.model == 'qwen-lora' else ''}, padded to {args.pad_to or 'the longest'}",
              f"{sum(timed['transformers']) / sum(timed['sevloss']):.1f} ({min(ratios):.1f} to {max(ratios):.1f} by step) times the "
              f"examples/s, {ours[-1]['peak'] / theirs[-1]['peak']:.2f} of the peak memory")


if __name__ == "__main__":
    main()
