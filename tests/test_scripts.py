"""The three scripts from end to end on a small table: what they leave behind, how a stopped run goes on, and
how they refuse."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, lines, refusal
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import finetune
import train_classifier
from sevloss import checkpoint, data, device
from sevloss.evaluation import findings, scores
from sevloss.inputs import tables
from sevloss.models import eos_ids, load_model, load_tokenizer, save_model
from sevloss.models.tiny import tiny_bert, tiny_gpt2
from sevloss.optimizer import adamw, set_learning_rate

ROOT = Path(__file__).parent.parent
METRICS = ["step", "loss", "lr", "grad_norm", "examples", "tokens", "supervised_tokens", "seconds"]
BOTH = ("complaint", "response")


def without_seconds(run):
    return [{name: value for name, value in line.items() if name != "seconds"}
            for line in lines(run / "metrics.jsonl")]


def losses(run):
    return [line["loss"] for line in lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "table.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                        encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def table(folder):
    return folder / "table.jsonl"


@pytest.fixture(scope="module")
def base(folder, table):
    """A run of finetune.py: 21 steps, saved every 4."""
    call(finetune, "--data", table, "--out", folder / "base", "--max-steps", 21, "--save-every", 4,
         "--batch-size", 20)
    return folder / "base"


@pytest.fixture(scope="module")
def classifier(folder, table):
    """A run of train_classifier.py with two folds."""
    call(train_classifier, "--data", table, "--out", folder / "classifier", "--folds", 2, "--batch-size", 8,
         "--max-length", 64)
    return folder / "classifier"


# ------------------------------------------------------------------ all three, as a reader starts them

def test_three_scripts_in_a_row(table, tmp_path):
    """Each finds what the one before has left; a wrong argument is one line and exit code 2."""
    def start(script, *arguments, code=0):
        done = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True,
                              text=True, encoding="utf-8",
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done
    shutil.copy(table, tmp_path)
    start("train_classifier.py", "--data", "table.jsonl", "--epochs", "1", "--annotate", "table.jsonl",
          "--to", "annotated.tsv")
    start("finetune.py", "--data", "table.jsonl", "--classifier", "runs/classifier-001", "--max-steps", "2")
    start("evaluate.py", "--max-new-tokens", "4")
    assert (tmp_path / "annotated.tsv").is_file()
    assert (tmp_path / "runs/finetune-001/model.safetensors").is_file()
    assert (tmp_path / "runs/finetune-001/evaluation/table.txt").is_file()
    assert json.loads((tmp_path / "runs/finetune-001/run.json").read_text())["arguments"]["data"] == "table.jsonl"  # as typed
    refused = start("finetune.py", "--weighting", "hard", code=2)
    assert refused.stderr.startswith("error: --weighting is one of") and refused.stderr.count("\n") == 1


# ------------------------------------------------------------------ tables of one's own for the sides

def test_validation_table_of_ones_own(folder, table, rows, capfd):
    """All of --data is trained on, but for complaints that the validation table has, too; these are counted.
    Then that table is no test set: evaluate.py wants another one."""
    def write(name, rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name
    spelled_otherwise = [{**row, "Question": row["Question"].replace("أ", "ا") + "!!"} for row in rows[:10]]
    new = [{"Question": f"سؤال جديد {i}", "Answer": "نعم"} for i in range(5)]  # no severity: none is needed
    validation = write("valid.jsonl", [{key: row[key] for key in ("Question", "Answer")}
                                       for row in spelled_otherwise + new])
    out = folder / "own-validation"
    call(finetune, "--data", table, "--validation", validation, "--out", out, "--max-steps", 1)
    printed = capfd.readouterr().out
    assert "10 rows are not trained on: their complaints are in " in printed
    assert f"{len(rows) - 10} pairs to train on, 15 to validate on, 0 kept for evaluate.py" in printed

    copy = write("copy.jsonl", rows)
    for arguments in ([], ["--data", copy], ["--data", copy, "--split", "all"]):
        refusal(evaluate, out, "--max-new-tokens", 0, *arguments)
        message = capfd.readouterr().err
        assert "was trained on" in message and "--data" in message and message.count("\n") == 1
    # nor is it one for a run that goes on from this one
    call(finetune, "--ckpt", out, "--data", table, "--out", folder / "heir", "--max-steps", 1)
    refusal(evaluate, folder / "heir", "--max-new-tokens", 0)
    assert "was trained on" in capfd.readouterr().err
    test = write("test.jsonl", new)
    call(evaluate, out, "--data", test, "--split", "all", "--max-new-tokens", 0)
    assert "5 rows are evaluated" in capfd.readouterr().out


# ------------------------------------------------------------------ finetune.py: what a run leaves

def test_run_folder(base, table):
    facts = json.loads((base / "run.json").read_text())
    assert facts["script"] == "finetune.py" and facts["prompt"] == data.PROMPT
    assert facts["preprocess"] == "arabert"
    assert facts["arguments"]["weighting"] == "balanced" and facts["coefficients"] == [0.5, 1.0, 1.5]
    assert facts["steps"] == 21
    assert {"python", "torch", "tokenizers", "safetensors", "numpy"} == set(facts["versions"])
    assert facts["data_fingerprint"] == str(data.Fingerprint(tables.read_pairs(table, needed=BOTH)))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in base.iterdir()}
    assert load_model(base).raw_config["sevloss"] == {"preprocess": "arabert"}
    assert not list(base.rglob("*.tmp")) and not (base / "best").exists()
    state = torch.load(base / "state" / "training.pt", weights_only=True)
    assert state["progress"]["step"] == 21 and facts["split_rule"] == data.SPLIT_RULE


def test_metrics_are_a_line_per_step(base, table):
    """Each of this step alone; an epoch's tokens are those of the training rows."""
    written = lines(base / "metrics.jsonl")
    assert [list(line) for line in written] == [METRICS] * 21
    assert [line["step"] for line in written] == list(range(1, 22))
    train, examples = examples_of(base, table, "train")
    per_epoch = math.ceil(len(train) / 20)
    for epoch in (written[:per_epoch], written[per_epoch:2 * per_epoch]):
        assert sum(line["examples"] for line in epoch) == len(train)
        assert sum(line["tokens"] for line in epoch) == examples.input_lengths.sum()
        assert sum(line["supervised_tokens"] for line in epoch) == examples.target_counts.sum()
    assert written[-1]["loss"] < 0.7 * written[0]["loss"]  # it learns
    assert [line["lr"] for line in written] == pytest.approx([rate(step, 21, 1, peak=2e-3)
                                                              for step in range(21)])


