"""Run folders and training state: numbered, locked, never overwritten by accident, resumable to the bit.

A run folder is the model one would use: at its top level lie the weights of the best step by validation,
config and tokenizer. state/ holds all that going on needs, the last step's weights included; run.json says
what was asked, metrics.jsonl and validation.json what came out.
"""

import contextlib
import hashlib
import os
import platform
import secrets
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from sevloss import (
    InputError,
    distributed,
    flush_to_disk,
    interpreting,
    lock,
    write_atomically,
    write_json,
    writing,
)
from sevloss.data import SPLIT_RULE, check_split_rule, digest
from sevloss.inputs import hub

# The number of steps may grow, --lr may change where the numbers had left their range, and tables may lie
# elsewhere: their fingerprints must be the same
FREE_ON_RESUME = ("resume", "out", "save_every", "device", "dtype", "micro_tokens", "gradient_checkpointing",
                  "compile", "deterministic", "merge", "epochs", "max_steps", "data", "validation")
BEGUN = {".lock", "run.json", "metrics.jsonl", "state"}  # what a start leaves that was stopped before a save
CHECKSUM = 32  # bytes of SHA-256


# --- the folder ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_run(out, kind, resume=False):
    """The run folder, which no other process can open until this one is done: `out` as given, or
    runs/<kind>-001 and so on. InputError where it holds something that would be lost."""
    if out is None and resume:
        raise InputError("--resume needs the run folder: --out RUN")
    if distributed.rank() > 0:  # rank 0 says which one it is
        yield distributed.gather(None)[0]
        return
    if out is None:
        numbers = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{kind}-*")]
        last = max((int(number) for number in numbers if number.isdigit()), default=0)
        out = Path("runs") / f"{kind}-{last + 1:03d}"
    run = Path(out)
    with lock_folder(run):
        check_layout(run)
        occupied = not nothing_saved(run, kind)
        if occupied and not resume:
            or_resume = ", or --resume to go on with it" if has_state(run) else ""
            raise InputError(f"{run} exists and is not empty: give another --out{or_resume}")
        if occupied and not has_state(run):
            raise InputError(f"{run} holds no state to go on with; if it holds a model, start a new run: "
                             f"--ckpt {run} --out NEW")
        yield distributed.gather(run)[0]


def nothing_saved(run, kind):
    """Whether a start that was interrupted could have left the folder: nothing in it would be lost."""
    names = {path.name for path in run.iterdir() if not path.name.endswith(".tmp")}
    if kind == "classifier" and hub.read_optional(run, "run.json").get("script") == "train_classifier.py":
        return "classifier.json" not in names  # comes last
    return names <= BEGUN and not has_state(run)


def has_state(run):
    return (run / "state" / "training.pt").is_file()


@contextlib.contextmanager
def lock_folder(folder):
    """Holds a folder; of a run, what killed processes were writing is removed, and links to other folders are
    refused."""
    with lock(folder / ".lock"):
        is_run = distributed.rank() == 0 and (folder / "run.json").is_file()
        for path in folder.rglob("*") if is_run else ():
            if path.is_symlink() and path.is_dir():
                raise InputError(f"{path} leads out of the run: put the folder itself in its place")
            if path.name.endswith(".tmp") or path.name.startswith(".tmp"):  # the latter are safetensors' own
                path.unlink()
        yield


def run_folder(ckpt):
    """The run that a checkpoint is, or whose merged model it is; None for any other checkpoint."""
    folder = Path(ckpt).resolve()
    if folder.name == "merged" and not (folder / "run.json").is_file():
        folder = folder.parent
    return folder if (folder / "run.json").is_file() else None


def read_run_json(ckpt):
    """run.json of the run that a checkpoint is, or whose merged model it is; {} for any other checkpoint."""
    folder = run_folder(ckpt)
    return hub.read_json(folder / "run.json") if folder else {}


def check_layout(ckpt):
    """InputError for a run of the older layout, whose top level was the last step's model, or another
    split rule. Checkpoints that are no run pass."""
    run = run_folder(ckpt)
    if run and (run / "best").is_dir():
        raise InputError(f"{ckpt} is a run of an older version, its best model is in {run}/best: move that "
                         "folder out of it and give its new path as checkpoint; training cannot go on")
    if run:
        check_split_rule(read_run_json(ckpt).get("split_rule"), ckpt)


# --- its files ----------------------------------------------------------------------------------------------

def append(path, text, to_disk=False):
    """Adds to the end of a file. A symbolic link is not followed."""
    def open_itself(name, flags):
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    if distributed.rank() == 0:
        with writing(path), open(path, "a", encoding="utf-8", newline="", opener=open_itself) as file:
            file.write(text)
            if to_disk:
                file.flush()
                os.fsync(file.fileno())


def keep_lines(path, count=None):
    """Cuts a file to its first `count` lines, or to all that are whole: what came after the last save is
    written again."""
    content = path.read_bytes() if path.is_file() else b""  # bytes: a stop may have cut a letter in half
    lines = content.split(b"\n")[:-1][:count]
    if count is not None and len(lines) < count:
        raise InputError(f"--resume: {path} has lost lines of the {count} before the last save; start a new "
                         f"run from its model: --ckpt {path.parent} --out NEW")
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(line + b"\n" for line in lines)))


