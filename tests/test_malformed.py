"""Malformed inputs of every kind that is read: each is refused with exit code 2 and one line, in time, in little
memory, and leaves nothing half-written."""

import json
import random
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from conftest import call

import evaluate
import finetune
import train_classifier
from benchmarks import fuzz
from sevloss import InputError

SCRIPTS = {"finetune": finetune, "train_classifier": train_classifier, "evaluate": evaluate}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return fuzz.make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def refused(capsys):
    """refused(script, *arguments): exit code 2 and one line, within ten seconds."""
    def start(script, *arguments):
        capsys.readouterr()
        began = time.perf_counter()
        with pytest.raises(SystemExit) as left:
            call(SCRIPTS[script], "--device", "cpu", *arguments)
        error = capsys.readouterr().err.strip()
        assert left.value.code == 2, (arguments, error)
        assert error.startswith("error: ") and error.count("\n") == 0, (arguments, error)
        assert time.perf_counter() - began < 10, arguments
        return error
    return start


@pytest.fixture
def memory():
    """Nothing here may take more than 1.5 GB beside what the process holds already; seen on Linux alone."""
    process = Path("/proc/self")
    if not process.exists():
        yield
        return

    def kilobytes(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", (process / "status").read_text())[1])
    (process / "clear_refs").write_text("5")  # the peak is counted anew
    before = kilobytes("VmRSS")
    yield
    assert kilobytes("VmHWM") - before < 1.5 * 2 ** 20


# ------------------------------------------------------------------ files

WRONG_JSON = {"empty": b"", "half": b'{"a": ', "list": b"[]", "text": b'"x"', "number": b"5", "null": b"null",
              "deep": b"[" * 100_000, "binary": bytes(range(256)), "utf-16": '{"a": 1}'.encode("utf-16"),
              "long number": b'{"vocab_size": ' + b"9" * 5000 + b"}", "twice": b"{} {}"}
JSON_FILES = [("gpt2", "config.json"), ("llama", "generation_config.json"), ("llama", "tokenizer.json"),
              ("gpt2", "tokenizer_config.json"), ("adapter", "adapter_config.json"), ("old tokenizer", "vocab.json"),
              ("old tokenizer", "added_tokens.json"), ("classifier", "run.json"), ("classifier", "classifier.json")]


@pytest.mark.parametrize("kind, name", JSON_FILES)
def test_no_json_of_the_kind(sources, tmp_path, kind, name):
    source, _, read = sources[kind]
    for case, content in WRONG_JSON.items():
        copy = shutil.copytree(source, tmp_path / case)
        (copy / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            read(copy)
        assert name in str(error.value) and "\n" not in str(error.value), case


# What is no value of its key. The others are ignored, or have a meaning of their own.
WRONG_VALUES = [
    ("gpt2", "config.json", "model_type", [None, 5, [], "t5"]),
    ("gpt2", "config.json", "vocab_size", [None, -1, 0, "300", [], {}, 1e300, 10 ** 30, 5, True]),
    ("gpt2", "config.json", "n_layer", [-1, 0, 2, 10 ** 6, 10 ** 30, "1", [1], None]),
    ("gpt2", "config.json", "n_head", [0, -2, 3, "2", 2.5, None]),
    ("gpt2", "config.json", "n_positions", [0, -5, "x", None, 7]),
    ("gpt2", "config.json", "resid_pdrop", [7, -1, "x", [], {}]),
    ("gpt2", "config.json", "eos_token_id", ["x", -1, 10 ** 9, [[]], {"a": 1}, [0, 10 ** 9], 0.5]),
    ("gpt2", "config.json", "activation_function", [None, 5, "swish", []]),
    ("gpt2", "config.json", "quantization_config", [{"load_in_4bit": True}, "x", [1]]),
    ("gpt2", "config.json", "sevloss", [5, [1], {"preprocess": "farasa"}, {"preprocess": [1]}, "x"]),
    ("llama", "config.json", "rope_parameters", [5, "x", [1], {"rope_type": "yarn"}, {"rope_type": []},
                                                 {"rope_type": "linear"}, {"rope_type": "llama3"}]),
    ("llama", "config.json", "num_key_value_heads", [0, -1, 3, "x", []]),
    ("llama", "generation_config.json", "eos_token_id", ["x", -1, 10 ** 9, {"a": 1}, [[]]]),
    ("adapter", "adapter_config.json", "r", [None, 0, -1, "2", 3, 10 ** 9, [], 1.5]),
    ("adapter", "adapter_config.json", "lora_alpha", [None, "x", [], float("nan"), float("inf")]),
    ("adapter", "adapter_config.json", "lora_dropout", ["x", 7, -1, []]),
    ("adapter", "adapter_config.json", "target_modules", [None, [], 5, "(", [5], ["x"], {}]),
    ("adapter", "adapter_config.json", "base_model_name_or_path", [None, 5, "", [], "/nowhere", "x\x00"]),
    ("adapter", "adapter_config.json", "peft_type", [None, "LOHA", 5]),
    ("adapter", "adapter_config.json", "init_lora_weights", ["pissa", "olora", 5]),
    ("adapter", "adapter_config.json", "anything", [True, 1, "x", [0], {"a": 1}]),
    ("classifier", "classifier.json", "temperature", [None, 0, -1, float("nan"), float("inf"), 10 ** 30, "1", []]),
    ("classifier", "classifier.json", "split_rule", [None, 99, "x"]),
    ("classifier", "classifier.json", "trained_on", [None, 5, [[]]]),
    ("classifier", "classifier.json", "out_of_fold", [None, 5, [], {"a": [1, 0]}, {"a": 5}, {"a": [float("nan"), 0, 1]},
                                                      {"a": ["x", 0, 1]}]),
    ("classifier", "run.json", "script", [None, 5, "finetune.py"]),
    ("classifier", "run.json", "preprocess", [None, 5, "farasa"]),
    ("classifier", "run.json", "max_length", [None, -5, 0, "64", []]),
    ("classifier", "config.json", "hidden_act", ["relu", None, 5]),
]


@pytest.mark.parametrize("kind, name, key, values", WRONG_VALUES, ids=[f"{v[1]} {v[2]}" for v in WRONG_VALUES])
def test_values_that_mean_nothing(sources, tmp_path, kind, name, key, values):
    source, _, read = sources[kind]
    copy = shutil.copytree(source, tmp_path / "copy")
    content = json.loads((copy / name).read_text())
    for value in values:
        (copy / name).write_text(json.dumps(content | {key: value}))
        with pytest.raises(InputError) as error:
            read(copy)
        assert "\n" not in str(error.value), value


def test_answers(sources, tmp_path):
    source, _, read = sources["answers"]
    path = shutil.copytree(source, tmp_path / "copy") / "a.jsonl"
    head, *rows = map(json.loads, path.read_text().splitlines())
    wrong = [[], [5], [head], [head, *rows, 5], [{"name": 5}, *rows], [head | {"protocol": 5}, *rows],
             [head | {"protocol": {}}, *rows], [head | {"run": [1]}, *rows],
             [head | {"run": {"arguments": [1]}}, *rows], [head | {"run": {"coefficients": 5}}, *rows], [head | {"new": 1}, *rows], rows]
    for key, values in {"row": [None, "x", []], "complaint": [None, 5], "severity": [7, "critical"], "answer": [None],
                        "probabilities": [5, [1, 0], ["a", 0, 1]], "nll": [None, "x"], "tokens": [0, "x", None]}.items():
        wrong += [[head, rows[0], rows[1] | {key: value}] for value in values]
    for lines in wrong:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(InputError) as error:
            read(path.parent)
        assert "a.jsonl" in str(error.value) and "\n" not in str(error.value), lines


# ------------------------------------------------------------------ sizes

def xlsx(path, **changes):
    """A workbook with other XML in some of its files; names have _ for / and no ending."""
    fuzz.write_workbook(path, [("Question", "Answer"), ("أ", "ب")])
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            change = changes.get(name.removesuffix(".xml").replace("/", "_"))
            archive.writestr(name, change(content) if change else content)


HOSTILE = {  # file -> its content, or a function that writes it
    "digits.jsonl": lambda: json.dumps({"question": "9" * 200_000, "answer": "نم"}),
    "entity.jsonl": lambda: json.dumps({"question": "&#" + "9" * 200_000, "answer": "نم"}),
    "tags.jsonl": lambda: json.dumps({"question": "س" + "<" * 200_000, "answer": "نم"}),
    "marks.jsonl": lambda: json.dumps({"question": "س" + "\u0301\u0323" * 500_000, "answer": "نم"}),
    "word.jsonl": lambda: json.dumps({"question": "a" * 1_000_000, "answer": "نم"}),
    "host.jsonl": lambda: json.dumps({"question": "a.b-" * 50_000, "answer": "@" * 200_000 + "a"}),
    "quotes.jsonl": lambda: json.dumps({"question": "س" + '" ' * 100_000, "answer": "' " * 100_000 + "a"}),
    "deep.jsonl": lambda: '{"question": ' + "[" * 200_000,
    "columns.csv": lambda: ",".join(f"c{i}" for i in range(100_000)) + "\n" + "1," * 100_000,
    "same.csv": lambda: "question," * 900 + "\n",
    "nul.csv": lambda: "\0" * 1_000_000,
    "quote.csv": lambda: 'question,answer\n"' + "a" * 2_000_000,
    "lines.csv": lambda: "\n" * 2_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tables(tmp_path, refused, memory, name):
    """As a table to train on: too few complaints, if it can be read at all."""
    (tmp_path / name).write_text(HOSTILE[name](), encoding="utf-8")
    refused("finetune", "--data", tmp_path / name, "--out", tmp_path / "run", "--weighting", "none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [
    {"xl_sheet": lambda xml: xml.replace(b'r="B2"', b'r="XFD1048576"')},
    {"xl_sheet": lambda xml: xml.replace(b'row r="2"', b'row r="999999999"').replace(b'r="B2"', b'r="B999999999"')},
    {"xl_sheet": lambda xml: xml + b" " * 200_000_000}, {"xl_workbook": lambda xml: xml[:100]},
    {"xl_sheet": lambda xml: b""}, {"xl_workbook": lambda xml: xml.replace(b"<sheet ", b'<sheet state="hidden" ')},
    {"xl_sheet": lambda xml: xml.replace(b"<v>", b"<v>&a;")}, {"xl_workbook": lambda xml: b"<a>" * 100_000},
], ids=["far cell", "far row", "bomb", "half", "no sheet", "hidden", "entity", "deep"])
def test_hostile_workbooks(tmp_path, refused, memory, changes):
    xlsx(tmp_path / "t.xlsx", **changes)
    refused("finetune", "--data", tmp_path / "t.xlsx", "--out", tmp_path / "run", "--weighting", "none")


# ------------------------------------------------------------------ the command line

@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:60]))
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    return folder


