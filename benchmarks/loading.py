"""load_model against from_pretrained of `transformers`: peak memory and time, for a checkpoint stored in six
ways.

    python benchmarks/loading.py [--dtype fp32|bf16]

The checkpoint is random, in the shape of aragpt2-medium: 369 million parameters, 1.5 GB in fp32. Every load
is a process of its own that reads each parameter once at the end. Peak is the largest resident size less
that before loading, divided by the size of the parameters once loaded; 1 is the least possible. Resident
size has two parts, whose peaks need not coincide: private memory, and pages of mapped files, which the
kernel takes back when it is short (Linux).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from turns import ROOT, add_size_arguments, gpt2_config, machine, memory, need, print_row, reset_peak, size_of

from sevloss.device import DTYPES
from sevloss.models import from_scratch, load_model

KINDS = ("model.safetensors", "three shards", "pytorch_model.bin")


def write(folder, config, tensors, kind):
    """config.json and the tensors, as one .safetensors, as three with an index, or as a .bin."""
    config = config | {"architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "model.safetensors":
        save_file(tensors, folder / kind, {"format": "pt"})
    elif kind == "three shards":
        weight_map = {}
        for i in range(3):
            file = f"model-0000{i + 1}-of-00003.safetensors"
            names = list(tensors)[i::3]
            save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:  # as `transformers` wrote them: the tied head is there once more, on the same storage
        torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / kind)


def load(package, folder, dtype):
    """In the child process: prints what one load cost."""
    if package == "sevloss":
        load_function = load_model
    else:
        from transformers import GPT2LMHeadModel
        load_function = GPT2LMHeadModel.from_pretrained

    def read(folder):
        model = load_function(folder, dtype=DTYPES[dtype])
        # a mapped file costs nothing until it is read
        return model, sum(p.double().abs().sum().item() for p in model.parameters())

    read(ROOT / "tests" / "golden" / "gpt2")  # imports whatever is imported late
    before = memory()
    reset_peak()
    began = time.perf_counter()
    model, total = read(folder)
    seconds = time.perf_counter() - began
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"before": before, "peak": memory()["VmHWM"], "seconds": seconds, "parameters": size,
                      "sum": total}))


def measure(package, folder, dtype):
    """Runs load() in a process and watches both parts of its size, of which the kernel keeps no peak."""
    command = [sys.executable, __file__, "--dtype", dtype, "--load", package, str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    private = mapped = 0
    while child.poll() is None:
        now = memory(child.pid)
        private = max(private, now.get("RssAnon", 0))
        mapped = max(mapped, now.get("RssFile", 0))
        time.sleep(0.002)
    if child.returncode:
        sys.exit(f"loading with {package} failed")
    result = json.loads(child.stdout.read().splitlines()[-1])
    before, size = result["before"], result["parameters"]
    return {"peak": (result["peak"] - before["VmRSS"]) / size,
            "private": (private - before["RssAnon"]) / size,
            "mapped": (mapped - before["RssFile"]) / size,
            "seconds": result["seconds"], "sum": result["sum"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the loaded parameters")
    parser.add_argument("--stored", choices=("fp32", "fp16"), nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS, help="of files")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    add_size_arguments(parser)
    args = parser.parse_args()
    if args.load:
        return load(*args.load, args.dtype)
    need("transformers")

    print(f"parameters loaded as {args.dtype}, {machine()}\n"
          f"{'stored':22} {'loaded by':13} {'peak':>5} {'private':>8} {'mapped':>7} {'seconds':>8}")
    config = gpt2_config(**{"layers": 24, "width": 1024} | size_of(args))
    model = from_scratch(config)
    for stored in args.stored:
        tensors = {name: tensor.to(DTYPES[stored]) for name, tensor in model.state_dict().items()}
        for kind in args.kinds:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), config, tensors, kind)
                ours = measure("sevloss", folder, args.dtype)
                theirs = measure("transformers", folder, args.dtype)
            if abs(ours["sum"] - theirs["sum"]) > 1e-9 * theirs["sum"]:
                sys.exit(f"{stored} {kind}: the parameters differ")
            for package, cost in (("sevloss", ours), ("transformers", theirs)):
                print(f"{stored + ' ' + kind:22} {package:13} {cost['peak']:5.2f} {cost['private']:8.2f} "
                      f"{cost['mapped']:7.2f} {cost['seconds']:8.1f}")
            print_row(f"loading {kind} ({stored}) as {args.dtype}, aragpt2-medium shape", "`transformers`",
                      f"peak {ours['peak']:.1f} against {theirs['peak']:.1f} times the parameters, "
                      f"{ours['seconds'] / theirs['seconds']:.2f} of the time")


if __name__ == "__main__":
    main()
