"""Stops the three scripts at random moments and at every system call that writes, fills the disk, flips
bits, starts twice at once; goes on as the README says, and compares with a run that was never stopped.

    python benchmarks/kills.py --every 2  # prints the table of docs/reliability.md, in about half an hour
    python benchmarks/kills.py --short    # a trial or two of each

Survived: going on as the messages say comes to an end, no temporary file or lock is left, and refusals are
one line. Bit-identical: every file that the run leaves. Linux alone; system calls on x86-64 alone (ptrace).
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of a process with threads may hang
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sacrebleu  # noqa: F401  imported once here, not in each trial
import torch
from matplotlib.figure import Figure

import evaluate
import finetune
import train_classifier
from sevloss.classifier import annotate
from sevloss.inputs import tables
from sevloss.models import from_scratch, save_model
from sevloss.models.tiny import tiny_gpt2

SCRIPTS = {module.__name__: module for module in (finetune, train_classifier, evaluate)}
SAMPLE = str(Path(tables.SAMPLE).resolve())
EXACT = ["--device", "cpu", "--dtype", "fp32"]


# --- the jobs: a command, what goes on after a stop, and what lies there in the end -------------------------

class Job:
    """One script in `place`, its working directory, which is made anew for each trial."""

    def __init__(self, name, command, again, folder, place, start=()):
        self.name, self.command, self.again, self.folder, self.place = name, command, again, folder, place
        self.start = start  # folders that are there before

    def prepare(self):
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for source in self.start:
            shutil.copytree(source, self.place / source.name)

    def results(self):
        """{file: digest}, without what tells the time."""
        found = {}
        for path in sorted((self.place / self.folder).rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) | {"seconds": 0} for line in content.splitlines()]
                content = json.dumps(lines).encode()
            if path.name == "training.pt":
                state = torch.load(path, weights_only=True)
                weights = [tensor.numpy().tobytes() for tensor in state["model"].values()]
                content = repr([state["progress"], weights]).encode()
            if path.is_file() and path.name != "run.json":
                found[str(path.relative_to(self.place))] = hashlib.sha256(content).hexdigest()
        return found

    def leftovers(self):
        names = [path.name for path in self.place.rglob("*")]
        return [name for name in names if ".tmp" in name or name.endswith(".lock") or ".partial" in name]


def make_jobs(work):
    """What the jobs start from is made here, with the scripts themselves."""
    place = work / "place"
    pairs = tables.read_pairs(SAMPLE, needed=("complaint", "response"))
    small, tokenizer = tiny_gpt2([pair.complaint + pair.response for pair in pairs], vocab_size=300)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.1)  # with dropout, so that generators count
    save_model(from_scratch(small.raw_config | sizes), tokenizer, work / "checkpoint")
    train = ["finetune", "--ckpt", work / "checkpoint", "--data", SAMPLE, "--train-rows", 24, "--batch-size",
             8, "--max-steps", 4, "--save-every", 2, "--out", "run", *EXACT]
    classify = ["train_classifier", "--data", SAMPLE, "--epochs", 1, "--max-length", 32, "--out", "run",
                *EXACT]
    write = ["train_classifier", "--ckpt", work / "classifier", "--annotate", SAMPLE, "--to", "done/done.csv",
             *EXACT]
    answer = ["evaluate", "trained", "--data", SAMPLE, "--max-new-tokens", 8, "--bertscore", "none", *EXACT]
    for command, name in ((train, "trained"), (classify, "classifier")):
        made = Job(name, command, command, "run", place)
        made.prepare()
        code, said = wait(start(made, command))
        assert code == 0, said
        os.rename(place / "run", work / name)
    annotate.CHUNK = 60  # several parts, so that there is something to go on with
    evaluate.ROWS_AT_ONCE = 8
    Figure.savefig = lambda figure, file, **_: file.write(b"picture")  # drawing takes most of the time
    return [Job("finetune.py", train, [*train, "--resume"], "run", place),
            Job("train_classifier.py", classify, classify, "run", place),
            Job("train_classifier.py --annotate", write, write, "done", place),
            Job("evaluate.py", answer, answer, "trained/evaluation", place, [work / "trained"])]


# --- starting, and stopping ---------------------------------------------------------------------------------

def start(job, command, log="log", traced=False):
    """The script in a fork of this process, which has imported all that it needs: its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(job.place)
        output = os.open(job.place.with_name(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [f"{command[0]}.py", *map(str, command[1:])]
        if traced:
            PTRACE(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
        SCRIPTS[command[0]].main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid, log=None):
    """(exit code, negative: the signal that ended it; what it printed)"""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (WORK / (log or "log")).read_text(errors="replace")


def is_one_line(said):
    """Whether what a script printed ends in one line for the user, not in a traceback."""
    lines = re.findall(r"(?<!I/O )error: |\nstopped; ", said)  # native code says "I/O error: " in a line
    return "Traceback" not in said and len(lines) == 1


# --- system calls, by ptrace --------------------------------------------------------------------------------

PTRACE = ctypes.CDLL(None, use_errno=True).ptrace
PTRACE.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
TRACEME, POKEUSER, GETREGS, SYSCALL, SETOPTIONS = 0, 6, 12, 24, 0x4200
RAX, RDX, RSI, RDI, ORIG_RAX = 10, 12, 13, 14, 15  # of user_regs_struct
OF_FILES = {1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 77: "ftruncate"}
OF_PATHS = {76: "truncate", 82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink", 90: "chmod"}
AT_PATHS = {257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 316: "renameat2"}
NEED_ROOM = {"write", "pwrite64", "writev", "openat", "mkdir"}


def call_of(pid, registers, place):
    """(name, file) of a system call that changes files in `place`, else None."""
    number = registers[ORIG_RAX]
    try:
        if number in OF_FILES:
            name, path = OF_FILES[number], os.readlink(f"/proc/{pid}/fd/{registers[RDI]}")
        elif number in OF_PATHS or number in AT_PATHS:
            name = OF_PATHS.get(number) or AT_PATHS[number]
            if name == "openat" and not registers[RDX] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return None
            with open(f"/proc/{pid}/mem", "rb") as memory:
                memory.seek(registers[RDI if number in OF_PATHS else RSI])
                path = os.fsdecode(memory.read(4096).partition(b"\0")[0])
        else:
            return None
    except OSError:
        return None
    path = os.path.join(place, path)
    return (name, os.path.relpath(path, place)) if path.startswith(f"{place}/") else None


def trace(job, kill_at=None, full_at=None):
    """Runs a job's command and returns (its calls that change files, exit code, what it printed). kill_at:
    kills it before that call; full_at: from that call on the disk is full."""
    pid = start(job, job.command, traced=True)
    os.waitpid(pid, 0)
    PTRACE(SETOPTIONS, pid, None, ctypes.c_void_p(1))  # marks stops at system calls
    registers = (ctypes.c_ulong * 27)()
    calls, entering, failing = [], True, False
    deliver = 0
    while True:
        PTRACE(SYSCALL, pid, None, ctypes.c_void_p(deliver))
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return calls, os.waitstatus_to_exitcode(status), (WORK / "log").read_text(errors="replace")
        deliver = os.WSTOPSIG(status)
        if deliver != signal.SIGTRAP | 0x80:
            continue
        deliver = 0
        if entering:
            PTRACE(GETREGS, pid, None, registers)
            call = call_of(pid, registers, str(job.place))
            if call:
                if len(calls) == kill_at:
                    os.kill(pid, signal.SIGKILL)
                failing = full_at is not None and len(calls) >= full_at and call[0] in NEED_ROOM
                calls.append(call)
            if failing:  # no call of that number: it does nothing
                PTRACE(POKEUSER, pid, ctypes.c_void_p(8 * ORIG_RAX), ctypes.c_void_p(2 ** 64 - 1))
        elif failing:
            PTRACE(POKEUSER, pid, ctypes.c_void_p(8 * RAX), ctypes.c_void_p(2 ** 64 - 28))  # -ENOSPC
            failing = False
        entering = not entering


def points(calls):
    """Numbers of the calls; of many in a row that write the same file, first, middle and last."""
    chosen, first = [], 0
    for i in range(1, len(calls) + 1):
        if i == len(calls) or calls[i] != calls[first]:
            chosen += sorted({first, (first + i - 1) // 2, i - 1})
            first = i
    return chosen


# --- trials: each gives (survived, bit-identical) -----------------------------------------------------------

def go_on(job, reference):
    code, said = wait(start(job, job.again))
    if code == 2 and job.name == "train_classifier.py":  # the stop came after its last file
        code = 0 if "exists and is not empty" in said else 2
    if code == 2 and job.name.endswith("--annotate"):
        code = 0 if "exists: remove it" in said else 2
    survived = code == 0 and not job.leftovers()
    identical = job.results() == reference
    if not (survived and identical):
        print(f"  {job.name}: code {code}, left {job.leftovers()}, {said[-300:]}", file=sys.stderr)
    return survived, identical


def kill_at_random(job, reference, length, number=signal.SIGKILL):
    """At one random moment; half of them once more while it goes on."""
    job.prepare()
    for command in (job.command, job.again)[:RANDOM.choice((1, 2))]:
        pid = start(job, command)
        time.sleep(RANDOM.uniform(0, length))
        os.kill(pid, number)
        code, said = wait(pid)
        ended_before = code == 0 or code == 2 and is_one_line(said)
        if not (ended_before or code == -number or code == 128 + number and is_one_line(said)):
            print(f"  {job.name}: signal {number}, code {code}: {said[-300:]}", file=sys.stderr)
            return False, False
    return go_on(job, reference)


def kill_at_call(job, reference, call):
    job.prepare()
    _, code, _ = trace(job, kill_at=call)
    assert code in (0, -signal.SIGKILL), code  # 0: it makes fewer calls this time
    return go_on(job, reference)


def fill_disk(job, reference, call):
    """One line, no temporary file; then with room again."""
    job.prepare()
    _, code, said = trace(job, full_at=call)
    left = [name for name in job.leftovers() if ".tmp" in name]
    if code and (code != 2 or not is_one_line(said) or left):
        print(f"  {job.name}: full from call {call}, code {code}, left {left}, {said[-300:]}",
              file=sys.stderr)
        return False, False
    return go_on(job, reference)


def start_twice(job, reference):
    """At once: one is refused in one line, the other is not harmed. Or it came late and found the end."""
    job.prepare()
    pids = [start(job, job.command, log=f"log{i}") for i in range(2)]
    ended = [wait(pid, f"log{i}") for i, pid in enumerate(pids)]
    refused = [said for code, said in ended if code]
    survived = len(refused) <= 1 and all(map(is_one_line, refused)) and not job.leftovers()
    return survived, job.results() == reference


def flip(job, stopped, reference, target):
    """A byte of the state: refused in one line. Of the encoded table: it is made anew."""
    job.prepare()
    shutil.copytree(stopped, job.place, dirs_exist_ok=True)
    path = RANDOM.choice(sorted(job.place.glob(target)))
    content = bytearray(path.read_bytes())
    content[RANDOM.randrange(len(content))] ^= 1 << RANDOM.randrange(8)
    path.write_bytes(content)
    code, said = wait(start(job, job.again))
    if "training.pt" in target:
        return code == 2 and is_one_line(said) and "--ckpt run --out NEW" in said, None
    return code == 0 and "is made anew" in said, job.results() == reference


# --- all of it ----------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th of the system calls")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    RANDOM.seed(args.seed)
    torch.set_num_threads(1)
    can_trace = platform.machine() == "x86_64"

    table = {}

    def count(what, outcomes):
        table.setdefault(what, []).extend(outcomes)
        print(f"{time.perf_counter() - began:6.0f} s  {what}: {len(outcomes)} trials", file=sys.stderr)

    began = time.perf_counter()
    jobs = make_jobs(WORK)
    for job in [jobs[0], *jobs[2:]] if args.short else jobs:
        job.prepare()
        started = time.perf_counter()
        code, said = wait(start(job, job.command))
        assert code == 0, said
        length = time.perf_counter() - started
        reference = job.results()
        few = 1 if args.short else 12
        if job is jobs[0] or not args.short:
            count(f"SIGKILL at a random moment, {job.name}",
                  [kill_at_random(job, reference, length) for _ in range(few)])
            count(f"SIGTERM at a random moment, {job.name}",
                  [kill_at_random(job, reference, length, signal.SIGTERM) for _ in range(few)])
            count(f"two starts at once, {job.name}",
                  [start_twice(job, reference) for _ in range(1 if args.short else 4)])
        if can_trace:
            chosen = [RANDOM.randrange(20, 50)]
            if not args.short:
                job.prepare()
                chosen = points(trace(job)[0])[::args.every]
            count(f"SIGKILL at a system call that writes, {job.name}",
                  [kill_at_call(job, reference, call) for call in chosen])
            count(f"disk full from a system call on, {job.name}",
                  [fill_disk(job, reference, call) for call in chosen[::3]])

    job = jobs[0]
    job.prepare()
    code, said = wait(start(job, job.command))
    reference = job.results()
    shutil.copytree(job.place, WORK / "stopped")
    few = 2 if args.short else 40
    count("a flipped bit in the state", [flip(job, WORK / "stopped", reference, "run/state/training.pt")
                                         for _ in range(few)])
    cached = "runs/encoded/*/**/*.*"
    count("a flipped bit in the encoded table", [flip(job, WORK / "stopped", reference, cached)
                                                 for _ in range(few)])

    print("| what | trials | survived | bit-identical |\n|---|---|---|---|")
    for what, outcomes in table.items():
        survived = sum(outcome[0] for outcome in outcomes)
        identical = sum(outcome[1] for outcome in outcomes) if outcomes[0][1] is not None else "–"
        print(f"| {what} | {len(outcomes)} | {survived} | {identical} |")
    sys.exit(any(False in outcome for outcomes in table.values() for outcome in outcomes))


if __name__ == "__main__":
    RANDOM = random.Random()
    with tempfile.TemporaryDirectory() as folder:
        WORK = Path(folder).resolve()
        main()