NUMBERS = {
    "finetune": ("--epochs", "--lr", "--warmup", "--weight-decay", "--clip", "--lora-dropout", "--lora-alpha"),
    "train_classifier": ("--lr", "--weight-decay", "--label-smoothing"),
    "evaluate": ("--temperature", "--top-p")}
WHOLE_NUMBERS = {
    "finetune": ("--max-length", "--train-rows", "--max-steps", "--batch-size", "--seed", "--micro-tokens",
                 "--save-every"),
    "train_classifier": ("--max-length", "--epochs", "--patience", "--batch-size", "--seed", "--folds"),
    "evaluate": ("--rows", "--max-new-tokens", "--max-length", "--seed", "--answers", "--bertscore-layer")}
OTHERS = [
    ("finetune", "--weighting 1e39,1,1"), ("finetune", "--weighting nan,1,1"), ("finetune", "--weighting 0,0,0"),
    ("finetune", "--weighting 1,1"), ("finetune", "--weighting ,,"), ("finetune", "--warmup 2"),
    ("finetune", "--data {0}/nowhere.csv"), ("finetune", "--data {0}"), ("finetune", "--data {0}/file"),
    ("finetune", "--validation {0}/nowhere.csv"), ("finetune", "--validation {0}"),
    ("finetune", "--ckpt {0}/nowhere"), ("finetune", "--ckpt {0}/empty"), ("finetune", "--ckpt {0}/file"),
    ("finetune", "--ckpt empty/typo"), ("finetune", "--ckpt gpt7"), ("finetune", "--ckpt ../x"),
    ("finetune", "--out {0}/file"), ("finetune", "--out {0}/file/run"), ("finetune", "--out {0}"),
    ("finetune", "--resume"), ("finetune", "--device tpu"),
    ("finetune", "--device cuda:99"), ("finetune", "--columns x"), ("finetune", "--columns x=y"),
    ("finetune", "--columns complaint=nowhere"), ("finetune", "--columns complaint=Answer response=Answer"),
    ("finetune", "--lora 4"), ("finetune", "--merge"), ("finetune", "--classifier {0}"),
    ("finetune", "--classifier {0}/nowhere"), ("finetune", "--recipe paper"),
    ("train_classifier", "--annotate {0}/t.jsonl"), ("train_classifier", "--to {0}/x.csv"),
    ("train_classifier", "--annotate {0}/nowhere.csv --to {0}/x.csv"), ("train_classifier", "--folds 1"),
    ("train_classifier", "--annotate {0}/t.jsonl --to {0}/x.xlsx"), ("train_classifier", "--ckpt {0}/empty"),
    ("train_classifier", "--annotate {0}/t.jsonl --to {0}/t.jsonl"), ("train_classifier", "--data {0}/empty"),
    ("train_classifier", "--folds 60 --data {0}/t.jsonl"), ("train_classifier", "--out {0}/file"),
    ("evaluate", "{0}/nowhere"), ("evaluate", "{0}/empty"), ("evaluate", "{0}/file"), ("evaluate", "{0}/t.jsonl"),
    ("evaluate", "{0} {0}"), ("evaluate", "empty/typo"),
]
WRONG_ARGUMENTS = [(script, f"{option}={value}") for script in NUMBERS for option in NUMBERS[script]
                   for value in ("-1", "nan", "inf")]
