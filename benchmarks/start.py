"""From a large table to the first optimizer step: finetune.py against `datasets` and a fast tokenizer of `transformers` in two processes.

    pip install datasets transformers pandas
    python benchmarks/start.py --data maqa.xlsx

Whole processes are timed, imports included, with a model so small that only reading and encoding count. Both encode prompt and response of
every row. finetune.py also splits the rows by complaint, checks them, counts what is cut, validates and saves. A third run is finetune.py
once more, which finds the encoded table in runs/cache. Peak memory is the sum over a side's processes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sevloss import data  # noqa: E402
from sevloss.models import from_scratch, save_model  # noqa: E402
from sevloss.models.tiny import tiny_gpt2  # noqa: E402

PEER = """
import sys, pandas, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
table, folder, complaint, response = sys.argv[1:]
read = {".xlsx": lambda p: pandas.read_excel(p, engine="calamine"), ".csv": pandas.read_csv}[table[table.rindex("."):]]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
def encode(rows):
    prompts = tokenizer([f"\\n{c}\\n\\nالاجابة:\\n" for c in rows[complaint]])["input_ids"]
    answers = tokenizer(rows[response])["input_ids"]
    return {"input_ids": [(p + a + [eos])[:512] for p, a in zip(prompts, answers)],
            "labels": [([-100] * len(p) + a + [eos])[:512] for p, a in zip(prompts, answers)]}
frame = read(table)[[complaint, response]].dropna().astype(str)
rows = Dataset.from_pandas(frame, preserve_index=False)
rows = rows.map(encode, batched=True, num_proc=2, remove_columns=[complaint, response], load_from_cache_file=False)
model = AutoModelForCausalLM.from_pretrained(folder)
optimizer = torch.optim.AdamW(model.parameters())
pad = lambda name, fill: torch.nn.utils.rnn.pad_sequence([torch.tensor(r[name]) for r in rows.select(range(16))], True, fill)
model(input_ids=pad("input_ids", eos), labels=pad("labels", -100)).loss.backward()
optimizer.step()
"""


def tree(pid):
    """The process and its children, theirs included."""
    children = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    return [pid, *(p for child in children for p in tree(child))]


def timed(command, folder):
    """(seconds, peak resident bytes of the process and its children together)"""
    began, peak = time.perf_counter(), 0
    with open(Path(folder) / "output.txt", "w") as output:
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
        sys.exit(f"{command[0]} failed:\n" + (Path(folder) / "output.txt").read_text()[-2000:])
    return time.perf_counter() - began, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=".xlsx or .csv")
    args = parser.parse_args()
    for package in ("datasets", "transformers", "pandas"):
        if not find_spec(package):
            sys.exit(f"this benchmark compares with the package {package}: pip install {package}")
    table = Path(args.data).resolve()
    columns = next(row for _, row in data.read_rows(table))
    names = data.find_columns(table, list(columns), {}, ("complaint", "response"))
    sample = data.read_pairs(data.SAMPLE, needed=("complaint", "response"))
    _, tokenizer = tiny_gpt2([t for p in sample for t in (p.complaint, p.response)], vocab_size=64_000)
    with tempfile.TemporaryDirectory() as folder:
        save_model(from_scratch(dict(model_type="gpt2", vocab_size=tokenizer.get_vocab_size(), n_positions=1024, n_embd=32, n_layer=1,
                                     n_head=2, eos_token_id=tokenizer.token_to_id("<|endoftext|>"))), tokenizer, Path(folder) / "model")
        (Path(folder) / "peer.py").write_text(PEER, encoding="utf-8")
        ours = [ROOT / "finetune.py", *"--ckpt model --weighting none --max-steps 1 --dtype fp32 --data".split(), table, "--out"]
        results = {"sevloss": timed([*ours, "first"], folder),
                   "datasets + transformers": timed(["peer.py", table, "model", names["complaint"], names["response"]], folder),
                   "sevloss, again": timed([*ours, "second"], folder)}
    for name, (seconds, peak) in results.items():
        print(f"{name:24} {seconds:6.1f} s, peak {peak / 2 ** 30:.2f} GiB")
    print(f"ratio of time {results['sevloss'][0] / results['datasets + transformers'][0]:.2f}")


if __name__ == "__main__":
    main()