def rate(step, steps, warmup_steps, peak=1.0):
    return set_learning_rate(torch.optim.SGD([torch.zeros(1)]), peak, step, steps, warmup_steps)


def test_tiny_models_are_the_same_every_time(rows):
    """The trainer of word pieces numbers letters by chance, which would make the same seed another
    classifier."""
    texts = [row["Question"] for row in rows]
    for make in (tiny_gpt2, lambda texts: tiny_bert(texts, num_labels=3)):
        vocabularies = [make(texts)[1].get_vocab() for _ in range(4)]
        assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_learning_rate():
    """Rises to the peak in the warm-up, then falls; never 0, where a step would be wasted; set in every
    group."""
    factors = [rate(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1 and factors[9:] == sorted(factors[9:], reverse=True) and factors[55] == 0.5
    assert factors[99] > 0
    assert rate(0, 1, 0) == 1 and rate(0, 3, 0) == 1
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}])
    set_learning_rate(optimizer, 1.0, 0, 100, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_norms_and_biases_do_not_decay(tiny):
    groups = adamw(tiny[0], 1e-3, 0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2} and {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(tiny[0].parameters()))


def examples_of(run, table, side):
    """(the pairs of a side, their Examples as the run's tokenizer gives them)"""
    pairs = data.split_pairs(tables.read_pairs(table, needed=BOTH))[side]
    examples, _ = data.encode_pairs(pairs, load_tokenizer(run), max_length=512,
                                    eos_id=eos_ids(load_model(run))[0],
                                    preprocess="arabert")
    return pairs, examples


def scaled_rates(patch, factor):
    """Learning rates by a function of the step, in place of the schedule."""
    patch.setattr(finetune, "set_learning_rate", lambda optimizer, peak, step, steps, warmup_steps:
                  set_learning_rate(optimizer, 1e9 * peak * factor(step), 0, 10 ** 9, 10 ** 9))


def validation_nll(model, run, table):
    _, examples = examples_of(run, table, "validation")
    nll = scores.response_nll(model, examples, device.choose("cpu", "fp32"))
    return float(nll.sum() / examples.target_counts.sum())


def test_best_has_the_lowest_validation_nll_of_all_saves(folder, table, base):
    """Also where it is not the last; unweighted, over validation rows."""
    out = folder / "worse-again"
    seen = []
    original = checkpoint.save_state

    def save_state(run, model, *rest):
        original(run, model, *rest)
        seen.append(validation_nll(model, base, table))
    with pytest.MonkeyPatch.context() as patch:
        scaled_rates(patch, lambda step: 0.1 if step < 3 else 20)
        patch.setattr(checkpoint, "save_state", save_state)
        call(finetune, "--ckpt", base, "--data", table, "--out", out, "--max-steps", 6, "--save-every", 1,
             "--dtype", "fp32", "--lr", 1e-3)
    progress = torch.load(out / "state" / "training.pt", weights_only=True)["progress"]
    assert 0 < np.argmin(seen) < 5  # or the test is blind
    assert progress["best_step"] == np.argmin(seen) + 1
    assert progress["best"] == pytest.approx(min(seen), rel=1e-5)
    assert validation_nll(load_model(out), out, table) == pytest.approx(min(seen), rel=1e-5)
    state = torch.load(out / "state" / "training.pt", weights_only=True)["model"]
    last = load_model(out)
    last.load_state_dict(state)
    assert validation_nll(last, out, table) == pytest.approx(seen[-1],
                                                             rel=1e-5)  # the last step's weights: in the state


# ------------------------------------------------------------------ finetune.py: the loss of a step

@pytest.mark.parametrize("normalise", ["example", "token"])
def test_loss_of_a_step_against_a_loop(folder, base, table, normalise):
    """w of the probabilities; example: mean over examples of w_i times the mean over their tokens; token:
    mean over tokens of w_i nll."""
    out = folder / f"loop-{normalise}"
    call(finetune, "--ckpt", base, "--data", table, "--out", out, "--max-steps", 1, "--batch-size", 17,
         "--normalise", normalise,
         "--weighting", "0.2,1,3", "--micro-tokens", 150, "--seed", 3, "--dtype", "fp32")
    model = load_model(base)
    train, examples = examples_of(base, table, "train")
    weighted, nlls, lengths = [], [], []
    for i in np.random.default_rng([3, 0]).permutation(len(train))[:17]:
        ids = torch.tensor(examples[i], dtype=torch.long)
        first = examples.first_target[i]
        with torch.no_grad():
            nll = F.cross_entropy((model(ids, [len(ids)]) @ model.head_weight.T)[first - 1:-1], ids[first:],
                                  reduction="sum")
        weight = sum(a * p for a, p in zip((0.2, 1, 3), train[i].probabilities))
        nlls.append(weight * nll.item())
        lengths.append(len(ids) - first)
        weighted.append(nlls[-1] / lengths[-1])
    expected = np.mean(weighted) if normalise == "example" else sum(nlls) / sum(lengths)
    assert losses(out)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalise", ["example", "token"])
def test_micro_batches_do_not_change_the_result(folder, base, table, normalise):
    """The denominator is the step's, not the micro-batch's."""
    runs = [folder / f"micro-{normalise}-{size}" for size in (1, 100, 100_000)]
    for run in runs:
        call(finetune, "--ckpt", base, "--data", table, "--out", run, "--max-steps", 3, "--micro-tokens",
             run.name.rpartition("-")[2],
             "--normalise", normalise, "--dtype", "fp32", "--lr", 1e-3)
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-5)
        assert [line["grad_norm"] for line in lines(run / "metrics.jsonl")] == pytest.approx(
            [line["grad_norm"] for line in lines(runs[0] / "metrics.jsonl")], rel=1e-3)


