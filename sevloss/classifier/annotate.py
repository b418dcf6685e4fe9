"""The trained classifier at work: severity probabilities for complaints, and for whole tables."""

import csv
import io
import json
import os
import shlex
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from sevloss import InputError, checkpoint, data, device, distributed, flush_to_disk, interpreting, lock, stop
from sevloss.inputs import hub, tables
from sevloss.models import load_model, load_tokenizer
from sevloss.severity import CLASSES

# Of the paper's table, and whether the severity is a label or the classifier's
FIELDS = ("Question", "Answer", "Severity", "Non-Critical", "Neutral", "Critical", "Severity Source")
PLAIN_FIELDS = {tables.plain(name) for name in FIELDS}
CHUNK = 8192  # rows in memory at a time


@torch.no_grad()  # not inference_mode: autocast would cast the weights anew for each batch
def class_logits(model, id_lists, compute, *, max_tokens=8192, progress=None):
    """id_lists (n lists of token ids) -> (n, 3) fp32 logits on the CPU, in the same order. At most max_tokens
    go through the model at once, sorted by length. progress: a tqdm that counts texts."""
    model.eval()
    lengths = [len(ids) for ids in id_lists]
    logits = torch.zeros(len(id_lists), 3, device=compute.device)
    with compute.autocast():
        for batch in distributed.micro_batches(lengths, range(len(id_lists)), max_tokens):
            if not batch:  # of another rank alone
                continue
            rows = device.to_device(torch.tensor(batch), compute.device)
            logits[rows] = model.classify(*data.pack([id_lists[i] for i in batch], compute.device)).float()
            if progress is not None:
                progress.update(len(batch))
    return distributed.add_up(logits.cpu())  # the only wait for the device


def read_run(run):
    """(run.json, classifier.json). InputError where the folder holds no finished run of train_classifier.py,
    or one of another version."""
    run_json = checkpoint.read_run_json(run)
    if run_json.get("script") != "train_classifier.py":
        raise InputError(f"{run} is no run of train_classifier.py: name one, or train one first")
    if not (Path(run) / "classifier.json").is_file():
        raise InputError(f"{run} was stopped before it was finished: train it again")
    result = hub.read_json(Path(run) / "classifier.json")
    data.check_split_rule(result.get("split_rule"), run)
    return run_json, result


class Classifier:
    """A run of train_classifier.py, ready to give probabilities. InputError where the folder holds no
    finished run of this version."""

    def __init__(self, run, compute):
        self.run = Path(run)
        self.compute = compute
        run_json, result = read_run(run)
        self.model = load_model(run, device=compute.device)
        self.tokenizer = load_tokenizer(run)
        with interpreting(f"run.json or classifier.json of {run}", "train it again"):
            self.temperature = result["temperature"]
            self.preprocess = run_json["preprocess"]
            self.max_length = min(run_json["max_length"], self.model.config.context)
            # complaint_id -> probabilities from a model that was not trained on it
            self.out_of_fold = {name: torch.tensor(row) for name, row in result["out_of_fold"].items()}
            self.too_sure = set(result["trained_on"]) - self.out_of_fold.keys()  # complaint_ids
            if not (0 < self.temperature < 1e6 and self.max_length >= 8
                    and self.preprocess in ("arabert", "none") and self.model.config.num_labels == 3
                    and all(row.shape == (3,) and row.min() >= 0 for row in self.out_of_fold.values())):
                raise ValueError("temperature, max_length, preprocess, probabilities or classes out of range")

    def probabilities(self, complaints, progress=None):
        """(n, 3) calibrated probabilities of (non-critical, neutral, critical), those out of fold where the
        run has them for a complaint; how many complaints were cut."""
        ids, cut = data.encode_and_cut(self.tokenizer, complaints, self.max_length, self.preprocess)
        logits = class_logits(self.model, ids, self.compute, progress=progress)
        probabilities = (logits / self.temperature).softmax(-1)
        for i, complaint in enumerate(complaints):
            name = data.complaint_id(complaint)
            if name in self.out_of_fold:
                probabilities[i] = self.out_of_fold[name]
        return probabilities, cut


def check_target(to):
    """InputError where no annotated table can be written."""
    if Path(to).suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise InputError(f"--to {to}: an annotated table is written as .jsonl, .csv or .tsv")
    if Path(to).exists():
        raise InputError(f"--to {to} exists: remove it or give another name")


