"""Nothing is lost: stops, signals, full disks, damaged files, two processes at once, numbers out of range."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, lines, refusal

import evaluate
import finetune
import train_classifier
from sevloss import InputError, checkpoint, data, device, lock, report_errors, write_atomically
from sevloss.inputs import tables
from sevloss.models import load_model, load_tokenizer, save_model
from sevloss.models.tiny import tiny_gpt2
from sevloss.severity import parse_weighting

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A table, and a checkpoint with dropout."""
    folder = tmp_path_factory.mktemp("reliability")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "table.jsonl").write_text(text, encoding="utf-8")
    model, tokenizer = tiny_gpt2([row["Answer"] for row in rows], vocab_size=300)
    model.raw_config["resid_pdrop"] = 0.1
    save_model(model, tokenizer, folder / "checkpoint")
    return folder


@pytest.fixture
def arguments(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)  # runs/encoded
    return ["--ckpt", folder / "checkpoint", "--data", folder / "table.jsonl", "--train-rows", 24,
            "--batch-size", 8, "--max-steps", 6, "--save-every", 2, "--dtype", "fp32", "--lr", 1e-3,
            "--out", tmp_path / "run"]


@pytest.fixture(scope="module")
def finished(folder):
    """A run that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(finetune, "--ckpt", folder / "checkpoint", "--data", folder / "table.jsonl", "--train-rows", 24,
             "--batch-size", 8, "--max-steps", 6, "--save-every", 2, "--dtype", "fp32", "--lr", 1e-3,
             "--out", folder / "finished")
    return folder / "finished"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def same(a, b):
    """Whether two runs have the same model, validation and metrics."""
    for name in ("model.safetensors", "tokenizer.json", "config.json", "validation.json"):
        if (a / name).read_bytes() != (b / name).read_bytes():
            return False
    records = [[line | {"seconds": 0} for line in lines(run / "metrics.jsonl")] for run in (a, b)]
    return records[0] == records[1]


def refused(capsys, *arguments, script=finetune):
    """The one line that it says."""
    capsys.readouterr()
    refusal(script, *arguments)
    err = capsys.readouterr().err
    line = err.rpartition("error: ")[2]
    assert err.count("error: ") == 1 and line.find("\n") == len(line) - 1 and "Traceback" not in err
    return line


# ------------------------------------------------------------------ kills

def test_kills_in_short():
    """benchmarks/kills.py: kills, SIGTERM, full disks, flipped bits and double starts of all scripts."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "kills.py", "--short"], capture_output=True,
                          text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 12


# ------------------------------------------------------------------ no dead end

def test_resume_where_nothing_was_saved(arguments, finished, tmp_path, capsys):
    """No folder at all, or what a start leaves that was killed before its first save; with or without
    --resume."""
    out = tmp_path / "run"
    call(finetune, *arguments, "--resume")
    assert f"nothing was saved in {out} yet: it begins at step 0" in capsys.readouterr().out
    for resume in ([], ["--resume"]):
        shutil.rmtree(out / "state")
        for path in out.iterdir():
            if path.name not in ("run.json", "metrics.jsonl"):
                path.unlink()
        (out / "run.json.tmp").write_text("{")
        (out / "state").mkdir()
        (out / "state" / "training.pt.tmp").write_text("half")
        (out / ".tmpa1b2c3").write_text("half")
        (out / ".lock").touch()
        call(finetune, *arguments, *resume)
        assert same(out, finished)
        assert not [path for path in out.rglob("*") if ".tmp" in path.name or path.name == ".lock"]


def test_a_finished_run_says_so(arguments, run, capsys):
    before = (run / "model.safetensors").read_bytes()
    call(finetune, *arguments, "--resume")
    assert "going on after step 6 of 6; the run is finished" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == before
    assert "or --resume" in refused(capsys, *arguments)