def weights_of(folder, table, name, *arguments):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "show_weights", lambda weights, coefficients: seen.append(weights))
        call(finetune, "--data", table, "--out", folder / name, "--max-steps", 1, *arguments)
    return seen[0]


def test_weighting_none_gives_weight_1(folder, table, write_table, rows):
    """With probabilities, and without: the plain fine-tuning that the others are compared with."""
    train = data.split_pairs(tables.read_pairs(table, needed=BOTH))["train"]
    torch.testing.assert_close(weights_of(folder, table, "none", "--weighting", "none"),
                               torch.ones(len(train)))
    bare = write_table("bare.csv", [{"question": row["Question"], "answer": row["Answer"]} for row in rows])
    assert torch.equal(weights_of(folder, bare, "bare", "--weighting", "none"), torch.ones(len(train)))


def test_the_control_trains_on_the_same_rows(folder, write_table, rows):
    """A table that is annotated in part: what balanced has to leave out, none leaves out too."""
    partly = [row | dict.fromkeys(("Non-Critical", "Neutral", "Critical"), "") if i % 3 == 0 else row
              for i, row in enumerate(rows)]
    partly = write_table("partly.csv", partly)
    runs = {name: weights_of(folder, partly, f"partly-{name}", "--weighting", name)
            for name in ("none", "balanced")}
    assert len(runs["none"]) == len(runs["balanced"]) < 0.8 * 2 / 3 * len(rows) + 10
    facts = [json.loads((folder / f"partly-{name}" / "run.json").read_text())["data_fingerprint"]
             for name in runs]
    assert facts[0] == facts[1]


def test_critical_rows_weigh_most(folder, table):
    """balanced: 0.5, 1, 1.5 for the three classes, here with 0.8 of certainty."""
    train = data.split_pairs(tables.read_pairs(table, needed=BOTH))["train"]
    expected = [(0.65, 1.0, 1.35)[p.severity] for p in train]
    assert weights_of(folder, table, "balanced").tolist() == pytest.approx(expected)


def test_probabilities_of_the_classifier_are_used(folder, write_table, rows, classifier):
    """The table has none; the classifier, which has seen these complaints, gives its out-of-fold ones."""
    bare = write_table("bare.csv", [{"question": row["Question"], "answer": row["Answer"]} for row in rows])
    weights = weights_of(folder, bare, "annotated", "--classifier", classifier)
    folds = json.loads((classifier / "classifier.json").read_text())["out_of_fold"]
    train = data.split_pairs(tables.read_pairs(bare, needed=BOTH))["train"]
    expected = [sum(a * p for a, p in zip((0.5, 1, 1.5), folds[data.complaint_id(pair.complaint)]))
                for pair in train]
    assert weights.tolist() == pytest.approx(expected, abs=1e-4)
    assert len(list((classifier / "annotated").iterdir())) == 1


