"""Every benchmark runs, at the smallest size, to the row that it prints for docs/speed.md.

Times mean nothing at this size. That both sides computed the same is checked by the benchmarks themselves.
"""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sevloss import data
from sevloss.inputs import tables
from sevloss.models import from_scratch, load_model, lora

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZE = "--layers 1 --width 64 --vocabulary 500"


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """run("loss.py", arguments) -> what it prints. The script runs as `python` would run it, but in this process:
    importing torch anew takes seconds. What it starts are processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "SAMPLE", str(BENCHMARKS.parent / "data" / "sample.jsonl"))
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(script, arguments):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / script), *arguments.split()])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capfd.readouterr().out
    return run


@pytest.fixture
def load(monkeypatch):
    """load("loss") -> the benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def check_row(printed, work):
    """The last line is a row: what was done, against what, the result, the command."""
    cells = [cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")]
    assert len(cells) == 4 and all(cells) and cells[0].startswith(work)


@pytest.mark.parametrize("script, arguments, work", [
    pytest.param("annotate.py", f"{SIZE} --vocabulary 2000 --rows 6 --repeat 1", "severity of complaints",
                 marks=pytest.mark.peers("transformers")),
    pytest.param("bertscore.py", f"{SIZE} --vocabulary 2000 --layer 1 --rows 4 --repeat 1", "BERTScore",
                 marks=pytest.mark.peers("transformers", "bert_score")),
    pytest.param("generate.py", f"{SIZE} --rows 4 --new-tokens 4 --repeat 1", "decoding",
                 marks=pytest.mark.peers("transformers")),
    pytest.param("loading.py", f"{SIZE} --stored fp32 --kinds model.safetensors", "loading model.safetensors",
                 marks=pytest.mark.peers("transformers")),
    ("loss.py", "--rows 64 --width 32 --vocabulary 500 --repeat 1", "loss"),
    pytest.param("start.py", "--rows 64 --vocabulary 500 --repeat 1", "64 rows",
                 marks=pytest.mark.peers("transformers", "datasets", "pandas", "openpyxl")),
    pytest.param("step.py", f"{SIZE} --examples 2 --steps 1 --model qwen-lora", "step",
                 marks=pytest.mark.peers("transformers", "peft")),
], ids=lambda value: value if str(value).endswith(".py") else "")
def test_row(run, script, arguments, work):
    check_row(run(script, arguments), work)


def test_scaling(run):
    """A line for each length, a number for each count of rows that is not too many."""
    arguments = f"{SIZE} --rows 1 2 --lengths 16 20 --most-tokens 32 --repeat 1"
    lines = run("scaling.py", arguments).splitlines()
    assert [len(line.split()) for line in lines[-2:]] == [3, 2]


@pytest.mark.parametrize("arguments, rows", [
    ("kills --trials 1 --steps 6", 1),
    ("efficiency --layers 1 --width 64 --vocabulary 300 --steps 2 --batch-size 4 --rounds 1", 2),
    ("rows --smallest 200 --rows 300", 2),
], ids=["kills", "efficiency", "rows"])
def test_ranks(run, arguments, rows):
    """Each part runs to its table."""
    lines = run("ranks.py", arguments).splitlines()
    header = lines[-rows - 2]
    assert all(line.count("|") == header.count("|") > 5 for line in lines[-rows - 1:])
    if arguments.startswith("kills"):
        assert [cell.strip() for cell in lines[-1].split("|")][2:4] == ["1", "1"]


def test_scale_tables(run):
    """Two lines a checkpoint in each of two tables; a 7B model has as many parameters as its name says."""
    printed = run("scale.py", "")
    assert printed.count("| full |") == printed.count("| LoRA 16 |") == 18
    assert "| Llama, 7B | full | 6,738 M |" in printed


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", ["GPT2-Small-Arabic", "Bloomz-560M", "Qwen2.5-0.5B, Al-Atlas-0.5B", "Qwen3-0.6B",
                                  "LFM2-350M"])