def test_a_folder_of_other_things_is_no_run(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.tmp").write_text("mine")
    (tmp_path / "run" / "notes").write_text("mine")
    for resume in ([], ["--resume"]):
        refused(capsys, *arguments, *resume)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["notes", "notes.tmp"]


def test_a_classifier_that_was_stopped_is_trained_anew(folder, tmp_path):
    """Its run counts when classifier.json, its last file, is there."""
    arguments = ["--data", folder / "table.jsonl", "--epochs", 1, "--max-length", 32, "--out", tmp_path / "c"]
    call(train_classifier, *arguments)
    model = (tmp_path / "c" / "model.safetensors").read_bytes()
    refusal(train_classifier, *arguments)
    (tmp_path / "c" / "classifier.json").unlink()
    (tmp_path / "c" / "model.safetensors").write_text("half")
    call(train_classifier, *arguments)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == model


# ------------------------------------------------------------------ the state is whole, and of this run

def test_every_flipped_bit_is_noticed(finished):
    """Also in the padding and in the checksum itself."""
    path = finished / "state" / "training.pt"
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    try:
        checkpoint.read_state(finished)
        for position in (0, len(whole) - 1, *generator.integers(len(whole), size=40)):
            spoilt = bytearray(whole)
            spoilt[position] ^= 1 << generator.integers(8)
            path.write_bytes(spoilt)
            with pytest.raises(InputError, match="cannot be used .*; start a new run from its model: --ckpt"):
                checkpoint.read_state(finished)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("spoil", [lambda whole: b"", lambda whole: whole[:-100], lambda whole: whole[:20],
                                   lambda whole: whole[:-32], lambda whole: whole + whole], ids=range(5))
def test_a_torn_state_is_refused(arguments, run, capsys, spoil):
    path = run / "state" / "training.pt"
    path.write_bytes(spoil(path.read_bytes()))
    assert f"--ckpt {run} --out NEW" in refused(capsys, *arguments, "--resume")
    call(finetune, *arguments, "--ckpt", run, "--out", run.with_name("new"))  # as it says


def test_the_state_of_another_run_is_refused(arguments, run, tmp_path, capsys):
    call(finetune, *arguments, "--out", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "state" / "training.pt", run / "state")
    assert "it belongs to another run" in refused(capsys, *arguments, "--resume")


def test_a_broken_best_model_is_not_called_finished(arguments, run, monkeypatch, capsys):
    progress = checkpoint.read_state(run)["progress"]
    (run / "model.safetensors").write_bytes(b"half")
    if progress["best_step"] == progress["step"]:  # it can be made again
        call(finetune, *arguments, "--resume")
        assert load_model(run)
    else:
        assert "model.safetensors is broken" in refused(capsys, *arguments, "--resume")


def test_a_damaged_encoded_table_is_made_anew(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(folder / "checkpoint")
    read_options = dict(needed=("complaint", "response"), probabilities="required", columns={})
    encode_options = dict(max_length=64, eos_id=0, preprocess="none")

    def encoded():
        return data.encoded_table(folder / "table.jsonl", tokenizer, read_options=read_options, encode_options=encode_options)
    whole = encoded()
    ids = np.array(whole.train.ids)
    for path in sorted(Path("runs/encoded").rglob("*.*")):
        content = path.read_bytes() if path.is_file() else b""
        for spoilt in (b"", content[:-1] + bytes([content[-1] ^ 1])) if content else ():
            path.write_bytes(spoilt)
            capsys.readouterr()
            assert np.array_equal(encoded().train.ids, ids)
            assert "is damaged, or of another version: it is made anew" in capsys.readouterr().out
    encoded()
    assert "anew" not in capsys.readouterr().out
    pairs = tables.read_pairs(folder / "table.jsonl", needed=("complaint", "response"))
    train = data.split_pairs(pairs)["train"]
    assert whole.train.rows.tolist() == [pair.row for pair in train]


# ------------------------------------------------------------------ signals

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_signal_finishes_the_step_and_saves(arguments, finished, tmp_path, monkeypatch, capsys, number, code,
                                              step):
    """Between saves, too, and to the same end: the validation in between would change what is best."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        append = checkpoint.append

        def kill(path, text):
            append(path, text)
            if json.loads(text)["step"] == step:
                os.kill(os.getpid(), number)
        patch.setattr(checkpoint, "append", kill)
        call(finetune, *arguments)
    assert left.value.code == code
    err = capsys.readouterr().err
    assert f"stopped; saved after step {step} of 6: --resume --out {out} goes on" in err
    assert checkpoint.read_state(out)["progress"]["step"] == step
    call(finetune, *arguments, "--resume")
    assert same(out, finished)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_signal_ends_at_once(arguments, tmp_path, monkeypatch, capsys):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(checkpoint, "append", kill)
    with pytest.raises(SystemExit) as left:
        call(finetune, *arguments)
    assert left.value.code == 130 and not checkpoint.has_state(tmp_path / "run")
    assert capsys.readouterr().err.endswith("stopped; what was saved before stays\n")


# ------------------------------------------------------------------ full disks

def test_space_is_checked_before_a_save(arguments, tmp_path, monkeypatch, capsys):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=100_000))
    line = refused(capsys, *arguments)
    assert line.startswith(f"{tmp_path / 'run/state/training.pt'} cannot be written: it needs ")
    assert not list(tmp_path.rglob("*.tmp")) and not checkpoint.has_state(tmp_path / "run")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(InputError, match=f"^{path} cannot be written .No space left on device.;"):
            checkpoint.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_native_errors_name_the_path(tmp_path):
    """torch's, safetensors' and the tokenizers' own have no class in common."""
    def write(_):
        raise Exception("I/O error: No space left on device (os error 28)\nbacktrace")
    with pytest.raises(InputError, match="tokenizer.json cannot be written .Exception: I/O error: No space left") as raised:
        write_atomically(tmp_path / "tokenizer.json", write)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_a_folder_that_vanishes(arguments, tmp_path, monkeypatch, capsys):
    validate = finetune.validate_and_save

    def vanish(run, *rest):
        line = validate(run, *rest)
        shutil.rmtree(run)
        return line
    monkeypatch.setattr(finetune, "validate_and_save", vanish)
    assert "run/metrics.jsonl cannot be written (No such file" in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_everything_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """File, then name, then folder."""
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(
        Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    checkpoint.write_json(tmp_path / "a.json", {})
    assert order == ["a.json.tmp", "replace", tmp_path.name]


# ------------------------------------------------------------------ one run, one process

def test_a_second_start_is_refused(arguments, run, folder, tmp_path, capsys):
    """Of any of the three scripts, on a folder at which another process works."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    evaluation = [run, "--data", folder / "table.jsonl", "--max-new-tokens", 2]
    with lock(run / ".lock"):
        for script, given in ((finetune, arguments), (finetune, [*arguments, "--resume"]),
                              (train_classifier, ["--data", folder / "table.jsonl", "--out", run]),
                              (evaluate, evaluation), (evaluate, [*evaluation, "--out", tmp_path / "report"])):
            line = refused(capsys, *given, script=script)
            assert line.startswith(f"another process works on {run} and holds .lock")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before and not (tmp_path / "report").exists()


def test_a_lock_dies_with_its_holder(tmp_path):
    holder = os.fork()
    if not holder:
        with lock(tmp_path / "new" / ".lock"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "new" / ".lock").exists()
    with lock(tmp_path / "new" / ".lock"):
        pass
    assert not (tmp_path / "new" / ".lock").exists()


# ------------------------------------------------------------------ numbers

def test_a_run_that_becomes_infinite_keeps_its_last_state(arguments, tmp_path, monkeypatch, capsys):
    """It says step, rows and what to lower; that may then be changed, and only then."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        real = finetune.linear_weighted_token_ce
        count = []

        def explode(*args, **options):
            count.append(args)
            return real(*args, **options) * (float("nan") if len(count) == 4 else 1)
        patch.setattr(finetune, "linear_weighted_token_ce", explode)
        line = refused(capsys, *arguments)
    assert "loss nan" in line and "at step 4, with rows " in line and "a lower --lr" in line
    rows = [int(row) for row in line.partition("rows ")[2].partition(" of the table")[0].split(", ")]
    assert len(rows) == 8 and all(row > 0 for row in rows)
    assert checkpoint.read_state(out)["progress"]["step"] == 2
    call(finetune, *arguments, "--lr", 1e-4, "--resume")
    assert lines(out / "metrics.jsonl")[-1]["step"] == 6
    assert "--lr was 0.0001, is 0.001" in refused(capsys, *arguments, "--resume")


def test_weights_that_are_not_finite_are_never_saved(arguments, tmp_path, capsys):
    """An enormous --lr: the loss of the step was fine, its weights are not."""
    refused(capsys, *arguments, "--lr", 1e38, "--warmup", 0, "--save-every", 1)
    assert not checkpoint.has_state(tmp_path / "run")
    call(finetune, *arguments, "--resume")  # from step 0


def test_skipped_steps_are_counted(arguments, tmp_path, monkeypatch, capsys):
    """fp16: a run all of whose steps were skipped has learned nothing, and says so."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    assert "fp16 skipped all 6 steps" in refused(capsys, *arguments, "--dtype", "fp16")
    monkeypatch.undo()


def test_silent_nothings(folder, arguments, write_table, rows, capsys, tmp_path):
    with pytest.raises(InputError, match="not all of them 0"):
        parse_weighting("0,0,0")
    mild = write_table("mild.jsonl", [row | {"Non-Critical": 1.0, "Neutral": 0.0, "Critical": 0.0}
                                      for row in rows])
    assert "every example the weight 0" in refused(capsys, *arguments, "--data", mild, "--weighting", "0,0,1")
    empty = write_table("empty.jsonl", [row | {"Answer": "漢字"} for row in rows])
    arabert = [*arguments, "--preprocess", "arabert"]
    assert "leaves nothing of any response" in refused(capsys, *arabert, "--data", empty)
    some = write_table("some.jsonl", [row | ({"Answer": "漢字"} if i % 2 else {}) for i, row in enumerate(rows)])
    call(finetune, *arabert, "--data", some)
    assert "preprocessing left nothing of 0 complaints, " in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_one_line(capsys, error):
    @report_errors
    def main():
        raise error
    with pytest.raises(SystemExit) as left:
        main()
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.startswith("error: out of memory: lower --batch-size")
    assert err.count("\n") == 1


def test_other_errors_keep_their_traceback():
    @report_errors
    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        main()


def test_deterministic(monkeypatch):
    try:
        device.choose("cpu", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------ going on with something else

def test_a_run_can_be_made_longer(arguments, run, capsys):
    """And the schedule that results is said; not shorter."""
    call(finetune, *arguments, "--max-steps", 9, "--resume")
    assert "9 steps in place of 6" in capsys.readouterr().out
    rates = [line["lr"] for line in lines(run / "metrics.jsonl")]
    assert len(rates) == 9 and rates[6] > rates[5] and rates[6] > rates[7] > rates[8] > 0
    call(finetune, *arguments, "--max-steps", 9, "--resume")
    assert "was to have 9 steps, is to have 6" in refused(capsys, *arguments, "--resume")


def test_another_model_is_refused(arguments, folder, run, capsys):
    """Of the same size, under the same name."""
    path = folder / "checkpoint" / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-100_000] + bytes(100_000))
        assert "the model of" in refused(capsys, *arguments, "--resume")
    finally:
        path.write_bytes(whole)


# ------------------------------------------------------------------ symbolic links

def test_links_do_not_lead_out_of_a_run(arguments, run, tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    for name in ("metrics.jsonl.tmp", "state/training.pt.tmp", ".lock"):
        (run / name).symlink_to(victim)
    call(finetune, *arguments, "--max-steps", 7, "--resume")
    (run / "answers.jsonl").symlink_to(victim)
    with pytest.raises(InputError, match="answers.jsonl cannot be written"):
        checkpoint.append(run / "answers.jsonl", "mine")
    (tmp_path / "elsewhere").mkdir()
    (run / "evaluation").symlink_to(tmp_path / "elsewhere")
    assert "leads out of the run" in refused(capsys, *arguments, "--max-steps", 7, "--resume")
    assert victim.read_text() == "precious\n" and not list((tmp_path / "elsewhere").iterdir())
