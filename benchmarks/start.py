"""From a large table to the first optimizer step: finetune.py against `datasets` and `transformers`, 2
processes.

    python benchmarks/start.py [--data TABLE] [--rows 341218] [--repeat 3]

A workbook of --rows rows is made first, of the complaints and responses of --data: drawn again and again, a
word in thirty misspelt, so that new words keep coming as they do in real text. Processes are timed from
their start, imports included, to the end of their first optimizer step, with a model so small that only
reading and encoding count. Both encode prompt and response of four fifths of the rows. finetune.py also
splits the rows by complaint, checks them, counts what is cut and saves the ids. The ids of the first rows
must agree. "again" is finetune.py once more, which finds the encoded table in runs/encoded. Peak memory is
the sum over a side's processes.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from turns import ROOT, machine, need, print_row, ratio

from sevloss import data
from sevloss.inputs import tables
from sevloss.models import from_scratch, save_model
from sevloss.models.tiny import tiny_gpt2

COMPARED = 1000  # rows whose ids are compared
FINETUNE = "--ckpt model --weighting none --max-steps 1 --dtype fp32 --data table.xlsx --out".split()
OURS = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import finetune
step = torch.optim.AdamW.step
def first_step(optimizer):
    step(optimizer)
    os._exit(0)  # without validating and saving
torch.optim.AdamW.step = first_step
finetune.main()
"""
PEER = """
import json, os, sys, pandas, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
table, folder, compared = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
def encode(rows):
    prompts = tokenizer([f"\\n{c}\\n\\nالاجابة:\\n" for c in rows["Question"]])["input_ids"]
    answers = tokenizer(rows["Answer"])["input_ids"]
    return {"input_ids": [(p + a + [eos])[:512] for p, a in zip(prompts, answers)],
            "labels": [([-100] * len(p) + a + [eos])[:512] for p, a in zip(prompts, answers)]}
frame = pandas.read_excel(table, engine="calamine").dropna().astype(str)
rows = Dataset.from_pandas(frame.iloc[:len(frame) * 4 // 5], preserve_index=False)
rows = rows.map(encode, batched=True, num_proc=2, remove_columns=["Question", "Answer"],
                load_from_cache_file=False)
model = AutoModelForCausalLM.from_pretrained(folder)
optimizer = torch.optim.AdamW(model.parameters())
def padded(name, value):
    batch = [torch.tensor(row[name]) for row in rows.select(range(16))]
    return torch.nn.utils.rnn.pad_sequence(batch, True, value)
model(input_ids=padded("input_ids", eos), labels=padded("labels", -100)).loss.backward()
optimizer.step()
with open("peer.json", "w") as file:
    json.dump(rows[:int(compared)]["input_ids"], file)
os._exit(0)
"""


def misspelt(text, chance):
    """A word in thirty with another end."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 1 and chance.random() < 1 / 30:
            end = chance.choices("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", k=3)
            words[i] = word[:chance.randrange(1, len(word))] + "".join(end)
    return " ".join(words)


def write_table(pairs, rows, path):
    from openpyxl import Workbook
    chance = random.Random(0)
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["Question", "Answer"])
    for _ in range(rows):
        complaint, response = chance.choice(pairs).complaint, chance.choice(pairs).response
        sheet.append([misspelt(complaint, chance), misspelt(response, chance)])
    book.save(path)


def make_model(table, vocabulary, folder):
    """A model so small that it does not count, with a tokenizer of the table's own words."""
    pairs = tables.read_pairs(table, needed=("complaint", "response"))[:20_000]
    texts = [pair.complaint for pair in pairs] + [pair.response for pair in pairs]
    _, tokenizer = tiny_gpt2(texts, vocab_size=vocabulary)
    model = from_scratch(dict(
        model_type="gpt2", vocab_size=tokenizer.get_vocab_size(), n_positions=1024, n_embd=32, n_layer=1,
        n_head=2, eos_token_id=tokenizer.token_to_id("<|endoftext|>")))
    save_model(model, tokenizer, folder / "model")


def descendants(pid):
    """The process and its children, theirs included."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += descendants(int(child))
    return found


def resident_bytes(pid):
    """A page that several processes share counts as its share in each (PSS)."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    except (OSError, IndexError):  # it has just ended
        return 0


def measure(folder, *command):
    """-> seconds, peak resident bytes of the process and its children together"""
    began = time.perf_counter()
    peak = 0
    with open(folder / "output.txt", "w") as output:
        command = [sys.executable, *map(str, command)]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        while process.poll() is None:
            peak = max(peak, sum(map(resident_bytes, descendants(process.pid))))
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{command[1]} failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    return time.perf_counter() - began, peak


def check_ids(folder):
    """Exits unless both sides encoded the first rows alike. finetune.py has those of its training split."""
    pairs = tables.read_pairs(folder / "table.xlsx", needed=("complaint", "response"))[:COMPARED]
    theirs = json.loads((folder / "peer.json").read_text())
    (encoded,) = (folder / "runs" / "encoded").iterdir()
    lengths = np.fromfile(encoded / "train" / "lengths.bin", np.int32, COMPARED)
    ids = np.fromfile(encoded / "train" / "ids.bin", np.int32, lengths.sum())
    ours = np.split(ids, np.cumsum(lengths)[:-1])
    train = [i for i, pair in enumerate(pairs[:len(theirs)]) if data.split_of(pair.complaint) == "train"]
    for i, row in zip(train, ours):
        if row.tolist() != theirs[i]:
            sys.exit(f"the ids of row {pairs[i].row} differ")
    print(f"the ids of {len(train)} rows are the same on both sides")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--rows", type=int, default=341_218)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    args = parser.parse_args()
    need("datasets", "transformers", "pandas", "openpyxl")
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"))
    ours, theirs, again = "sevloss", "datasets + transformers", "sevloss, again"
    results = {ours: [], theirs: [], again: []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_table(pairs, args.rows, folder / "table.xlsx")
        make_model(folder / "table.xlsx", args.vocabulary, folder)
        (folder / "ours.py").write_text(OURS, encoding="utf-8")
        (folder / "peer.py").write_text(PEER, encoding="utf-8")
        for turn in range(args.repeat):
            shutil.rmtree(folder / "runs", ignore_errors=True)
            results[ours].append(measure(folder, "ours.py", *FINETUNE, f"first-{turn}"))
            results[theirs].append(measure(folder, "peer.py", "table.xlsx", "model", COMPARED))
            results[again].append(measure(folder, "ours.py", *FINETUNE, f"second-{turn}"))
        check_ids(folder)

    print(f"{args.rows:,} rows, vocabulary {args.vocabulary:,}, {machine()}")
    seconds = {side: [s for s, _ in values] for side, values in results.items()}
    peaks = {side: max(peak for _, peak in values) / 2 ** 30 for side, values in results.items()}
    for side in results:
        least, most = min(seconds[side]), max(seconds[side])
        print(f"{side:24} {least:6.1f} to {most:.1f} s, peak {peaks[side]:.2f} GiB")
    print_row(f"{args.rows:,} rows of `.xlsx` to the first step", "`datasets` + `transformers`, 2 processes",
              f"{ratio(seconds[theirs], seconds[ours])} times as fast, {peaks[ours]:.1f} against "
              f"{peaks[theirs]:.1f} GiB; {max(seconds[again]):.1f} s the second time")


if __name__ == "__main__":
    main()
