"""Training state and run folders: numbered, never overwritten by accident; state and records never stand there half written."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from sevloss import InputError, write_atomically
from sevloss.inputs import hub
from sevloss.models import save_model


def new_run(out, kind, resume):
    """The run folder: `out` as given, or runs/<kind>-001 and so on. A folder that is not empty is refused without --resume."""
    if out is None:
        if resume:
            raise InputError("--resume needs the run folder: --out RUN")
        taken = [int(p.name.rpartition("-")[2]) for p in Path("runs").glob(f"{kind}-*") if p.name.rpartition("-")[2].isdigit()]
        out = Path("runs") / f"{kind}-{max(taken, default=0) + 1:03d}"
    out = Path(out)
    if resume and not (out / "run.json").is_file():
        raise InputError(f"--resume: {out} holds no run")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        or_resume = ", or --resume to go on with it" if kind == "finetune" else ""
        raise InputError(f"{out} exists and is not empty: give another --out{or_resume}")
    return out


def write_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8"))


def write_run_json(run, script, arguments, **facts):
    """Makes the folder with run.json: what was asked (paths as typed), which versions ran, what the data was."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", {
        "script": script, "arguments": arguments, **facts,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "tokenizers", "safetensors", "numpy")}},
    })


def check_resumed(run, script, arguments, fingerprint, free=("resume", "out", "save_every", "device", "dtype", "micro_tokens")):
    """Resuming must be the same run: the arguments that shape it and the data may not have changed."""
    before = hub.read_json(run / "run.json")
    if before.get("script") != script:
        raise InputError(f"--resume: {run} is no run of {script}")
    then = before.get("arguments", {})
    changed = [f"--{name.replace('_', '-')} was {then.get(name)}, is {value}" for name, value in arguments.items()
               if name not in free and then.get(name) != value]
    if changed:
        raise InputError(f"--resume goes on with the same run; changed: {'; '.join(changed)}")
    if before.get("data_fingerprint") != fingerprint:
        raise InputError(f"--resume: the data of {run} has changed since it began; start a new run")


def save_state(run, model, tokenizer, optimizer, scaler, schedule, progress):
    """The last step's model at the top of the run, and state/training.pt with all that going on needs, torch's random generators
    included. The order of the examples needs none: it follows from seed and step."""
    (run / "state").mkdir(exist_ok=True)
    state = {
        "progress": progress, "model": trainable(model), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        "schedule": schedule.state_dict(), "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    save_model(model, tokenizer, run)  # first: a stop in between is made good by going on from the state before
    write_atomically(run / "state" / "training.pt", lambda path: torch.save(state, path))


def trainable(model):
    """{name: parameter} of those that learn: all, or the adapters of LoRA; the rest comes from the checkpoint."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_state(run, model, optimizer, scaler, schedule):
    """Undoes save_state on freshly built objects; returns `progress`."""
    path = run / "state" / "training.pt"
    if not path.is_file():
        raise InputError(f"--resume: {run} was stopped before its first save; start it again in a new folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what broken files raise has no common class
        raise InputError(f"--resume: {path} is broken; start again in a new folder, from {run} or its best/ as --ckpt") from error
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where there was nothing to scale
        scaler.load_state_dict(state["scaler"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    return state["progress"]


def keep_lines(path, count):
    """Cuts a file of lines to its first `count`: what a stopped run wrote after its last save is written again."""
    lines = path.read_bytes().split(b"\n")[:-1][:count] if path.is_file() else []  # bytes: a stop may have cut a letter in half
    if len(lines) < count:
        raise InputError(f"--resume: {path} has lost lines of the {count} before the last save; start again in a new folder")
    write_atomically(path, lambda p: p.write_bytes(b"".join(line + b"\n" for line in lines)))


def write_lines(path, lines):
    text = "".join(line + "\n" for line in lines)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