def test_test_rows_do_not_reach_training(folder, table, base, write_table, rows):
    """Other answers in the test split, and nothing changes: neither the vocabulary, nor a step, nor which one
    is the best."""
    changed = [{**row, "Answer": "شيء آخر تماما"} if data.split_of(row["Question"]) == "test" else row
               for row in rows]
    assert changed != rows
    call(finetune, "--data", write_table("changed.jsonl", changed), "--out", folder / "changed",
         "--max-steps", 21, "--save-every", 4,
         "--batch-size", 20)
    assert without_seconds(folder / "changed") == without_seconds(base)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / "changed" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits(folder, base, table, dtype):
    """Nearly the same losses; parameters and checkpoint stay fp32."""
    runs = {name: folder / f"{dtype}-{name}" for name in (dtype, "fp32")}
    for name, run in runs.items():
        call(finetune, "--ckpt", base, "--data", table, "--out", run, "--max-steps", 3, "--dtype", name,
             "--lr", 1e-4)
    assert losses(runs[dtype]) == pytest.approx(losses(runs["fp32"]), rel=0.02)
    assert {tensor.dtype for tensor in load_model(runs[dtype]).state_dict().values()} == {torch.float32}


class Casts(TorchDispatchMode):
    """Counts what is cast from fp32 to bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._to_copy.default and (options or {}).get("dtype") == torch.bfloat16:
            self.shapes[tuple(arguments[0].shape)] += 1
        return function(*arguments, **(options or {}))


def test_weights_are_cast_once_a_forward_pass(folder, base, table):
    """Autocast keeps what it has cast until its context is left: once a micro-batch, here 5 a step or 1; and
    once to validate."""
    counted = []
    for micro_tokens in (1, 10 ** 6):
        with Casts() as casts:
            call(finetune, "--ckpt", base, "--data", table, "--out", folder / f"casts-{micro_tokens}",
                 "--max-steps", 2, "--batch-size", 5,
                 "--micro-tokens", micro_tokens, "--dtype", "bf16", "--save-every", 100)
        counted.append({shape: n for shape, n in casts.shapes.items() if shape in shapes_of_linears(base)})
    passes = [2 * 5 + 1, 2 * 1 + 1]  # two steps, and the validation
    assert counted[0] and {shape: n / passes[0] for shape, n in counted[0].items()} == {
        shape: n / passes[1] for shape, n in counted[1].items()}


def shapes_of_linears(run):
    return {tuple(w.shape) for name, w in load_model(run).state_dict().items() if w.ndim == 2
            and ".h." in name}


# ------------------------------------------------------------------ finetune.py: stopping and going on

class Stop(BaseException):
    pass


def stop_before_save(number):
    """Power fails just before this save: its lines of metrics are written, its state is not."""
    patch, calls, original = pytest.MonkeyPatch(), [], checkpoint.save_state

    def save_state(*args):
        calls.append(args)
        if len(calls) == number:
            raise Stop
        original(*args)
    patch.setattr(checkpoint, "save_state", save_state)
    return patch


def stopped(number, *arguments):
    patch = stop_before_save(number)
    try:
        with pytest.raises(Stop):
            call(finetune, *arguments)
    finally:
        patch.undo()


def test_resumed_run_is_the_same_to_the_bit(folder, table, base, monkeypatch):
    """With dropout, so that the random generators count; twice stopped, across the end of an epoch; the best
    step is an early one."""
    scaled_rates(monkeypatch, lambda step: 0.1 if step < 2 else 10 + step)
    dropping = folder / "dropping"
    shutil.copytree(base, dropping)
    config = json.loads((base / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(config
                                                     | dict.fromkeys(("embd_pdrop", "attn_pdrop",
                                                                      "resid_pdrop"), 0.2)))
    arguments = ["--ckpt", dropping, "--data", table, "--max-steps", 9, "--save-every", 2, "--batch-size", 20,
                 "--lr", 1e-3,
                 "--dtype", "fp32"]
    whole, parts = folder / "whole", folder / "parts"
    call(finetune, *arguments, "--out", whole)

    stopped(2, *arguments, "--out", parts)
    assert len(lines(parts / "metrics.jsonl")) == 4  # the lines of steps 3 and 4 are to be written again
    stopped(2, *arguments, "--out", parts, "--resume")
    call(finetune, *arguments, "--out", parts, "--resume")
    assert without_seconds(parts) == without_seconds(whole)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    ended = [torch.load(run / "state" / "training.pt", weights_only=True) for run in (whole, parts)]
    assert ended[0]["progress"] == ended[1]["progress"]
    assert all(torch.equal(ended[0]["model"][name], ended[1]["model"][name]) for name in ended[0]["model"])
    assert ended[0]["progress"]["best_step"] == 2  # or a forgotten best would not show

    before = (parts / "model.safetensors").read_bytes()
    call(finetune, *arguments, "--out", parts, "--resume")  # nothing is left to do
    assert (parts / "model.safetensors").read_bytes() == before and len(lines(parts / "metrics.jsonl")) == 9


def test_stop_between_state_and_model_is_mended(folder, table, base):
    """The state is saved first; where the model of its step, the best so far, did not come to be written,
    resuming does it."""
    out = folder / "torn"
    arguments = ["--ckpt", base, "--data", table, "--out", out, "--max-steps", 2, "--save-every", 1,
                 "--dtype", "fp32"]
    saved = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        def tear(model, tokenizer, run, original=finetune.save_model):
            saved.append(run)
            if len(saved) == 2:
                raise Stop
            original(model, tokenizer, run)
        patch.setattr(finetune, "save_model", tear)
        call(finetune, *arguments)
    state = torch.load(out / "state" / "training.pt", weights_only=True)
    assert state["progress"]["best_step"] == state["progress"]["step"] == 2
    call(finetune, *arguments, "--resume")
    assert all(torch.equal(tensor, state["model"][name])
               for name, tensor in load_model(out).state_dict().items())


def test_resume_on_other_numbers(folder, table, base):
    """As the message on a loss that is not finite says; and from fp32 to fp16, whose scaler has no past."""
    out = folder / "numbers"
    arguments = ["--ckpt", base, "--data", table, "--out", out, "--max-steps", 3, "--save-every", 1,
                 "--batch-size", 20]
    stopped(2, *arguments, "--dtype", "fp32")
    stopped(2, *arguments, "--dtype", "fp16", "--resume")
    call(finetune, *arguments, "--dtype", "fp32", "--resume")
    assert len(losses(out)) == 3


def test_resume_is_refused_where_it_would_not_be_the_same_run(folder, table, base, tmp_path, write_table,
                                                              rows, capsys):
    run = tmp_path / "run"
    arguments = ["--data", table, "--max-steps", 21, "--save-every", 4, "--batch-size", 20, "--resume",
                 "--out", run]

    def refused(message, *more, change=None):
        shutil.copytree(base, run)
        if change:
            change()
        refusal(finetune, *arguments, *more)
        shutil.rmtree(run)
        last = capsys.readouterr().err
        assert last.startswith("error: ") and last.count("\n") == 1 and message in last
    refused("changed: --lr was 0.002, is 0.01", "--lr", 0.01)
    refused("changed: --weighting was balanced, is mild", "--weighting", "mild")
    refused("the data of", "--data", write_table("other.jsonl", rows[:-1]))
    refused("cannot be used (ValueError: its checksum is another); start a new run from its model",
            change=lambda: (run / "state" / "training.pt").write_bytes(b"half a file"))
    refused("holds no state to go on with", change=lambda: shutil.rmtree(run / "state"))
    refused("has lost lines", change=lambda: (run / "metrics.jsonl").unlink())
    refused("has lost lines", change=lambda: (run / "metrics.jsonl").write_text("{}\n"))
    refused("run.json cannot be used", change=lambda: (run / "run.json").write_text('{"script": "finet'))
    before = json.loads((base / "run.json").read_text())
    refused("is no run of finetune.py", change=lambda: (run / "run.json").write_text(json.dumps(before
                                                                                                | {"script": "a.py"})))
    refused("run.json cannot be used", change=lambda: (run / "run.json").unlink())
    refused("is a run of an older version", change=lambda: (run / "best").mkdir())
    refused("was made with split rule 1", change=lambda: (run / "run.json").write_text(json.dumps(before
                                                                                                  | {"split_rule": 1})))
    text = table.read_text(encoding="utf-8")
    try:
        table.write_text(text.replace("علاج", "دواء", 1), encoding="utf-8")
        refused("the data of .* has changed".split(".*")[1])
    finally:
        table.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------ train_classifier.py

def test_classifier_run(classifier, table):
    """Out-of-fold probabilities for all rows that were trained on, none for the test rows; the classes by
    name in config.json."""
    result = json.loads((classifier / "classifier.json").read_text())
    sides = data.split_pairs(tables.read_pairs(table, needed=("complaint", "severity")))
    keys = {data.complaint_id(p.complaint) for p in sides["train"] + sides["validation"]}
    assert set(result["out_of_fold"]) == set(result["trained_on"]) == keys
    assert all(sum(p) == pytest.approx(1) and min(p) >= 0 for p in result["out_of_fold"].values())
    assert 0.05 <= result["temperature"] <= 20
    assert {"tiny", "tiny, calibrated"} < set(result["scores"])
    for named in result["scores"].values():
        assert set(named) == {"accuracy", "macro_f1", "auc", "nll", "brier", "ece", "confusion"}
        assert sum(map(sum, named["confusion"])) == len(sides["train"]
                                                        + sides["validation"])  # each row once, out of fold
    assert load_model(classifier).raw_config["id2label"] == {"0": "non-critical", "1": "neutral",
                                                             "2": "critical"}
    assert json.loads((classifier / "run.json").read_text())["max_length"] == 64
    written = lines(classifier / "metrics.jsonl")
    assert [list(line) for line in written] == [["seed",
                                                 *(name for name in METRICS
                                                   if name != "supervised_tokens")]] * len(written)
    assert [line["step"] for line in written] == list(range(1, len(written) + 1))


def test_classifier_learns_which_class_is_which(classifier, folder, write_table, rows):
    """On test rows; in the table that it writes, by name, so that no order of classes can go wrong between
    the two."""
    unlabelled = [{"question": row["Question"], "true": row["Severity"]} for row in rows
                  if data.split_of(row["Question"]) == "test"]
    to = folder / "learned.jsonl"
    call(train_classifier, "--ckpt", classifier, "--annotate", write_table("test.csv", unlabelled), "--to",
         to)
    annotated = lines(to)
    assert len(annotated) == len(unlabelled) >= 5
    assert np.mean([row["Severity"] == row["true"] for row in annotated]) > 0.8
    assert np.mean([max(("Non-Critical", "Neutral", "Critical"), key=row.get).lower() == row["true"]
                    for row in annotated]) > 0.8


def test_classifier_run_is_a_checkpoint_for_the_next(classifier, folder, table):
    """It starts from what the first has learned: a step that changes nothing leaves the loss low."""
    call(train_classifier, "--ckpt", classifier, "--data", table, "--out", folder / "second", "--epochs", 1,
         "--lr", 1e-9)
    assert lines(folder / "second" / "metrics.jsonl")[0]["loss"] < 0.2 < lines(classifier / "metrics.jsonl")[0]["loss"]
    assert json.loads((folder / "second" / "run.json").read_text())["preprocess"] == "arabert"


# ------------------------------------------------------------------ LoRA, recipes

@pytest.fixture(scope="module")
def whole(tiny, folder):
    """A checkpoint to adapt."""
    save_model(*tiny, folder / "whole")
    return folder / "whole"


def test_lora(whole, table, folder, monkeypatch):
    """Adapters alone are trained and written; a stopped run goes on to the bit; merged, it is a model like
    any other."""
    monkeypatch.chdir(folder)  # runs/encoded
    common = ["--ckpt", whole, "--data", table, "--dtype", "fp32", "--lr", 0.01, "--lora", 2, "--batch-size",
              16, "--save-every", 3]
    call(finetune, *common, "--max-steps", 6, "--out", folder / "lora", "--merge")
    assert not (folder / "lora" / "model.safetensors").exists()
    assert losses(folder / "lora")[-1] < losses(folder / "lora")[0]
    adapted, merged, before = (load_model(path) for path in (folder / "lora", folder / "lora" / "merged",
                                                             whole))
    changed = {name for name, p in adapted.state_dict().items()
               if not torch.equal(p, before.state_dict()[name])}
    assert changed and all(name.endswith(("c_attn.weight", "c_proj.weight")) for name in changed)
    assert all(torch.equal(p, merged.state_dict()[name]) for name, p in adapted.state_dict().items())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        steps = iter(range(4))

        def stopping(*arguments, **options):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return real(*arguments, **options)
        real = finetune.linear_weighted_token_ce
        patch.setattr(finetune, "linear_weighted_token_ce", stopping)
        patch.setattr(sys, "argv", ["finetune.py", *map(str,
                                                        [*common, "--max-steps", 6, "--out",
                                                         folder / "stopped_lora", "--merge"])])
        finetune.main.__wrapped__()
    call(finetune, *common, "--max-steps", 6, "--out", folder / "stopped_lora", "--merge", "--resume")
    assert without_seconds(folder / "stopped_lora") == without_seconds(folder / "lora")
    adapters = [(folder / run / "adapter_model.safetensors").read_bytes() for run in ("lora", "stopped_lora")]
    assert adapters[0] == adapters[1]
    call(evaluate, folder / "lora", "--data", table, "--max-new-tokens", 3, "--dtype", "fp32", "--bertscore",
         "none")


def test_resuming_notices_a_changed_model(whole, table, tmp_path, monkeypatch, capsys):
    """Its tokenizer and configuration as well as its weights, and the base of adapters. The same table may lie
    elsewhere."""
    monkeypatch.chdir(tmp_path)
    ckpt = shutil.copytree(whole, tmp_path / "ckpt")
    arguments = ["--ckpt", ckpt, "--out", "run", "--dtype", "fp32", "--lora", 2]
    call(finetune, *arguments, "--data", table, "--max-steps", 1, "--merge")
    merged = (tmp_path / "run" / "merged" / "model.safetensors").read_bytes()
    table = shutil.copy(table, tmp_path / "copy.jsonl")
    arguments += ["--data", table, "--resume"]
    call(finetune, *arguments, "--max-steps", 2)
    assert (tmp_path / "run" / "merged" / "model.safetensors").read_bytes() != merged  # without --merge, too
    before = checkpoint.weights_digest("run")
    for name, old, new in (("config.json", '"resid_pdrop": 0.0', '"resid_pdrop": 0.5'),
                           ("tokenizer.json", '"add_prefix_space": true', '"add_prefix_space": false'),
                           ("model.safetensors", None, None)):
        content = (ckpt / name).read_bytes()
        changed = content.replace(old.encode(), new.encode()) if old else content[:-4000] + bytes(4000)
        assert changed != content
        (ckpt / name).write_bytes(changed)
        refusal(finetune, *arguments, "--max-steps", 3)
        assert "the model of run has changed" in capsys.readouterr().err
        if name == "model.safetensors":
            assert checkpoint.weights_digest("run") != before
        (ckpt / name).write_bytes(content)


def test_a_finished_run_is_merged_later(whole, table, folder, monkeypatch):
    """Neither --merge nor --gradient-checkpointing changes a run, so going on may add them: just when memory
    ran out one needs it."""
    monkeypatch.chdir(folder)
    common = ["--ckpt", whole, "--data", table, "--dtype", "fp32", "--lora", 2, "--max-steps", 2, "--out",
              folder / "merged_later"]
    call(finetune, *common)
    assert not (folder / "merged_later" / "merged").exists()
    call(finetune, *common, "--resume", "--merge", "--gradient-checkpointing")
    adapted, merged = load_model(folder / "merged_later"), load_model(folder / "merged_later" / "merged")
    assert all(torch.equal(p, merged.state_dict()[name]) for name, p in adapted.state_dict().items())


def test_recipe_paper(whole, table, folder, monkeypatch):
    """Its arguments, unless others are given; and each row supervised from its second token to the last
    EOS."""
    monkeypatch.chdir(folder)
    call(finetune, "--recipe", "paper", "--ckpt", whole, "--data", table, "--dtype", "fp32", "--max-steps", 1,
         "--lr", 0.001,
         "--max-length", 96, "--out", folder / "paper_run")
    arguments = json.loads((folder / "paper_run" / "run.json").read_text())["arguments"]
    expected = {"lora": 16, "lora_alpha": 32.0, "batch_size": 8, "warmup": 0.0, "train_rows": 20_000,
                "supervise": "row", "lr": 0.001}
    assert {name: arguments[name] for name in expected} == expected
    line, = lines(folder / "paper_run" / "metrics.jsonl")
    assert line["examples"] == 8 and line["supervised_tokens"] == line["tokens"] == 8 * 95


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_nothing(whole, table, folder, monkeypatch, dtype):
    """In 16 bits, blocks are computed again with the weights that autocast has kept."""
    monkeypatch.chdir(folder)
    common = ["--ckpt", whole, "--data", table, "--dtype", dtype, "--max-steps", 3, "--batch-size", 8,
              "--micro-tokens", 100]
    call(finetune, *common, "--out", folder / f"kept-{dtype}")
    call(finetune, *common, "--out", folder / f"recomputed-{dtype}", "--gradient-checkpointing")
    assert without_seconds(folder / f"kept-{dtype}") == without_seconds(folder / f"recomputed-{dtype}")


@pytest.mark.parametrize("arguments, message", [
    (["--lora", 4], "--lora adapts a checkpoint; --ckpt tiny is made on the spot"),
    (["--merge"], "--merge and --lora-targets belong to --lora R"),
    (["--lora", 0, "--ckpt", "x"], "--lora must be positive"),
    (["--lora", 2, "--lora-dropout", 1, "--ckpt", "x"], "--lora-dropout must be less than 1"),
], ids=str)
def test_lora_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        call(finetune, *arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


# ------------------------------------------------------------------ records

def test_answers_with_unicode_line_separators(tmp_path):
    """They end a line for Python's splitlines, not in JSON."""
    head = {"name": "a", "run": {}, "protocol": {"rows": 1}}
    answer = findings.Answer(1, "أ", "ب", None, None, "", "نعم\u2028لا\u0085", True, 1.0, 2)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, asdict(answer))),
                    encoding="utf-8")
    assert findings.load_answers(path).rows == [answer]
    checkpoint.keep_lines(path, 2)
    assert len(findings.load_answers(path).rows) == 1


