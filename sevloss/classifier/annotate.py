"""The trained classifier at work: severity probabilities for complaints, and for whole tables."""

import csv
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from sevloss import (
    InputError,
    checkpoint,
    data,
    distributed,
    flush_to_disk,
    interpreting,
    is_rank_0,
    lock,
    stop,
)
from sevloss.inputs import hub, tables
from sevloss.models import load_model, load_tokenizer
from sevloss.severity import CLASSES

# Of the paper's table, and whether the severity is a label or the classifier's
FIELDS = ("Question", "Answer", "Severity", "Non-Critical", "Neutral", "Critical", "Severity Source")
CHUNK = 8192  # rows in memory at a time


@torch.no_grad()  # not inference_mode: autocast would cast the weights anew for each batch
def class_logits(model, id_lists, compute, *, max_tokens=8192, progress=None):
    """id_lists (n lists of token ids) -> (n, 3) fp32 logits on the CPU, in the same order. At most max_tokens
    go through the model at once, sorted by length. progress: a tqdm that counts texts."""
    model.eval()
    order, parts = [], []
    with compute.autocast():
        lengths = [len(ids) for ids in id_lists]
        for batch in distributed.micro_batches(lengths, range(len(id_lists)), max_tokens):
            if not batch:  # of another rank alone
                continue
            tokens, lengths = data.pack([id_lists[i] for i in batch], compute.device)
            parts.append(model.classify(tokens, lengths).float())  # (B, 3)
            order += batch
            if progress is not None:
                progress.update(len(batch))
    logits = torch.zeros(len(id_lists), 3)
    if order:
        logits[order] = torch.cat(parts).cpu()  # the only wait for the device
    return distributed.add_up(logits)


def encode_complaints(tokenizer, complaints, *, preprocess, max_length):
    """(id lists with [CLS] and [SEP], how many were cut): what is too long loses its end, not its [SEP]."""
    return data.encode_and_cut(tokenizer, [data.prepare(c, preprocess) for c in complaints], max_length)


@dataclass
class Classifier:
    """A run of train_classifier.py, ready to give probabilities."""
    run: Path
    model: nn.Module
    tokenizer: Tokenizer
    temperature: float
    preprocess: str
    max_length: int
    out_of_fold: dict  # complaint_id -> probabilities from a model that was not trained on it
    trained_on: set  # complaint_ids that the model has seen

    @classmethod
    def load(cls, run, compute):
        """InputError where the folder holds no finished run of this version."""
        run = Path(run)
        run_json = hub.read_json(run / "run.json") if (run / "run.json").is_file() else {}
        if run_json.get("script") != "train_classifier.py":
            raise InputError(f"{run} is no run of train_classifier.py")
        if not (run / "classifier.json").is_file():
            raise InputError(f"{run} was stopped before it was finished: train it again")
        result = hub.read_json(run / "classifier.json")
        data.check_split_rule(result.get("split_rule"), run)
        model = load_model(run, device=compute.device)
        with interpreting(f"run.json or classifier.json of {run}", "train it again"):
            loaded = cls(run, model, load_tokenizer(run), result["temperature"], run_json["preprocess"],
                         min(run_json["max_length"], model.config.context), result["out_of_fold"],
                         set(result["trained_on"]))
            if not (0 < loaded.temperature < 1e6 and loaded.max_length >= 8
                    and loaded.preprocess in ("arabert", "none") and model.config.num_labels == 3
                    and all(len(p) == 3 and min(p) >= 0 for p in loaded.out_of_fold.values())):
                raise ValueError("temperature, max_length, preprocess, probabilities or classes out of range")
            return loaded

    def probabilities(self, complaints, compute, progress=None):
        """(n, 3) calibrated probabilities of (non-critical, neutral, critical), those out of fold where the
        run has them for a complaint; how many complaints were cut."""
        ids, cut = encode_complaints(self.tokenizer, complaints, preprocess=self.preprocess,
                                     max_length=self.max_length)
        logits = class_logits(self.model, ids, compute, progress=progress)
        probabilities = (logits / self.temperature).softmax(-1)
        for i, complaint in enumerate(complaints):
            known = self.out_of_fold.get(data.complaint_id(complaint))
            if known is not None:
                probabilities[i] = torch.tensor(known)
        return probabilities, cut

    def seen(self, complaints):
        """How many of the complaints the model is too sure of: trained on, with nothing out of fold."""
        too_sure = self.trained_on - self.out_of_fold.keys()
        return sum(data.complaint_id(complaint) in too_sure for complaint in complaints)


