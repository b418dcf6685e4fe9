"""From a large table to the first optimizer step: finetune.py against `datasets` and a fast tokenizer of `transformers` in two processes.

    pip install datasets==5.2.0 transformers==5.23.0 pandas openpyxl
    python benchmarks/start.py [--data TABLE] [--rows 341218] [--repeat 3]

A workbook of --rows rows is made first, of the complaints and responses of --data: drawn again and again, a word in thirty misspelt, so
that new words keep coming as they do in real text. Processes are timed from their start, imports included, to the end of their first
optimizer step, with a model so small that only reading and encoding count. Both encode prompt and response of four fifths of the rows.
finetune.py also splits the rows by complaint, checks them, counts what is cut and saves the ids. The ids of the first rows must agree.
"again" is finetune.py once more, which finds the encoded table in runs/cache. Peak memory is the sum over a side's processes.
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
from turns import machine, need, print_row, ratio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sevloss import data  # noqa: E402
from sevloss.inputs import tables  # noqa: E402
from sevloss.models import from_scratch, save_model  # noqa: E402
from sevloss.models.tiny import tiny_gpt2  # noqa: E402

COMPARED = 1000  # rows whose ids are compared
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
import json, sys, pandas, torch
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
rows = rows.map(encode, batched=True, num_proc=2, remove_columns=["Question", "Answer"], load_from_cache_file=False)
model = AutoModelForCausalLM.from_pretrained(folder)
optimizer = torch.optim.AdamW(model.parameters())
pad = lambda name, fill: torch.nn.utils.rnn.pad_sequence([torch.tensor(r[name]) for r in rows.select(range(16))], True, fill)
model(input_ids=pad("input_ids", eos), labels=pad("labels", -100)).loss.backward()
optimizer.step()
json.dump(rows[:int(compared)]["input_ids"], open("peer.json", "w"))
"""


def write_table(pairs, rows, path):
    """`rows` rows drawn from the pairs, a word in thirty with another end."""
    from openpyxl import Workbook
    chance, letters = random.Random(0), "ابتثجحخدذرزسشصضطظعغفقكلمنهوي"

    def misspelt(text):
        return " ".join(word if chance.random() > 1 / 30 or len(word) < 2 else
                        word[:chance.randrange(1, len(word))] + "".join(chance.choices(letters, k=3)) for word in text.split(" "))
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["Question", "Answer"])
    for _ in range(rows):
        sheet.append([misspelt(chance.choice(pairs).complaint), misspelt(chance.choice(pairs).response)])
    book.save(path)


def tree(pid):
    """The process and its children, theirs included."""
    children = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    return [pid, *(p for child in children for p in tree(child))]


def timed(command, folder):
    """(seconds, peak resident bytes of the process and its children together)"""
    began, peak = time.perf_counter(), 0
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, stdout=output, stderr=output)
        while process.poll() is None:
            resident = 0
            for pid in tree(process.pid):
                try:
                    resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
                except (OSError, IndexError):
                    continue  # it has just ended
            peak = max(peak, resident)
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n" + (folder / "output.txt").read_text()[-2000:])
    return time.perf_counter() - began, peak


def check_ids(pairs, folder):
    """Exits unless both sides encoded the first rows to the same ids; finetune.py has those of its training split alone."""
    theirs = json.loads((folder / "peer.json").read_text())
    (cache,) = (folder / "runs" / "cache").glob("*.npz")
    with np.load(cache) as arrays:
        ids, starts = arrays["ids"], arrays["starts"]
    train = [i for i, pair in enumerate(pairs) if data.split_of(pair.complaint) == "train"]
    for number, i in enumerate(train):
        if ids[starts[number]:starts[number + 1]].tolist() != theirs[i]:
            sys.exit(f"the ids of row {pairs[i].row} differ")
    print(f"the ids of {len(train)} rows are the same on both sides")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--rows", type=int, default=341_218)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    need("datasets", "transformers", "pandas", "openpyxl")
    pairs = tables.read_pairs(args.data, needed=("complaint", "response"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_table(pairs, args.rows, folder / "table.xlsx")
        write_table(pairs, 20_000, folder / "words.xlsx")
        words = tables.read_pairs(folder / "words.xlsx", needed=("complaint", "response"))
        _, tokenizer = tiny_gpt2([t for p in words for t in (p.complaint, p.response)], vocab_size=64_000)
        save_model(from_scratch(dict(model_type="gpt2", vocab_size=tokenizer.get_vocab_size(), n_positions=1024, n_embd=32, n_layer=1,
                                     n_head=2, eos_token_id=tokenizer.token_to_id("<|endoftext|>"))), tokenizer, folder / "model")
        (folder / "peer.py").write_text(PEER, encoding="utf-8")
        (folder / "ours.py").write_text(OURS, encoding="utf-8")
        ours = ["ours.py", *"--ckpt model --weighting none --max-steps 1 --dtype fp32 --data table.xlsx --out".split()]
        results = {"sevloss": [], "datasets + transformers": [], "sevloss, again": []}
        for turn in range(args.repeat):
            shutil.rmtree(folder / "runs", ignore_errors=True)
            results["sevloss"].append(timed([*ours, f"first-{turn}"], folder))
            results["datasets + transformers"].append(timed(["peer.py", "table.xlsx", "model", COMPARED], folder))
            results["sevloss, again"].append(timed([*ours, f"second-{turn}"], folder))
        first = tables.iterate_pairs(folder / "table.xlsx", needed=("complaint", "response"), skipped=tables.Skipped())
        check_ids([pair for pair, _ in zip(first, range(COMPARED))], folder)
    print(f"{args.rows:,} rows, vocabulary {tokenizer.get_vocab_size():,}, {machine()}")
    seconds = {name: [s for s, _ in values] for name, values in results.items()}
    peaks = {name: max(peak for _, peak in values) / 2 ** 30 for name, values in results.items()}
    for name in results:
        print(f"{name:24} {min(seconds[name]):6.1f} to {max(seconds[name]):.1f} s, peak {peaks[name]:.2f} GiB")
    print_row(f"{args.rows:,} rows of `.xlsx` to the first step", "`datasets` + `transformers`, 2 processes",
              f"{ratio(seconds['datasets + transformers'], seconds['sevloss'])} times as fast, {peaks['sevloss']:.1f} against "
              f"{peaks['datasets + transformers']:.1f} GiB; {max(seconds['sevloss, again']):.1f} s the second time")


if __name__ == "__main__":
    main()
