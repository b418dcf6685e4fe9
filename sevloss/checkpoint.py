"""Run folders and training state: numbered, never overwritten by accident, resumable to the bit.

A run folder is the model one would use: at its top level lie the weights of the best step by validation,
config and tokenizer. state/ holds all that going on needs, the last step's weights included; run.json says
what was asked, metrics.jsonl and validation.json what came out.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from sevloss import InputError, distributed, write_atomically
from sevloss.data import SPLIT_RULE, check_split_rule
from sevloss.inputs import hub

FREE_ON_RESUME = ("resume", "out", "save_every", "device", "dtype", "micro_tokens", "gradient_checkpointing",
                  "compile", "merge")


def new_run(out, kind, resume):
    """`out` as given, or runs/<kind>-001 and so on. One that is not empty is refused without --resume."""
    if out is None:
        if resume:
            raise InputError("--resume needs the run folder: --out RUN")
        numbers = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{kind}-*")]
        last = max((int(number) for number in numbers if number.isdigit()), default=0)
        return Path("runs") / f"{kind}-{last + 1:03d}"
    out = Path(out)
    if resume:
        if not (out / "run.json").is_file():
            raise InputError(f"--resume: {out} holds no run")
        check_layout(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        or_resume = ", or --resume to go on with it" if kind == "finetune" else ""
        raise InputError(f"{out} exists and is not empty: give another --out{or_resume}")
    return out


def check_layout(run):
    """InputError for a run of the older layout, whose top level was the last step's model, or another
    split rule. Folders that are no run pass."""
    if not (Path(run) / "run.json").is_file():
        return
    if (Path(run) / "best").is_dir():
        raise InputError(f"{run} is a run of an older version, its best model is in {run}/best: move that "
                         "folder out of it and give its new path as checkpoint; training cannot go on")
    check_split_rule(hub.read_json(Path(run) / "run.json").get("split_rule"), run)


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_lines(path, lines):
    text = "".join(line + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def keep_lines(path, count):
    """Cuts a file to its first `count` lines: what came after the last save is written again."""
    content = path.read_bytes() if path.is_file() else b""  # bytes: a stop may have cut a letter in half
    lines = content.split(b"\n")[:-1][:count]
    if len(lines) < count:
        raise InputError(f"--resume: {path} has lost lines of the {count} before the last save; start again "
                         "in a new folder")
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(line + b"\n" for line in lines)))


def write_run_json(run, script, arguments, **results):
    """Makes the folder with run.json: what was asked, which versions ran, what the data was."""
    run.mkdir(parents=True, exist_ok=True)
    versions = {package: version(package) for package in ("torch", "tokenizers", "safetensors", "numpy")}
    write_json(run / "run.json", {
        "script": script, "arguments": arguments, "split_rule": SPLIT_RULE, **results,
        "versions": {"python": platform.python_version(), **versions}})


def check_resumed(run, script, arguments, fingerprint):
    """InputError unless arguments and data are those that the run began with."""
    before = hub.read_json(run / "run.json")
    if before.get("script") != script:
        raise InputError(f"--resume: {run} is no run of {script}")
    then = before.get("arguments", {})
    changed = [f"--{name.replace('_', '-')} was {then.get(name)}, is {value}" for name,
               value in arguments.items()
               if name not in FREE_ON_RESUME and then.get(name) != value]
    if changed:
        raise InputError(f"--resume goes on with the same run; changed: {'; '.join(changed)}")
    if before.get("data_fingerprint") != fingerprint:
        raise InputError(f"--resume: the data of {run} has changed since it began; start a new run")


def save_state(run, model, optimizer, scaler, progress):
    """state/training.pt: the weights that learn (the others come from the checkpoint), optimizer, scaler,
    progress and torch's random generators. The order of the examples needs no entry: it follows from seed and
    step."""
    (run / "state").mkdir(exist_ok=True)
    state = {
        "progress": progress,
        "model": weights,
        "optimizer": distributed.whole_state(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    write_atomically(run / "state" / "training.pt", lambda temporary: torch.save(state, temporary))


def load_state(run, model, optimizer, scaler):
    """Undoes save_state on freshly built objects; returns `progress`."""
    path = run / "state" / "training.pt"
    if not path.is_file():
        raise InputError(f"--resume: {run} was stopped before its first save; start it again in a new folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what broken files raise has no common class
        raise InputError(f"--resume: {path} is broken; start a new run, with {run} as --ckpt") from error
    distributed.load_whole(model, optimizer, state["model"], state["optimizer"])
    if state["scaler"]:  # empty where there was nothing to scale
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available():
        for device, rng_state in enumerate(state["cuda_rng"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng_state, device)
    return state["progress"]
