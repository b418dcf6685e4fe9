"""Memory of a device and communication of a step, from the shape of a model: the tables of docs/scale.md,
which explains the formulas.

    python benchmarks/scale.py            # the tables
    python benchmarks/scale.py --measure  # against finetune.py on two ranks of this CPU, in fp32

--measure: bytes of all tensors that are there at once, at the most, in the second step, of two micro-batches
or more, so that gradients are there while activations are. What is scratch inside an operation is not
counted, nor what the allocator keeps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch
import turns
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finetune
from sevloss import distributed
from sevloss.inputs import tables
from sevloss.loss import _chunk_sizes
from sevloss.models import FAMILIES, build, from_scratch, lora, save_model
from sevloss.models.tiny import tiny_gpt2

GIB = 2 ** 30
MICRO_TOKENS = 4096  # finetune.py's default
MICRO_BATCHES = 2  # of each rank in a step
SUPERVISED = 0.5  # share of the tokens that are targets
RANK = 16  # of LoRA
FLOPS = 300e12  # a second, of a device in bf16
LINK, SLOW_LINK, NODE = 300e9, 50e9, 8  # bytes a second of a device, inside a node and between nodes; devices


def gpt2(width, layers, vocabulary=64_000, model_type="gpt2"):
    return {**turns.gpt2_config(layers, width, vocabulary), "model_type": model_type}


def llama(model_type, width, inner, layers, heads, kv_heads, vocabulary, **more):
    return dict(model_type=model_type, vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                tie_word_embeddings=True, eos_token_id=0) | more


LFM2_LAYERS = ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]
SHAPES = {
    "AraGPT2-Base": gpt2(768, 12),
    "GPT2-Small-Arabic": gpt2(768, 12, 50_257),
    "AraGPT2-Medium, Dialect-ar-gpt-2021": gpt2(1024, 24),
    "Bloomz-560M": dict(model_type="bloom", vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16,
                        eos_token_id=0),
    "Qwen2.5-0.5B, Al-Atlas-0.5B": turns.qwen2_config(),
    "Qwen3-0.6B": llama("qwen3", 1024, 3072, 28, 16, 8, 151_936),
    "LFM2-350M": llama("lfm2", 1024, 6656, 16, 16, 8, 65_536, layer_types=LFM2_LAYERS),
    "LFM2-700M": llama("lfm2", 1536, 10_240, 16, 24, 8, 65_536, layer_types=LFM2_LAYERS),
    "Llama, 7B": llama("llama", 4096, 11_008, 32, 32, 32, 32_000, tie_word_embeddings=False),
}


# --- the formulas -------------------------------------------------------------------------------------------

def describe(raw, rank=None):
    """Counts of a model's parameters; it is built without memory. raw: its config.json; rank: of LoRA."""
    family = FAMILIES[raw["model_type"]]
    model = build(family, family.normalize(raw, {}))
    if rank:
        lora.attach(model, rank, alpha=rank)
    everything = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return SimpleNamespace(
        raw=raw, rank=rank, config=model.config, everything=everything, blocks=sum(blocks), block=max(blocks),
        learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        root=everything - sum(blocks), layers=len(blocks), vocabulary=len(model.head_weight),
        width=model.head_weight.shape[1])


