"""What the benchmarks share: sides that take turns, the ratio with its spread, a row for docs/speed.md.

A GPU works on while Python goes on: a clock is read after `synchronize`.
"""

import os
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # every benchmark imports this file before it imports sevloss
from sevloss.device import choose, choose_device, cpu_has_bf16  # noqa: E402

CPU = torch.device("cpu")
DTYPE = "bf16" if cpu_has_bf16() else "fp32"  # what is measured unless --dtype says otherwise


def need(*packages):
    """Exits with 1 and what to install where a package to compare with is missing."""
    missing = [package for package in packages if not find_spec(package)]
    if missing:
        sys.exit(f"to compare with, install {', '.join(missing)}: pip install -r requirements-dev.txt")


# ------------------------------------------------------------------ where it runs

def add_device_arguments(parser, dtypes=("bf16", "fp32")):
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=dtypes, help="default: bf16 on a GPU or a CPU that has it")


def parse(parser):
    """The arguments, --device a torch.device and --dtype a name."""
    args = parser.parse_args()
    args.device = choose_device(args.device)
    on_cuda = args.device.type == "cuda"
    if on_cuda:
        choose(args.device)  # as in the scripts, products that stay fp32 run in TF32 from here on
    args.dtype = args.dtype or ("bf16" if on_cuda else DTYPE)
    return args


def synchronize(device):
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------ models with random weights

def add_size_arguments(parser):
    """Other sizes than those that are measured, with which the tests run each benchmark in seconds."""
    for name in ("--layers", "--width", "--vocabulary"):
        parser.add_argument(name, type=int, help="of the model, in place of its own")


def size_of(args):
    """The sizes that were given."""
    sizes = {name: getattr(args, name) for name in ("layers", "width", "vocabulary")}
    return {name: size for name, size in sizes.items() if size is not None}


def gpt2_config(layers=12, width=768, vocabulary=64_000):
    """config.json in the shape of GPT-2 base; heads are 64 wide here as in all of them."""
    return dict(model_type="gpt2", vocab_size=vocabulary, n_positions=1024, n_embd=width, n_layer=layers,
                n_head=width // 64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
                bos_token_id=0, eos_token_id=0)


def bert_config(layers=12, width=768, vocabulary=64_000):
    return dict(model_type="bert", vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
                num_attention_heads=width // 64, intermediate_size=4 * width)


def qwen2_config(layers=24, width=896, vocabulary=151_936):
    """The shape of Qwen2.5-0.5B."""
    return dict(model_type="qwen2", vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
                intermediate_size=4864 * width // 896, num_attention_heads=width // 64,
                num_key_value_heads=max(1, width // 448), max_position_embeddings=32768, rope_theta=1e6,
                tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)


CONFIGS = {"gpt2": gpt2_config, "qwen": qwen2_config}
SHAPES = {"gpt2": "GPT-2 base shape", "qwen": "Qwen2.5-0.5B shape"}


# ------------------------------------------------------------------ time and memory

def enlarged(model):
    """The model with its matrices times 4: from random weights, all texts would be nearly alike to it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 4
    return model


def take_turns(sides, repeat, device=CPU):
    """Calls each side once untimed, then all of them in turn, `repeat` times.

    sides: {name: function} -> ({name: seconds of each round}, {name: result})
    """
    seconds = {name: [] for name in sides}
    results = {}
    for turn in range(repeat + 1):
        for name, function in sides.items():
            synchronize(device)
            began = time.perf_counter()
            results[name] = function()
            synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds, results


def ratio(seconds, to):
    """Seconds of each round of two sides -> "median (least to most)" of the ratio of each round."""
    ratios = [a / b for a, b in zip(seconds, to)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def memory(process="self"):
    """Bytes (Linux): VmRSS, its parts RssAnon and RssFile, and VmHWM, VmRSS's peak since reset_peak()."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found


def reset_peak(device=CPU):
    """-> bytes in use now, of which peak_memory counts from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return memory()["VmRSS"]


def peak_memory(device=CPU):
    """Bytes since reset_peak: of a GPU those that PyTorch has allocated, else the process's resident size."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory()["VmHWM"]


# ------------------------------------------------------------------ what is printed

def machine(device=CPU):
    """The GPU, or threads, processor and allocator; and the version. They are the same for both sides."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    tuned = [f"{name}={value}" for name, value in os.environ.items()
             if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]
    return (f"{torch.get_num_threads()} threads, bf16 {'in hardware' if cpu_has_bf16() else 'emulated'}, "
            f"allocator {' '.join(tuned) or 'default'}, torch {torch.__version__}")


def print_row(work, peer, result):
    """A row of the table in docs/speed.md, with the command that makes it again."""
    command = [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    print(f"| {work} | {peer} | {result} | `{' '.join(command)}` |")
