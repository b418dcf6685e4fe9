"""Random damage to every kind of file that is read: each must still be read, or refused in one line.

    python benchmarks/fuzz.py --cases 10000
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sevloss import InputError, data, device
from sevloss.classifier import annotate
from sevloss.evaluation import findings
from sevloss.inputs import arabic, tables
from sevloss.models import from_scratch, load_model, load_tokenizer, lora, save_model
from sevloss.models.tiny import tiny_bert, tiny_gpt2

TEXTS = ["عندي صداع منذ يومين", "اشرب الماء واسترح", "ألم شديد في الصدر", "راجع الطوارئ الآن"] * 3
VALUES = (None, True, False, 0, -1, 7, 0.5, 1e999, -1e308, float("nan"), 10 ** 30, 2 ** 63, "", "x",
          "ا" * 500, [], [1], [[]], {}, {"a": None}, "<" * 3000, "9" * 3000, "../x", "a\x00b", "\x1b[31m")
SECONDS = 10  # a case may take


# --- whole files, a folder for each kind --------------------------------------------------------------------

def make_sources(folder):
    """{kind: (folder, its files that are damaged, function that reads a copy of the folder)}"""
    torch.manual_seed(0)
    _, tokenizer = tiny_gpt2(TEXTS, vocab_size=300)
    size = tokenizer.get_vocab_size()
    gpt2 = from_scratch(dict(model_type="gpt2", vocab_size=size, n_positions=64, n_embd=8, n_layer=1,
                             n_head=2, eos_token_id=0))
    llama = from_scratch(dict(model_type="llama", vocab_size=size, hidden_size=8, intermediate_size=8,
                              num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                              rope_parameters={"rope_type": "default", "rope_theta": 100.0}, eos_token_id=0))
    for name, model in (("gpt2", gpt2), ("llama", llama)):
        save_model(model, tokenizer, folder / name)
        (folder / name / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    adapted = load_model(folder / "gpt2")
    lora.attach(adapted, 2, alpha=4.0)
    save_model(adapted, tokenizer, folder / "adapter")
    (folder / "old").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "gpt2" / name, folder / "old")
    tokenizer.model.save(str(folder / "old"))
    (folder / "old" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (folder / "old" / "added_tokens.json").write_text("{}")

    classifier, pieces = tiny_bert(TEXTS, num_labels=3, vocab_size=150)
    classifier.raw_config["id2label"] = {"0": "non-critical", "1": "neutral", "2": "critical"}
    save_model(classifier, pieces, folder / "classifier")
    write_json(folder / "classifier" / "run.json",
               {"script": "train_classifier.py", "preprocess": "arabert", "max_length": 64, "arguments": {}})
    write_json(folder / "classifier" / "classifier.json",
               {"temperature": 1.5, "split_rule": data.SPLIT_RULE, "trained_on": ["1"],
                "out_of_fold": {data.complaint_id(TEXTS[0]): [0.2, 0.3, 0.5]}})

    (folder / "answers").mkdir()
    protocol = {"table": "t.jsonl", "rows": 2, "fingerprint": "1", "max_new_tokens": 8}
    rows = [dict(row=i, complaint="أ", reference="ب", severity=1, probabilities=[0.2, 0.3, 0.5], specialty="",
                 answer="ج", finished=True, nll=3.0, tokens=2) for i in (1, 2)]
    lines = [{"name": "a", "protocol": protocol, "run": {}}, *rows]
    (folder / "answers" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    (folder / "tables").mkdir()
    header = ("Question", "Answer", "Severity", "Non-Critical", "Neutral", "Critical")
    cells = [header] + [(TEXTS[i], TEXTS[i + 1], "neutral", "0.2", "0.5", "0.3") for i in range(5)]
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        text = "\n".join(delimiter.join(row) for row in cells)
        (folder / "tables" / f"t.{ending}").write_text(text, encoding="utf-8")
    rows = [dict(zip(header, row)) for row in cells[1:]]
    (folder / "tables" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_json(folder / "tables" / "t.json", rows)
    write_workbook(folder / "tables" / "t.xlsx", cells)

    causal = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
              "tokenizer_config.json")
    return {
        "gpt2": (folder / "gpt2", causal, read_model), "llama": (folder / "llama", causal, read_model),
        "adapter": (folder / "adapter", ("adapter_config.json", "adapter_model.safetensors", "config.json"),
                    read_model),
        "old tokenizer": (folder / "old", ("vocab.json", "merges.txt", "tokenizer_config.json",
                                           "added_tokens.json"), read_model),
        "classifier": (folder / "classifier", ("run.json", "classifier.json", "config.json", "tokenizer.json",
                                               "model.safetensors"), read_classifier),
        "answers": (folder / "answers", ("a.jsonl",), lambda copy: findings.load_answers(copy / "a.jsonl")),
        "tables": (folder / "tables", ("t.csv", "t.tsv", "t.jsonl", "t.json", "t.xlsx"), read_tables)}


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def write_workbook(path, rows):
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    relation = ('<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
                '<Relationship Id="r" Type="{}" Target="{}"/></Relationships>')
    lines = ""
    for i, row in enumerate(rows, 1):
        cells = "".join(f'<c r="{chr(65 + j)}{i}" t="str"><v>{cell}</v></c>' for j, cell in enumerate(row))
        lines += f'<row r="{i}">{cells}</row>'
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("_rels/.rels", relation.format(f"{office}/officeDocument", "xl/workbook.xml"))
        file.writestr("xl/_rels/workbook.xml.rels", relation.format(f"{office}/worksheet", "sheet.xml"))
        file.writestr("xl/workbook.xml", f'<workbook {main} xmlns:r="{office}"><sheets>'
                                         '<sheet name="a" sheetId="1" r:id="r"/></sheets></workbook>')
        file.writestr("xl/sheet.xml", f"<worksheet {main}><sheetData>{lines}</sheetData></worksheet>")


# --- what reads them ----------------------------------------------------------------------------------------

def read_model(folder):
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    preprocess = data.choose_preprocess("auto", folder, model.raw_config)
    prompts, _ = data.encode_prompts(tokenizer, [data.prepare(TEXTS[0], preprocess)], 60)
    with torch.no_grad():
        model(torch.tensor(prompts[0]), [len(prompts[0])])


def read_classifier(folder):
    compute = device.choose("cpu", "fp32", small=True)
    annotate.Classifier(folder, compute).probabilities(TEXTS)


def read_tables(folder):
    """Each on its own, in an order that does not matter: one is damaged."""
    for path in sorted(folder.iterdir()):
        for pair in tables.read_pairs(path, needed=("complaint", "response"), probabilities="required"):
            data.complaint_id(pair.complaint)
            arabic.unpreprocess(arabic.preprocess(pair.response))


# --- damage -------------------------------------------------------------------------------------------------

def damage(path, chance):
    """Changes a file: a value of its JSON or, of any file, bytes. chance: a random.Random."""
    content = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.8:
        path.write_text(json.dumps(damage_json(json.loads(content), chance)))
    elif path.suffix == ".jsonl" and chance.random() < 0.8:
        lines = content.splitlines()
        i = chance.randrange(len(lines))
        lines[i] = json.dumps(damage_json(json.loads(lines[i]), chance)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix == ".xlsx" and chance.random() < 0.8:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = chance.choice(sorted(entries))
        entries[name] = damage_bytes(entries[name], chance)
        with zipfile.ZipFile(path, "w") as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)
    else:
        path.write_bytes(damage_bytes(content, chance))


def damage_json(value, chance):
    """A copy in which one value, at any depth, is another or is missing."""
    if not value or not isinstance(value, (dict, list)) or chance.random() < 0.15:
        return chance.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = chance.choice(keys)
    value = value.copy()
    if chance.random() < 0.1:
        del value[key]
    else:
        value[key] = damage_json(value[key], chance)
    return value


def damage_bytes(content, chance):
    place = chance.randrange(len(content) + 1)
    end = place + chance.choice((1, 8, 200))
    kind = chance.randrange(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[end:]
    if kind == 2:
        return content[:place] + content[place:end] * 50 + content[end:]
    if kind == 3:
        piece = chance.choice((b'"', b",", b";", b"\t", b"\r", b"\x00", b"\xff\xfe", b"[" * 5000, b"<" * 5000,
                               b"7" * 5000, "\u0301".encode() * 2000, b"\n" * 2000, b"&#9;"))
        return content[:place] + piece + content[place:]
    if kind == 4:
        return content[:place] + chance.randbytes(end - place) + content[end:]
    return content.replace(content[place:end], b"", 1000)


# --- the run ------------------------------------------------------------------------------------------------

def fuzz(cases, seed, folder):
    """Counter of outcomes: read, refused, and what should not be: other exceptions, and no answer in time."""
    sources = make_sources(Path(folder))
    outcomes = Counter()
    copy = Path(folder) / "copy"

    def too_late(number, frame):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, too_late)
    for case in range(cases):
        chance = random.Random(f"{seed} {case}")
        kind = chance.choice(sorted(sources))
        source, names, read = sources[kind]
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        name = chance.choice(names)
        damage(copy / name, chance)
        if kind == "tables":
            for path in copy.iterdir():
                if path.name != name:
                    path.unlink()
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read(copy)
            outcome = "read"
        except InputError as error:
            outcome = "refused" if "\n" not in str(error) else f"several lines: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = (f"{kind}, {name}: {type(error).__name__} in {os.path.basename(place.filename)}, line "
                       f"{place.lineno}: {str(error)[:100]} (first: case {case})")
            known = outcome.partition(" (first")[0]
            outcome = next((o for o in outcomes if o.startswith(known)), outcome)
        finally:
            signal.alarm(0)
        outcomes[outcome] += 1
    signal.signal(signal.SIGALRM, before)
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(args.cases, args.seed, folder)
    for outcome, count in outcomes.most_common():
        print(f"{count:7,} {outcome}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"{args.cases:,} cases in {time.perf_counter() - began:.0f} s, at most {memory:.2f} GB")


if __name__ == "__main__":
    main()