def write_run_json(run, script, arguments, **results):
    """Makes the folder with run.json: what was asked, which versions ran, what the data was; and an id, by
    which its state is known."""
    run.mkdir(parents=True, exist_ok=True)
    id = hub.read_json(run / "run.json")["id"] if has_state(run) else secrets.token_hex(8)
    versions = {package: version(package) for package in ("torch", "tokenizers", "safetensors", "numpy")}
    write_json(run / "run.json", {
        "script": script, "arguments": arguments, "split_rule": SPLIT_RULE, "id": id, **results,
        "versions": {"python": platform.python_version(), **versions}})


def weights_digest(ckpt):
    """Of the size of a checkpoint's weights, those of its base too, and of some 4,096 bytes of each file:
    changes with every training."""
    parts = []
    for folder in hub.folders(ckpt):
        for path in hub.weight_files(folder, (*hub.ADAPTERS, *hub.WEIGHTS)):
            with interpreting(path, "get it again"):  # it may be empty
                content = np.memmap(path, mode="r")
            parts.append((len(content), content[::len(content) // 4096 + 1].tobytes()))
    return digest(parts)


# --- going on -----------------------------------------------------------------------------------------------

def check_resumed(run, arguments, results):
    """InputError unless arguments, data and model are those that the run began with; the number of steps may
    have grown. results: as given to write_run_json."""
    before = hub.read_json(run / "run.json")
    if before.get("script") != "finetune.py":
        raise InputError(f"--resume: {run} is no run of finetune.py")
    free = (*FREE_ON_RESUME, "lr") if "not_finite" in before else FREE_ON_RESUME
    with interpreting(run / "run.json", "start a new run"):
        then = before["arguments"]
        changed = [f"--{name.replace('_', '-')} was {then.get(name)}, is {value}"
                   for name, value in arguments.items() if name not in free and then.get(name) != value]
        if results["steps"] < before["steps"]:
            changed.append(f"the run was to have {before['steps']} steps, is to have {results['steps']}")
    if changed:
        raise InputError(f"--resume goes on with the same run; changed: {'; '.join(changed)}")
    for what in ("data", "validation", "model"):
        if before.get(f"{what}_fingerprint") != results[f"{what}_fingerprint"]:
            raise InputError(f"--resume: the {what} of {run} has changed since it began; start a new run")
    if results["steps"] > before["steps"]:
        print(f"{results['steps']} steps in place of {before['steps']}: from here on the learning rate is "
              "that of a run so long")


def record_not_finite(run, what):
    """The InputError of a run whose numbers left their range; it may then go on with another --lr."""
    write_json(run / "run.json", hub.read_json(run / "run.json") | {"not_finite": what})
    return InputError(f"{what}: the last save stays; go on with --resume and a lower --lr, or --dtype fp32")


def save_state(run, model, optimizer, scaler, progress):
    """state/training.pt: the weights that learn (the others come from the checkpoint), optimizer, scaler,
    progress, the run's id; behind them a SHA-256 of it all. Order of the examples and random draws need no
    entry: they follow from seed and step."""
    tensors = model.state_dict()  # it also gives back what a sharded model has gathered
    learnt = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = distributed.to_write({name: tensors[name] for name in learnt})
    finite = all(weight.isfinite().all() for weight in weights.values())
    if not all(distributed.gather(finite)):  # rank 0 has seen it, all stop
        raise record_not_finite(run, f"the weights are not finite after step {progress['step']}")
    moments = optimizer.state_dict()
    for i, moments_of_one in moments["state"].items():
        moments["state"][i] = distributed.to_write(moments_of_one)
    state = {"run": hub.read_json(run / "run.json")["id"], "progress": progress, "model": weights,
             "optimizer": moments, "scaler": scaler.state_dict()}

    def write(temporary):
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            file.flush()
            file.write(hashlib.sha256(np.memmap(temporary, mode="r")).digest())
    flush_to_disk(run / "metrics.jsonl")  # going on counts its lines
    (run / "state").mkdir(exist_ok=True)
    size = 3 * sum(weight.nbytes for weight in weights.values())  # AdamW has two moments of each
    write_atomically(run / "state" / "training.pt", write, size)


def read_state(run):
    """What save_state wrote; InputError where it is not whole, or of another run."""
    path = run / "state" / "training.pt"
    with interpreting(path, f"start a new run from its model: --ckpt {run} --out NEW"):
        content = np.memmap(path, mode="r")
        if hashlib.sha256(content[:-CHECKSUM]).digest() != content[-CHECKSUM:].tobytes():
            raise ValueError("its checksum is another")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["run"] != hub.read_json(run / "run.json").get("id"):
            raise ValueError("it belongs to another run")
        return state


def load_state(run, model, optimizer, scaler):
    """Undoes save_state on freshly built objects; returns `progress`."""
    state = read_state(run)
    progress = state["progress"]
    if 0 < progress["best_step"] < progress["step"]:  # else the model is written anew
        hub.open_tensors(hub.find_file(run, (*hub.ADAPTERS, *hub.WEIGHTS)))
    with torch.no_grad():
        for name, tensor in state["model"].items():
            parameter = model.get_parameter(name)
            parameter.copy_(distributed.part_like(parameter, tensor))
    learnt = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, tensors in zip(learnt, state["optimizer"]["state"].values()):
        for name, tensor in tensors.items():
            tensors[name] = distributed.part_like(parameter, tensor)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where there was nothing to scale
        scaler.load_state_dict(state["scaler"])
    return progress
