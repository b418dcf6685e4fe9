"""load_model against from_pretrained of the package `transformers`: peak memory and time of loading a checkpoint, stored in six ways.

    pip install transformers==5.23.0
    python benchmarks/loading.py [--dtype fp32|bf16]

The checkpoint is random, in the shape of aragpt2-medium: 369 million parameters, 1.5 GB in fp32. Every load is a process of its own
that reads each parameter once at the end. Peak is the largest resident size less that before loading, divided by the size of the
parameters once loaded; 1 is the least possible. Resident size has two parts, whose peaks need not coincide: private memory, and pages of
mapped files, which the kernel takes back when it is short (Linux).
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
from turns import machine, memory, need, print_row, reset_peak

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sevloss.models import from_scratch, load_model  # noqa: E402

CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64_000, "n_positions": 1024, "n_embd": 1024,
          "n_layer": 24, "n_head": 16, "bos_token_id": 0, "eos_token_id": 0}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write(folder, tensors, kind):
    """config.json and the tensors, as one .safetensors, as three with an index, or as a .bin."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if kind == "model.safetensors":
        save_file(tensors, folder / kind, {"format": "pt"})
    elif kind == "three shards":
        names = list(tensors)
        files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}))
    else:  # as `transformers` wrote them: the tied head is there once more, on the same storage
        torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / kind)


def load(package, folder, dtype):
    """In the child process: prints what one load cost."""
    if package == "sevloss":
        function = load_model
    else:
        from transformers import GPT2LMHeadModel
        function = GPT2LMHeadModel.from_pretrained

    def run(folder):
        model = function(folder, dtype=DTYPES[dtype])
        sum(p.sum() for p in model.parameters())  # a mapped file costs nothing until it is read
        return model

    run(ROOT / "tests" / "golden" / "gpt2")  # imports whatever is imported late
    before = memory()
    reset_peak()
    began = time.perf_counter()
    model = run(folder)
    seconds = time.perf_counter() - began
    print(json.dumps({"before": before, "peak": memory()["VmHWM"], "seconds": seconds,
                      "parameters": sum(p.numel() * p.element_size() for p in model.parameters())}))


def measure(package, folder, dtype):
    """Runs load() in a process and watches the parts of its resident size, of which the kernel keeps no peak."""
    command = [sys.executable, __file__, "--dtype", dtype, "--load", package, str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    private = mapped = 0
    while child.poll() is None:
        now = memory(child.pid)
        private, mapped = max(private, now.get("RssAnon", 0)), max(mapped, now.get("RssFile", 0))
        time.sleep(0.002)
    if child.returncode:
        raise SystemExit(f"loading with {package} failed")
    result = json.loads(child.stdout.read().splitlines()[-1])
    before, size = result["before"], result["parameters"]
    return {"peak": (result["peak"] - before["VmRSS"]) / size, "private": (private - before["RssAnon"]) / size,
            "mapped": (mapped - before["RssFile"]) / size, "seconds": result["seconds"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="what the parameters are loaded as")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(*args.load, args.dtype)
    need("transformers")
    print(f"parameters loaded as {args.dtype}, {machine()}\n"
          f"{'stored':22} {'loaded by':13} {'peak':>5} {'private':>8} {'mapped':>7} {'seconds':>8}")
    model = from_scratch(CONFIG)
    for stored in ("fp32", "fp16"):
        tensors = {name: tensor.to(DTYPES[stored]) for name, tensor in model.state_dict().items()}
        for kind in ("model.safetensors", "three shards", "pytorch_model.bin"):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), tensors, kind)
                results = {package: measure(package, folder, args.dtype) for package in ("sevloss", "transformers")}
            for package, r in results.items():
                print(f"{stored + ' ' + kind:22} {package:13} {r['peak']:5.2f} {r['private']:8.2f} {r['mapped']:7.2f} {r['seconds']:8.1f}")
            ours, theirs = results["sevloss"], results["transformers"]
            print_row(f"loading {kind} ({stored}) as {args.dtype}, aragpt2-medium shape", "`transformers`",
                      f"peak {ours['peak']:.1f} against {theirs['peak']:.1f} times the parameters, "
                      f"{ours['seconds'] / theirs['seconds']:.2f} of the time")


if __name__ == "__main__":
    main()