WRONG_ARGUMENTS += [(script, f"{option}={value}") for script in WHOLE_NUMBERS for option in WHOLE_NUMBERS[script]
                    for value in ("-1", 10 ** 30)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_arguments(folder, refused, script, monkeypatch):
    monkeypatch.chdir(folder)
    before = {path for path in folder.rglob("*") if path.is_file()}
    for _, argument in [case for case in WRONG_ARGUMENTS if case[0] == script]:
        refused(script, argument)
    for _, line in [case for case in OTHERS if case[0] == script]:
        refused(script, *line.format(folder).split())
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_there_are_enough():
    cases = [len(WRONG_JSON) * len(JSON_FILES), sum(len(values) for *_, values in WRONG_VALUES), len(HOSTILE),
             len(WRONG_ARGUMENTS) + len(OTHERS)]
    assert sum(cases) > 350, cases


# ------------------------------------------------------------------ chance

def test_random_damage(tmp_path, memory):
    """A short run of benchmarks/fuzz.py."""
    outcomes = fuzz.fuzz(150, seed=5, folder=tmp_path)
    assert set(outcomes) == {"read", "refused"} and outcomes["refused"] > 50, outcomes


def test_damage_does_something():
    chance = random.Random(0)
    content = {"a": [1, {"b": None}], "c": "x"}
    assert len({json.dumps(fuzz.damage_json(content, chance)) for _ in range(200)}) > 50
    assert content == {"a": [1, {"b": None}], "c": "x"}
    assert len({fuzz.damage_bytes(b"abcdefgh" * 9, chance) for _ in range(100)}) > 50