# ------------------------------------------------------------------ refusals

def test_what_was_found_in_the_table_is_printed_before_a_refusal(write_table, rows, capsys):
    table = write_table("few.jsonl", [*rows[:2], {**rows[2], "Answer": ""}])
    refusal(finetune, "--data", table)
    printed = capsys.readouterr().out
    assert "complaint = 'Question'" in printed and "left out 1 rows: 1 without a response (row 3)" in printed


@pytest.fixture
def bad(folder, tmp_path, table, base, classifier, write_table, rows):
    """name -> path, to stand in for {name} in the arguments below"""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    return dict(other=tmp_path / "other",
        table=table, base=base, classifier=classifier, empty=tmp_path / "empty", new=tmp_path / "new",
        nowhere=tmp_path / "nowhere",
        columns=write_table("columns.csv", [{"question": "a", "reply": "b"}]),
        few=write_table("few.jsonl", rows[:2]),
        bare=write_table("bare.csv", [{"question": row["Question"], "answer": row["Answer"]}
                                      for row in rows]))


REFUSED = [
    (finetune, "--data {table} --weighting hard", "--weighting is one of"),
    (finetune, "--data {table} --weighting 1,2", "or three numbers"),
    (finetune, "--data {nowhere}.csv", "no such file"),
    (finetune, "--data {columns}", "no column for the response; it has question, reply"),
    (finetune, "--data {bare}", "has not all three severity probabilities: give --classifier RUN, or --weighting none"),
    (finetune, "--data {few}", "too few complaints"),
    (finetune, "--data {table} --columns complaint", "ROLE=COLUMN"),
    (finetune, "--data {table} --ckpt {nowhere}", "is neither a folder"),
    (finetune, "--data {table} --ckpt {empty}", "has no config.json"),
    (finetune, "--data {table} --ckpt {classifier}", "is no causal language model"),
    (finetune, "--data {table} --classifier {base}", "is no run of train_classifier.py"),
    (finetune, "--data {table} --resume", "--resume needs the run folder"),
    (finetune, "--data {table} --resume --out {other}", "holds no state to go on with"),
    (finetune, "--data {table} --out {base}", "exists and is not empty"),
    (finetune, "--data {table} --lr 0", "--lr must be positive"),
    (finetune, "--data {table} --batch-size -1", "--batch-size must be positive"),
    (finetune, "--data {table} --seed -1", "--seed must be at least 0"),
    (finetune, "--data {table} --max-length 6", "too few for a prompt"),
    (finetune, "--data {table} --recipe paper", "--recipe paper adapts a checkpoint with LoRA: name one"),
    (finetune, "--data {table} --device tpu", "--device is auto, cpu, cuda or cuda:N"),
    (train_classifier, "--data {bare}", "no column for the severity"),
    (train_classifier, "--data {table} --out {classifier}", "exists and is not empty"),
    (train_classifier, "--data {table} --annotate {table}", "belong together"),
    (train_classifier, "--data {table} --annotate {table} --to {bare}", "exists: remove it"),
    (train_classifier, "--data {table} --annotate {nowhere}.csv --to {new}.csv", "no such file"),
    (train_classifier, "--data {table} --folds 1", "--folds takes 2 or more"),
    (train_classifier, "--data {table} --epochs 0", "--epochs must be positive"),
    (train_classifier, "--data {table} --seed 0 -1", "--seed must be at least 0"),
    (train_classifier, "--data {table} --ckpt {base} --out {new}", "is a language model"),
    (evaluate, "", "there is no run yet"),
    (evaluate, "{nowhere} --data {table}", "is neither a folder"),
    (evaluate, "{classifier} --data {table} --out {new}", "is no causal language model"),
    (evaluate, "{base} --data {columns}", "no column for the response"),
    (evaluate, "{base} --data {few}", "none of its complaints falls into the test split"),
    (evaluate, "{base} --temperature -1", "--temperature must be at least 0"),
]