def check_target(to):
    """InputError where no annotated table can be written."""
    if Path(to).suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise InputError(f"--to {to}: an annotated table is written as .jsonl, .csv or .tsv")
    if Path(to).exists():
        raise InputError(f"--to {to} exists: remove it or give another name")


def annotate_table(classifier, table, to, columns, compute):
    """Writes the table with FIELDS, then its other columns, to a .jsonl, .csv or .tsv file.

    Severity is the likeliest class; a label that the row came with stays, and Severity Source says which.
    Rows stay in their order; those without a complaint are left out. Until it is complete the file is called
    `to`.partial; the same call goes on after its last chunk, so memory and what a stop can lose are bounded
    by CHUNK rows.
    """
    with lock(f"{to}.lock"):
        _annotate_table(classifier, table, Path(to), columns, compute)


def _annotate_table(classifier, table, to, columns, compute):
    check_target(to)

    # How far a call before this one came
    partial, journal = Path(f"{to}.partial"), Path(f"{to}.partial.json")
    inputs = {"table": data.file_fingerprint(table), "columns": columns,
              "classifier": data.file_fingerprint(classifier.run / "classifier.json")}
    done = Counter()  # rows, bytes, and how many complaints were cut, seen, labelled
    before = hub.read_json(journal) if journal.exists() and partial.exists() else {}
    if before.get("inputs") == inputs:
        with interpreting(journal, f"remove {partial}"):
            done.update({name: int(count) for name, count in before["done"].items()})
        print(f"{to}: going on after row {done['rows']:,}")
    done = distributed.gather(done)[0]

    # The next rows; a table that cannot be read is refused before anything is written
    total = sum(1 for _ in tables.read_rows(table, ("complaint",), columns)[2])
    pairs = islice(tables.usable_pairs(table, needed=("complaint",), columns=columns), done["rows"], None)
    chunk = list(islice(pairs, CHUNK))

    checkpoint.append(partial, "")
    if is_rank_0():
        os.truncate(partial, done["bytes"])
    stop.waits = True  # a signal is looked at between chunks
    with tqdm(total=total, initial=done["rows"], unit="row", desc="severity", mininterval=1) as bar:
        while chunk:
            complaints = [pair.complaint for pair in chunk]
            probabilities, cut = classifier.probabilities(complaints, compute, bar)
            text = io.StringIO(newline="")
            write_rows(text, to.suffix.lower(), chunk, probabilities, header=not done["rows"])
            checkpoint.append(partial, text.getvalue(), to_disk=True)
            done.update(rows=len(chunk), cut=cut, seen=classifier.seen(complaints),
                        labelled=sum(pair.severity is not None for pair in chunk))
            done["bytes"] += len(text.getvalue().encode())
            checkpoint.write_json(journal, {"inputs": inputs, "done": done})
            stop.leave(max(distributed.gather(stop.signal)),
                       f"{done['rows']:,} rows are kept: the same command goes on")
            chunk = list(islice(pairs, CHUNK))
    stop.waits = False
    if is_rank_0():
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
    classifier = Classifier.load(classifier_run, compute)
    name = f"{Path(table).stem}-{data.digest(data.file_fingerprint(table), columns)}.jsonl"
    to = Path(classifier_run) / "annotated" / name
    if to.exists():
        print(f"severity of {table} is known: {to}")
    else:
        annotate_table(classifier, table, to, columns, compute)
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
            fields[f"{name} (of the table)" if name in FIELDS else name] = cell
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