def test_scale_activations(load, name, rank):
    """The formula of what the blocks keep for the backward pass is within a tenth of what autograd keeps."""
    scale = load("scale")
    sizes = {key: 256 for key in ("n_embd", "hidden_size") if key in scale.SHAPES[name]}
    heads = {key: 4 for key in ("n_head", "num_attention_heads") if key in scale.SHAPES[name]}
    kept = {}
    for layers in (4, 8):
        raw = {**scale.SHAPES[name], **sizes, **heads, "vocab_size": 50, "head_dim": 64}
        raw |= {key: layers for key in ("n_layer", "num_hidden_layers") if key in raw}
        raw |= {key: value for key, value in (("intermediate_size", 512), ("num_key_value_heads", 2),
                                              ("layer_types", raw.get("layer_types", [])[:layers])) if raw.get(key)}
        model = from_scratch(raw)
        if rank:
            lora.attach(model, rank, alpha=rank)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def keep(tensor, own=own, storages=storages):
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randint(0, 50, (200,)), [100, 100])
        measured = sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / 200
        kept[layers] = measured, scale.saved_bytes(scale.describe(raw, rank), bits=32, cpu=True)
    measured, formula = (large - small for large, small in zip(kept[8], kept[4]))  # without what is not a block's
    assert measured == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize("kind", ["model.safetensors", "three shards", "pytorch_model.bin"])
def test_loading_kinds(load, tmp_path, kind):
    """Each way to store a checkpoint is read."""
    loading, config = load("loading"), load("turns").gpt2_config(layers=1, width=64, vocabulary=50)
    tensors = from_scratch(config).state_dict()
    loading.write(tmp_path, config, tensors, kind)
    assert load_model(tmp_path).head_weight.equal(tensors["transformer.wte.weight"])


def test_a_missing_peer_is_said(load):
    with pytest.raises(SystemExit, match="no_such_package.*requirements-dev.txt"):
        load("turns").need("torch", "no_such_package")


# ------------------------------------------------------------------ experiment.py

def test_experiment(run, load, tmp_path):
    """A run and its control, the table; and runs that are finished are known as such."""
    printed = run("experiment.py", "--settings none shuffled --seeds 1 --out out --finetune=--max-steps=1 "
                                   "--evaluate=--max-new-tokens=1")
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table.startswith("| rows | setting | NLL | chrF | ROUGE-L | urgent |")
    assert table in printed and "| none |" in table and "| shuffled |" in table
    assert load("experiment").is_finished(tmp_path / "out" / "shuffled-0")
    (tmp_path / "out" / "shuffled-0" / "validation.json").unlink()
    assert not load("experiment").is_finished(tmp_path / "out" / "shuffled-0")


def test_shuffled_probabilities(load, tmp_path):
    """The control has the same rows, and probabilities have changed places among the training rows alone."""
    load("experiment").write_shuffled(tables.SAMPLE, tmp_path / "shuffled.jsonl")
    before = tables.read_pairs(tables.SAMPLE, needed=("complaint", "response"))
    after = tables.read_pairs(tmp_path / "shuffled.jsonl", needed=("complaint", "response"))
    for name in ("complaint", "response", "severity"):
        assert [getattr(pair, name) for pair in before] == [getattr(pair, name) for pair in after]
    before_p = torch.tensor([pair.probabilities for pair in before])
    after_p = torch.tensor([pair.probabilities for pair in after])
    moved = (before_p - after_p).abs().amax(1) > 1e-5
    train = torch.tensor([data.split_of(pair.complaint) == "train" for pair in before])
    assert moved.sum() > 0.9 * train.sum() and not (moved & ~train).any()
    torch.testing.assert_close(after_p.sort(0).values, before_p.sort(0).values, rtol=0, atol=1e-5)