@pytest.mark.parametrize("script, arguments, message", REFUSED,
                         ids=[f"{s.__name__} {a}" for s, a, _ in REFUSED])
def test_refused_in_one_line(bad, capsys, monkeypatch, tmp_path, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    refusal(script, *arguments.format(**bad).split())
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]  # nothing begun


def test_default_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("finetune-001", "finetune-007", "finetune-x", "classifier-009"):
        Path("runs", name).mkdir(parents=True)
    with checkpoint.open_run(None, "finetune") as run:
        assert run == Path("runs/finetune-008") and run.is_dir()
    assert not run.exists()  # nothing has come into it
    with checkpoint.open_run("runs/finetune-001", "finetune") as run:  # empty: taken
        assert run == Path("runs/finetune-001")


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(Stop):
        def fail(path):
            path.write_text('{"new')
            raise Stop
        checkpoint.write_atomically(tmp_path / "a.json", fail)
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_folds_refuse_a_model_that_has_seen_the_rows(classifier, table, tmp_path, capsys):
    """Out-of-fold scores of a checkpoint that was trained on the same complaints would be a leak."""
    refusal(train_classifier, "--ckpt", classifier, "--data", table, "--folds", 2, "--out", tmp_path / "new")
    assert "was trained on these complaints" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_classifier_that_was_stopped_is_no_start(classifier, table, tmp_path, capsys):
    """Nobody knows what it has seen. Nor is a run of another split rule: its test rows may be training rows."""
    stopped = shutil.copytree(classifier, tmp_path / "stopped")
    (stopped / "classifier.json").unlink()
    arguments = ["--ckpt", stopped, "--data", table, "--folds", 2, "--out", tmp_path / "new"]
    refusal(train_classifier, *arguments)
    assert "was stopped before it was finished" in capsys.readouterr().err
    other = shutil.copytree(classifier, tmp_path / "other")
    run_json = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(run_json | {"split_rule": 1, "script": "finetune.py"}))
    for script in (train_classifier, finetune):
        refusal(script, "--ckpt", other, "--data", table, "--out", tmp_path / "new")
        assert "was made with split rule 1" in capsys.readouterr().err


