"""What several test files share: where the golden checkpoints lie, and copies of them to change; small tables
and models."""

import csv
import json
import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from random import Random
from xml.sax.saxutils import escape

import pytest
import torch
from safetensors.torch import load_file, save_file

from sevloss import data
from sevloss.models.tiny import tiny_gpt2

GOLDEN = Path(__file__).with_name("golden")
torch.set_num_threads(1)  # models this small gain nothing from more, and on a busy machine threads wait for each other


def pytest_runtest_setup(item):
    """Skips a test marked @pytest.mark.peers("transformers", ...) where one of these packages is not
    installed."""
    packages = [package for marker in item.iter_markers("peers") for package in marker.args]
    if missing := [package for package in packages if not find_spec(package)]:
        pytest.skip(f"needs {', '.join(missing)}: pip install -r requirements-dev.txt")


@pytest.fixture
def golden():
    return GOLDEN


@pytest.fixture
def edited(tmp_path):
    """edited("gpt2", tensors={...}, n_layer=2) -> a copy of a golden checkpoint with another config.json and other tensors.

    tensors: a function from the stored tensors to those that take their place.
    """
    def edit(family, tensors=None, **config):
        folder = tmp_path / "checkpoint"
        shutil.copytree(GOLDEN / family, folder)
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())
                                                       | config))
        if tensors:
            save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        return folder
    return edit


# ------------------------------------------------------------------ scripts

def call(script, *arguments):
    """main() of a script in this process: importing torch anew takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()


def refusal(script, *arguments):
    """A script refuses: exit code 2, after one line."""
    with pytest.raises(SystemExit) as left:
        call(script, *arguments)
    assert left.value.code == 2


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------ tables

SYMPTOMS = {"non-critical": "زكام أرق حكة تعب جفاف كسل", "neutral": "صداع سعال دوخة غثيان إسهال حساسية",
            "critical": "نزيف إغماء شلل اختناق تشنج خفقان"}


@pytest.fixture(scope="session")
def rows():
    """120 rows of an annotated table, short, and easy to learn from; the severities are labels."""
    random = Random(0)
    rows = []
    for i in range(120):
        severity = list(SYMPTOMS)[i % 3]
        words = random.sample(SYMPTOMS[severity].split(), 3)
        answer = " ".join(f"علاج ال{word}." for word in words[:1 + i % 3])
        rows.append({"Question": f"عندي {' و'.join(words)} منذ {i} يوم، ما الحل؟", "Answer": answer,
                     "Severity": severity, "Severity Source": "label",
                     **{name.title(): 0.8 if name == severity else 0.1 for name in SYMPTOMS}})
    return rows


@pytest.fixture
def write_table(tmp_path):
    """write_table("name.csv", rows) -> path of a .jsonl, .csv, .tsv or .xlsx file in tmp_path; rows are dicts
    with the same keys."""
    def write(name, rows):
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                            encoding="utf-8")
        elif path.suffix == ".xlsx":
            write_xlsx(path, [list(rows[0]), *(row.values() for row in rows)])
        else:
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        return path
    return write


def write_xlsx(path, rows):
    """The least that is an Excel workbook; numbers are stored as such."""
    write_workbook(path, ("a", "visible", rows, ()))


def write_workbook(path, *sheets):
    """sheets: (name, visible or hidden, rows, merged ranges such as "A1:A3") each; None is a cell that is not
    there."""
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'

    def cell(value):
        if isinstance(value, float):
            return f"<c><v>{value}</v></c>"
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>' if value else "<c/>"

    def relations(kind, targets):
        each = "".join(f'<Relationship Id="r{i}" Type="{office}/{kind}" Target="{target}"/>'
                       for i, target in enumerate(targets))
        return ('<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
                f"{each}</Relationships>")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("[Content_Types].xml",
                      '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>')
        file.writestr("_rels/.rels", relations("officeDocument", ["xl/workbook.xml"]))
        file.writestr("xl/_rels/workbook.xml.rels",
                      relations("worksheet", [f"sheet{i}.xml" for i in range(len(sheets))]))
        listed = "".join(f'<sheet name="{name}" sheetId="{i + 1}" state="{state}" r:id="r{i}"/>'
                         for i, (name, state, _, _) in enumerate(sheets))
        file.writestr("xl/workbook.xml",
                      f'<workbook {main} xmlns:r="{office}"><sheets>{listed}</sheets></workbook>')
        for i, (_, _, rows, merged) in enumerate(sheets):
            lines = "".join(f'<row r="{n}">{"".join(map(cell, row))}</row>' for n, row in enumerate(rows, 1))
            ranges = "".join(f'<mergeCell ref="{cells}"/>' for cells in merged)
            ranges = f"<mergeCells>{ranges}</mergeCells>" if merged else ""
            file.writestr(f"xl/sheet{i}.xml",
                          f"<worksheet {main}><sheetData>{lines}</sheetData>{ranges}</worksheet>")


# ------------------------------------------------------------------ a small language model

@pytest.fixture(scope="session")
def tiny(rows):
    """(GPT-2, tokenizer). Its random weights are enlarged, so that it is sure of what it says and different
    texts get different answers."""
    torch.manual_seed(0)
    model, tokenizer = tiny_gpt2([data.PROMPT.format(complaint=row["Question"]) + row["Answer"]
                                  for row in rows], vocab_size=400)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 6
    return model, tokenizer
