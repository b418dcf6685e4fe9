"""torchrun with several ranks ends where one process does: real processes, over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lines
from safetensors.torch import load_file

from sevloss import data, distributed
from sevloss.models import from_scratch, save_model
from sevloss.models.tiny import tiny_gpt2

SCRIPT = Path(__file__).with_name("distributed_runs.py")
NOT_SHARDED = {"sharded": "full", "sharded lora": "lora"}


def launch(cwd, folder, names, ranks=None, restarts=0):
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                  f"--max-restarts={restarts}"]
    process = subprocess.run([*start, str(SCRIPT), str(folder), *names], cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A table, two checkpoints, and the runs of one process in one/."""
    folder = tmp_path_factory.mktemp("distributed")
    table = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "table.jsonl").write_text(table, encoding="utf-8")
    (folder / "posts.jsonl").write_text("".join(json.dumps({"Question": row["Question"]}) + "\n" for row in rows))
    torch.manual_seed(0)
    gpt2, tokenizer = tiny_gpt2([row[name] for row in rows for name in ("Question", "Answer")])
    save_model(gpt2, tokenizer, folder / "gpt2")
    llama = from_scratch(dict(
        model_type="llama", vocab_size=len(gpt2.head_weight), hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=gpt2.config.eos_token_id))
    save_model(llama, tokenizer, folder / "llama")
    launch(folder, "one", ["first step", "full", "two rows a step", "fp16, one row a step", "tokens", "lora"])
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """The folder of the same runs on two ranks, and what the launcher printed."""
    process = launch(folder, "two", ["first step", "full", "fp16, one row a step", "tokens", "lora", "sharded"], 2)
    return folder / "two", process


@pytest.fixture(scope="module")
def three(folder):
    launch(folder, "three", ["two rows a step", "sharded lora", "sharded bf16"], 3)
    return folder / "three"


def weights(run):
    return {name: tensor for file in run.glob("*.safetensors") for name, tensor in load_file(file).items()}


def distance(a, b):
    return torch.stack([(a[name].double() - b[name].double()).norm() for name in a]).norm()


def test_first_gradient(folder, two):
    """AdamW's first moment after one step is a tenth of the clipped gradient: the same within 1e-6."""
    states = [torch.load(out / "first step" / "state" / "training.pt")["optimizer"]["state"]
              for out in (folder / "one", two[0])]
    one, other = [{str(i): moments["exp_avg"] for i, moments in state.items()} for state in states]
    assert distance(one, other) < 1e-6 * distance(one, {name: 0 * tensor for name, tensor in one.items()})


@pytest.mark.parametrize("ranks, name, bound", [
    ("two", "full", 1e-4), ("two", "fp16, one row a step", 1e-2), ("two", "tokens", 1e-4), ("two", "lora", 1e-3), ("two", "sharded", 1e-4),
    ("three", "two rows a step", 1e-4), ("three", "sharded lora", 1e-3)])
def test_same_weights(folder, two, three, ranks, name, bound):
    """Ragged micro-batches, ranks without rows, several micro-batches a step. LoRA's B begins at zero, where
    AdamW's first steps follow the sign of tiny gradients."""
    one = weights(folder / "one" / NOT_SHARDED.get(name, name))
    other = weights(folder / ranks / name)
    before = weights(folder / "gpt2")
    if "lora" in name:
        before = {key: 0 * tensor if "lora_B" in key else tensor for key, tensor in one.items()}
    assert distance(one, other) < bound * distance(one, before)


def test_state_of_a_sharded_model_is_not_rounded(three):
    """Validation leaves gathered copies in bf16 behind; what is saved are the fp32 weights."""
    state = torch.load(three / "sharded bf16" / "state" / "training.pt")
    stored = weights(three / "sharded bf16")
    for name, tensor in state["model"].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name])
        assert not torch.equal(tensor, tensor.bfloat16().float())


def test_same_metrics(folder, two):
    """Loss, gradient norm and counts are of the whole step, the validation score of all rows."""
    for name in ("full", "sharded"):
        for a, b in zip(lines(folder / "one" / "full" / "metrics.jsonl"), lines(two[0] / name / "metrics.jsonl"),
                        strict=True):
            for key in ("step", "tokens", "supervised_tokens", "examples"):
                assert a[key] == b[key]
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        one, other = [json.loads((out / "validation.json").read_text())
                      for out in (folder / "one" / "full", two[0] / name)]
        assert [step for step, _ in one] == [step for step, _ in other]
        assert [nll for _, nll in other] == pytest.approx([nll for _, nll in one], rel=1e-4)


def test_classifier_and_annotation(folder, two):
    """Trained on shares of each step's rows; a table annotated by shares. With 7 rows a step and 3 ranks, the last
    step of an epoch leaves some with few."""
    one, other = [json.loads((out / "classifier" / "classifier.json").read_text()) for out in (folder / "one", two[0])]
    assert other["scores"]["tiny"]["nll"] == pytest.approx(one["scores"]["tiny"]["nll"], rel=1e-4)
    for a, b in zip(lines(folder / "one" / "annotated.jsonl"), lines(two[0] / "annotated.jsonl"), strict=True):
        assert a["Question"] == b["Question"]
        assert b["Critical"] == pytest.approx(a["Critical"], abs=1e-4)


def test_evaluation(folder, two):
    """The same answers, in whatever order, with the same likelihoods and BERTScores."""
    one, other = [json.loads((out / "full" / "evaluation" / "evaluation.json").read_text())
                  for out in (folder / "one", two[0])]
    answers = [sorted((line["row"], line["answer"]) for out in (out,) for file in (out / "full" / "evaluation").glob("answers*.jsonl")
                      for line in lines(file)[1:]) for out in (folder / "one", two[0])]
    assert answers[0] and sum(a == b for a, b in zip(*answers, strict=True)) >= 0.9 * len(answers[0])
    assert one.keys() == other.keys()


def test_killed_rank(folder):
    """torchrun starts all ranks again after one was killed, from the last save; then a single process goes on
    with what two ranks have saved."""
    process = launch(folder, "two", ["killed"], 2, restarts=1)
    assert "nothing was saved" in process.stdout and "going on after step 4 of 12" in process.stdout
    one = weights(folder / "one" / "full")
    assert distance(one, weights(folder / "two" / "killed")) < 1e-4 * distance(one, weights(folder / "gpt2"))
    assert "going on after step 12 of 12; the run is finished" in launch(folder, "two", ["killed"]).stdout


def test_rank_0_alone_prints(two):
    assert two[1].stdout.count("pairs to train on") == 6


def test_share(monkeypatch):
    """Every row is in one share; tokens are balanced as far as rows allow; all ranks get equally many
    micro-batches."""
    monkeypatch.setattr(distributed, "ranks", lambda: 3)
    lengths = [50, 3, 9, 9, 21, 40, 4, 4]
    shares = distributed.share(lengths, range(8))
    assert sorted(i for share in shares for i in share) == list(range(8))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= 10
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(distributed.micro_batches(lengths, [0, 1], 60))
    assert parts == [[[0]], [[1]], [[]]]
    assert data.make_batch(None, []).lengths == [1]