def test_columns_of_a_table_that_is_trained_on_and_annotated(rows, write_table, tmp_path, capsys):
    """--columns are those of --data, so of the same table as --annotate, too. Another table's columns are looked
    at before the training."""
    table = write_table("table.jsonl", [{"Text": row["Question"], "Label": row["Severity"]} for row in rows])
    arguments = ["--data", table, "--columns", "complaint=Text", "severity=Label", "--epochs", 1]
    call(train_classifier, *arguments, "--annotate", table, "--to", tmp_path / "new.jsonl", "--out", tmp_path / "run")
    assert len(lines(tmp_path / "new.jsonl")) == len(rows)
    other = write_table("other.jsonl", [{"Text": row["Question"], "n": 1} for row in rows])
    capsys.readouterr()
    refusal(train_classifier, *arguments, "--annotate", other, "--to", tmp_path / "b.jsonl", "--out", tmp_path / "b")
    printed = capsys.readouterr()
    assert "has no column for the complaint" in printed.err and "rows to train on" not in printed.out


def test_a_class_without_rows_is_not_learnt(rows, write_table, tmp_path):
    """--class-balanced gives it a huge weight, which must not act on what --label-smoothing adds."""
    table = write_table("table.jsonl", [row for row in rows if row["Severity"] != "neutral"])
    call(train_classifier, "--data", table, "--epochs", 2, "--class-balanced", "--label-smoothing", 0.1,
         "--out", tmp_path / "run")
    confusion = json.loads((tmp_path / "run" / "classifier.json").read_text())["scores"]["tiny"]["confusion"]
    assert all(row[1] == 0 for row in confusion)


def test_annotation_does_not_train_by_itself(table, tmp_path, capsys):
    """A run that was stopped, or a plain encoder, must not be replaced by a model of the embedded sample."""
    refusal(train_classifier, "--ckpt", tmp_path, "--annotate", table, "--to", tmp_path / "new.jsonl")
    assert "is no run of train_classifier.py" in capsys.readouterr().err