def annotate_table(classifier, table, to, columns, needed=("complaint",)):
    """Writes the table with FIELDS, then its other columns, to a .jsonl, .csv or .tsv file.

    Severity is the likeliest class; a label that the row came with stays, and Severity Source says which.
    Rows stay in their order; those that lack what is `needed` are left out. Until it is complete the file is
    called `to`.partial; the same call goes on after its last chunk, so memory and what a stop can lose are
    bounded by CHUNK rows.
    """
    to = Path(to)
    with lock(f"{to}.lock"):
        check_target(to)
        total = sum(1 for _ in tables.read_rows(table, needed, columns)[2])

        # How far a call before this one came
        partial = Path(f"{to}.partial")
        journal = Path(f"{to}.partial.json")
        inputs = {"table": data.file_fingerprint(table), "columns": columns,
                  "classifier": data.file_fingerprint(classifier.run / "classifier.json"),
                  "needed": [*needed], "dtype": classifier.compute.dtype_name}
        done = Counter()  # rows, bytes, and how many complaints were cut, seen in training, labelled
        before = hub.read_json(journal) if journal.exists() and partial.exists() else {}
        if before.get("inputs") == inputs:
            with interpreting(journal, f"remove {partial}"):
                done.update({name: int(count) for name, count in before["done"].items()})
            print(f"{to}: going on after row {done['rows']:,}")
        done = distributed.gather(done)[0]

        # The next rows; a table that cannot be used is refused before anything is written
        pairs = islice(tables.usable_pairs(table, needed=needed, columns=columns), done["rows"], None)
        chunk = list(islice(pairs, CHUNK))

        checkpoint.append(partial, "")
        if distributed.rank() == 0:
            os.truncate(partial, done["bytes"])
        words = ["--ckpt", classifier.run, "--annotate", table, "--to", to, "--dtype", inputs["dtype"]]
        if columns:
            words += ["--columns", *(f"{role}={name}" for role, name in columns.items())]
        again = f"train_classifier.py {shlex.join(map(str, words))} goes on"
        stop.waits = True  # a signal is looked at between chunks
        with tqdm(total=total, initial=done["rows"], unit="row", desc="severity", mininterval=1) as bar:
            while chunk:
                complaints = [pair.complaint for pair in chunk]
                probabilities, cut = classifier.probabilities(complaints, bar)
                text = io.StringIO(newline="")
                write_rows(text, to.suffix.lower(), chunk, probabilities, header=not done["rows"])
                checkpoint.append(partial, text.getvalue(), to_disk=True)
                done.update(rows=len(chunk), bytes=len(text.getvalue().encode()), cut=cut,
                            seen=sum(data.complaint_id(c) in classifier.too_sure for c in complaints),
                            labelled=sum(pair.severity is not None for pair in chunk))
                checkpoint.write_json(journal, {"inputs": inputs, "done": done})
                stop.leave_if(max(distributed.gather(stop.signal)),
                              f"{done['rows']:,} rows are kept: {again}")
                chunk = list(islice(pairs, CHUNK))
        stop.waits = False
        if distributed.rank() == 0:
            journal.unlink()
            os.replace(partial, to)
            flush_to_disk(to.parent)
        distributed.wait_for_all()

    print(f"wrote {to}: {done['rows']:,} rows, {done['cut']:,} complaints cut to "
          f"{classifier.max_length} tokens")
    if done["labelled"]:
        print(f"  {done['labelled']:,} rows came with a label, which stays")
    if done["seen"]:
        print(f"  the classifier was trained on {done['seen']:,} of these complaints, "
              "so it is too sure of them: train it with --folds 5")


def annotated(classifier_run, table, columns, compute):
    """Path of the annotated table, made on the first call and kept in the classifier's run folder."""
    classifier = Classifier(classifier_run, compute)
    name = f"{Path(table).stem}-{data.digest(data.file_fingerprint(table), columns)}.jsonl"
    to = Path(classifier_run) / "annotated" / name
    if to.exists():
        print(f"severity of {table} is known: {to}")
    else:
        annotate_table(classifier, table, to, columns, needed=("complaint", "response"))
    return to


def write_rows(file, ending, pairs, probabilities, *, header):
    """Appends rows to a .jsonl, .csv or .tsv file. probabilities (n, 3); header: write the names first."""
    rows = []
    for pair, row in zip(pairs, probabilities.tolist()):
        label = row.index(max(row)) if pair.severity is None else pair.severity
        source = "classifier" if pair.severity is None else "label"
        values = (pair.complaint, pair.response, CLASSES[label], *(round(p, 6) for p in row), source)
        fields = dict(zip(FIELDS, values))
        for name, cell in pair.others.items():
            taken = tables.plain(name) in PLAIN_FIELDS  # in any spelling: readers know no other
            fields[f"{name} (of the table)" if taken else name] = cell
        rows.append(fields)
    if ending == ".jsonl":
        file.writelines(json.dumps(fields, ensure_ascii=False) + "\n" for fields in rows)
        return
    writer = csv.DictWriter(file, rows[0], delimiter="\t" if ending == ".tsv" else ",")
    if header:
        file.write("\ufeff")  # without it Excel shows Arabic as gibberish
        writer.writeheader()
    for fields in rows:
        writer.writerow({name: tables.quote_formula(cell) for name, cell in fields.items()})