def saved_bytes(shape, bits, cpu=False):
    """Bytes that the blocks keep for the backward pass, a token. bits: of products, 16 or 32; cpu: what
    attention and RMSNorm keep there in addition."""
    b = bits // 8
    D, config, full = shape.width, shape.config, not shape.rank
    if shape.raw["model_type"] in ("gpt2", "aragpt2", "bloom"):
        inner = 4 * D
        # products read x, attention q, k and v and their output, GELU and the last product the inner width
        numbers = (1 + 3 + 1 + 1) * D + 2 * inner if full else (1 + 3 + 1) * D + 2 * inner
        if not full and shape.raw["model_type"] == "bloom":  # an adapter on query_key_value alone
            numbers -= inner
        if cpu and (full or shape.raw["model_type"] != "bloom"):
            numbers += D
        return shape.layers * (8 * D + b * numbers)
    heads = config.num_attention_heads * (config.head_dim or D // config.num_attention_heads)  # A of the page
    kv_heads = heads * config.num_key_value_heads // config.num_attention_heads  # K
    inner = config.inner if shape.raw["model_type"] == "lfm2" else config.intermediate_size
    copies = 1 if bits == 32 else 2  # of x in 16 bits: each product that learns has its own
    feed_forward = copies * D + 4 * inner if full else 3 * inner
    attention = 2 * heads + 2 * kv_heads + (copies + (full and bits == 16)) * D
    convolution = 9 * D if full else 4 * D
    if cpu and full:  # the norms' outputs before their weights, attention's output in one piece
        feed_forward += D
        attention += D + heads
    types = getattr(config, "layer_types", None) or ["full_attention"] * shape.layers
    attending = types.count("full_attention")
    total = shape.layers * (8 * D + b * feed_forward) + b * attending * attention
    total += b * (shape.layers - attending) * convolution
    if shape.raw["model_type"] in ("qwen3", "lfm2"):  # what the norms of q and k read
        total += 4 * attending * (heads + kv_heads)
    return total


def memory(shape, *, ranks=1, sharded=False, bits=16, tokens=MICRO_TOKENS, targets=None, device_type="cuda"):
    """{what: bytes} of one device at the peak of a step."""
    targets = int(tokens * SUPERVISED) if targets is None else targets
    full = not shape.rank
    b = bits // 8
    parts = ranks if sharded else 1
    frozen = shape.everything - shape.learning
    head = shape.vocabulary * shape.width

    # gathered or cast for products
    if sharded:
        gathered = b * (shape.root + 2 * shape.block)
    else:
        gathered = 2 * shape.everything if full and bits == 16 else 0

    # the loss: logits of a chunk, softmax of a block; the head's gradient, and its copy in the backward pass
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    chunk, block = _chunk_sizes(device_type, shape.vocabulary, dtype)
    buffers = shape.vocabulary * (min(chunk, targets) * b + 2 * min(block, targets) * 4)
    loss = 4 * head + max(4 * head, buffers) if full else buffers

    activations = tokens * (saved_bytes(shape, bits, device_type == "cpu") + 8 * shape.width)
    # the gradients once more, in one piece; activations and 16-bit copies are gone by then
    all_reduced = 4 * shape.learning if ranks > 1 and not sharded else 0
    return {"weights": (b * frozen + 4 * shape.learning) // parts,
            "gradients": 4 * shape.learning // parts, "moments": 8 * shape.learning // parts,
            "gathered": gathered,
            "activations and loss": max(activations + loss, all_reduced - gathered)}


def communication(shape, ranks, sharded, bits=16, micro_batches=MICRO_BATCHES):
    """Bytes that a device sends in a step."""
    share = (ranks - 1) / ranks
    if not sharded:
        return 2 * share * 4 * shape.learning  # all-reduce of gradients
    gathers = bits // 8 * (2 * shape.blocks + shape.root)
    return share * micro_batches * (gathers + 4 * shape.learning)  # all-gathers, a reduce-scatter


def step_seconds(shape, ranks, sharded, tokens=MICRO_TOKENS, micro_batches=MICRO_BATCHES):
    """-> seconds of computing, seconds of sending. 6 operations a weight and token, 4 where it is frozen; the
    head's for targets alone."""
    operations = 4 if shape.rank else 6
    head = shape.vocabulary * shape.width
    flops = operations * tokens * micro_batches * (shape.blocks + head * SUPERVISED)
    link = LINK if ranks <= NODE else SLOW_LINK
    return flops / FLOPS, communication(shape, ranks, sharded) / link


def label(name, rank):
    return f" | LoRA {rank}" if rank else f"{name} | full"


def print_tables():
    print(f"Memory of a device, GiB: bf16, {MICRO_TOKENS:,} tokens in a micro-batch, half of them targets.\n")
    print("| checkpoint | | parameters | learn | weights | gradients | moments | 16-bit copies "
          "| activations, loss | one device; data-parallel on 8 or 64 | sharded, 8 | sharded, 64 |\n|"
          + "---|" * 12)
    for name, raw in SHAPES.items():
        for rank in (None, RANK):
            shape = describe(raw, rank)
            alone = memory(shape)
            totals = [sum(alone.values())]
            for ranks in (8, 64):
                totals.append(sum(memory(shape, ranks=ranks, sharded=True).values()))
            cells = [f"{value / GIB:.1f}" for value in (*alone.values(), *totals)]
            print(f"| {label(name, rank)} | {shape.everything / 1e6:,.0f} M | {shape.learning / 1e6:,.1f} M "
                  f"| {' | '.join(cells)} |")
    print(f"\nWhat a device sends in a step of {MICRO_BATCHES} micro-batches, GiB; milliseconds of a step: "
          "computing + sending.\n")
    columns = [(8, False), (64, False), (8, True), (64, True)]
    print("| checkpoint | | one device, ms | " + " | ".join(
        f"{'sharded' if s else 'data-parallel'}, {n}: GiB, ms" for n, s in columns) + " |\n|" + "---|" * 7)
    for name, raw in SHAPES.items():
        for rank in (None, RANK):
            shape = describe(raw, rank)
            cells = [f"{step_seconds(shape, 1, False)[0] * 1e3:,.0f}"]
            for n, s in columns:
                computing, sending = (seconds * 1e3 for seconds in step_seconds(shape, n, s))
                cells.append(f"{communication(shape, n, s) / GIB:.2f}, {computing:,.0f} + {sending:,.0f}")
            print(f"| {label(name, rank)} | {' | '.join(cells)} |")


# --- against finetune.py ------------------------------------------------------------------------------------

class LiveTensors(TorchDispatchMode):
    """The bytes of all tensors that operations have read or made and that are still there, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def add(self, *values):
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = getattr(value, "_local_tensor", value).untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        alive = [storage() for storage in self.storages.values()]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(args, kwargs, result)
        return result


def rank_of_measurement(arguments):
    """finetune.py in this process, to the end of its second step: writes what it took."""
    seen = dict(tokens=0, targets=0, steps=0)
    live = LiveTensors()
    adamw, loss, step = finetune.adamw, finetune.linear_weighted_token_ce, torch.optim.AdamW.step

    def note_tokens(model, arguments):
        seen["tokens"] = max(seen["tokens"], len(arguments[0]))

    def noting_targets(hidden, *args, **options):
        seen["targets"] = max(seen["targets"], len(hidden))
        return loss(hidden, *args, **options)

    def making_optimizer(model, *args):
        live.add(*(p.detach() for p in model.parameters()))
        live.__enter__()
        model.register_forward_pre_hook(note_tokens)
        return adamw(model, *args)

    def stepping(optimizer):
        step(optimizer)
        seen["steps"] += 1
        if seen["steps"] == 2:
            seen["peak"] = live.peak
            Path(f"seen-{distributed.rank()}.json").write_text(json.dumps(seen))
            distributed.wait_for_all()
            os._exit(0)
        seen["tokens"] = seen["targets"] = live.peak = 0

    finetune.adamw = making_optimizer
    finetune.linear_weighted_token_ce = noting_targets
    torch.optim.AdamW.step = stepping
    sys.argv = ["finetune.py", *arguments]
    finetune.main()


def measure(raw, rank, sharded, micro_tokens):
    """Two ranks -> (bytes measured, bytes by the formulas), of the one that took more"""
    with redirect_stdout(sys.stderr):
        pairs = tables.read_pairs(SAMPLE, needed=("complaint", "response"))
    texts = [pair.complaint + pair.response for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        _, tokenizer = tiny_gpt2(texts, vocab_size=min(2000, raw["vocab_size"]))
        torch.manual_seed(0)
        save_model(from_scratch({**raw, "eos_token_id": 0}), tokenizer, Path(folder) / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   __file__, "--rank", "--ckpt=model", f"--data={SAMPLE}", "--dtype=fp32", "--device=cpu",
                   "--preprocess=none", "--weighting=none", "--out=run", f"--micro-tokens={micro_tokens}",
                   f"--batch-size={4 * micro_tokens // 60}", "--epochs=9"]
        command += [f"--lora={rank}"] * bool(rank) + ["--shard"] * sharded
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seen = [json.loads(path.read_text()) for path in Path(folder).glob("seen-*.json")]
    if len(seen) != 2:
        sys.exit(done.stdout + done.stderr)
    most = max(seen, key=lambda one: one["peak"])
    predicted = memory(describe(raw, rank), ranks=2, sharded=sharded, bits=32, tokens=most["tokens"],
                       targets=most["targets"], device_type="cpu")
    return most["peak"], sum(predicted.values())


def main():
    if sys.argv[1:2] == ["--rank"]:
        return rank_of_measurement(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--width", type=int, default=256, help="of the models that are measured")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--micro-tokens", type=int, default=256)
    args = parser.parse_args()
    if not args.measure:
        return print_tables()
    shapes = {"GPT-2": gpt2(args.width, args.layers, args.vocabulary),
              "Llama": llama("llama", args.width, 11 * args.width // 4, args.layers, args.width // 64,
                             args.width // 64, args.vocabulary, tie_word_embeddings=False)}
    print("| shape | | two ranks | measured, MiB | by the formulas, MiB | ratio |\n|" + "---|" * 6)
    for name, raw in shapes.items():
        for rank, sharded in ((None, False), (RANK, False), (None, True), (RANK, True)):
            peak, predicted = measure(raw, rank, sharded, args.micro_tokens)
            how = "sharded" if sharded else "data-parallel"
            print(f"| {label(name, rank)} | {how} | {peak / 2 ** 20:,.0f} | {predicted / 2 ** 20:,.0f} "
                  f"| {peak / predicted:.2f} |", flush=True)


if __name__ == "__main__":
    SAMPLE = str(Path(tables.SAMPLE).resolve())
    main()
