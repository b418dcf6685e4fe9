"""Every benchmark runs, at the smallest size, to the row that it prints for docs/speed.md.

Times mean nothing at this size. That both sides computed the same is checked by the benchmarks themselves.
"""

import importlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sevloss import InputError, data, device
from sevloss.inputs import tables
from sevloss.models import from_scratch, load_model, lora, save_model
from sevloss.models.tiny import tiny_gpt2

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

def test_experiment(run, tmp_path, capfd):
    """Runs are trained, tested and kept as numbers; the tables come again from these alone; what is there is
    not made again."""
    command = "experiment.py --settings none strong-labels --seeds 0 --out out --finetune=--max-steps=1"
    printed = run(*command.split(" ", 1))
    lines = (tmp_path / "out" / "none-0.tsv").read_text().splitlines()
    assert lines[0] == "row\tnll\ttokens" and len(lines) > 10
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| none | 0 | 1 |" in table and "| strong-labels | 0.75 | 1 |" in table and table in printed
    printed = run(*command.split(" ", 1))
    assert table in printed and "finetune.py" not in printed
    assert table in run("experiment.py", "--from out")
    for other, message in (("--seeds 10", "a seed needs a fold of its own"), ("--seeds 1 --ckpt x", "another --out")):
        with pytest.raises(SystemExit):
            run("experiment.py", f"--out out {other}")
        assert message in capfd.readouterr().err


def test_probabilities_of_the_experiment(load):
    """Labels are one-hot; the control has the same weights on other complaints; labels that are missing are
    not made up."""
    experiment = load("experiment")
    pairs = tables.read_pairs(tables.SAMPLE, needed=("complaint", "response"))
    labels = experiment.probabilities_of(pairs, "labels", 0)
    assert labels.argmax(1).tolist() == [pair.severity for pair in pairs] and (labels.sum(1) == 1).all()
    for source in ("labels", "classifier"):
        rows = experiment.probabilities_of(pairs, source, 0)
        shuffled = experiment.probabilities_of(pairs, f"{source}-shuffled", 0)
        assert (rows != shuffled).any(1).float().mean() > 0.5
        torch.testing.assert_close(rows.sort(0).values, shuffled.sort(0).values)
    unlabelled = [pair._replace(severity=None) for pair in pairs]
    source = experiment.SETTINGS["none"][1]  # a table without labels must have its control all the same
    assert len(experiment.probabilities_of(unlabelled, source, 0)) == len(pairs)
    with pytest.raises(InputError, match="without a label"):
        experiment.probabilities_of(unlabelled, "labels", 0)


def test_verdicts_of_the_experiment(load, tmp_path):
    """An effect that is there in every seed is found, with its size; one that is not is not; the contrast is
    the mean of critical rows minus that of non-critical ones."""
    experiment = load("experiment")
    (tmp_path / "rows.tsv").write_text("row\tclass\n1\tnon-critical\n2\tneutral\n3\tcritical\n")
    generator = np.random.default_rng(0)
    for seed in range(6):
        for k, setting in ((0, "none"), (0.5, "balanced-labels"), (0.75, "strong-labels"),
                           (0.75, "strong-labels-shuffled"), (1, "one-labels")):
            effect = 0.0 if setting.endswith("shuffled") else -0.1 * k
            nll = 3 + effect + generator.normal(0, 0.005)  # per token, of 2 tokens
            (tmp_path / f"{setting}-{seed}.tsv").write_text(
                f"row\tnll\ttokens\n1\t4\t2\n2\t5\t2\n3\t{2 * nll}\t2\n")
    results = experiment.read_results(tmp_path)
    assert len(results) == 5 and sorted(results["strong-labels"]) == list(range(6))
    assert results["none"][0]["non-critical"] == 2 and abs(results["none"][0]["contrast"] - 1) < 0.05
    primary = experiment.difference(results, *experiment.PRIMARY, "contrast")
    assert primary.p < 1e-4 and primary.low < -0.075 < primary.high
    second = experiment.slope(results)
    assert second.p < 1e-4 and second.low < -0.1 < second.high
    assert experiment.difference(results, "strong-labels-shuffled", "none", "contrast").p > 0.05
    table = "\n".join(experiment.tests_table(results))
    assert "| found |" in table and "| not found |" in table


def test_ensemble(run, tmp_path, load):
    """Every row gets probabilities, from members that have not seen it: with labels drawn by chance they are
    no better than chance, which a leak would be."""
    printed = run("ensemble.py", "--to new.jsonl")
    pairs = tables.read_pairs(tmp_path / "new.jsonl", needed=("complaint", "response"), probabilities="required")
    assert len(pairs) == 240 and "all of them" in printed and "mean by true class" in printed
    ensemble = load("ensemble")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    fold = torch.arange(200) % ensemble.FOLDS
    features = torch.randn(200, 50, generator=generator)
    logits = ensemble.linear_member(features, labels, fold)
    assert (logits.argmax(1) == labels).float().mean() < 0.5
    features[:, 0] = labels.float()
    logits = ensemble.linear_member(features, labels, fold)
    assert (logits.argmax(1) == labels).float().mean() > 0.55


def test_features_are_means_of_a_block(load, tmp_path):
    model, tokenizer = tiny_gpt2(["عندي صداع شديد", "الم"])
    save_model(model, tokenizer, tmp_path / "model")
    texts = ["الم", "عندي صداع شديد", "صداع"]
    compute = device.choose("cpu", "fp32")
    x = load("ensemble").features(tmp_path / "model", 0, texts, compute)
    model.eval()
    output = []
    model.blocks[0].register_forward_hook(lambda module, inputs, hidden: output.append(hidden))
    with torch.no_grad():
        for text in texts:
            tokens, lengths = data.pack([tokenizer.encode(text).ids])
            model(tokens, lengths)
    torch.testing.assert_close(x, torch.stack([hidden.mean(0) for hidden in output]))
