"""The trained classifier at work: severity probabilities for complaints, and for whole tables."""

import csv
import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from sevloss import InputError, checkpoint, data
from sevloss.inputs import hub, tables
from sevloss.models import load_model, load_tokenizer
from sevloss.severity import CLASSES

FIELDS = ("Question", "Answer", "Severity", "Non-Critical", "Neutral", "Critical")  # of the paper's annotated table
CHUNK = 8192  # rows in memory at a time


@torch.inference_mode()
def class_logits(model, id_lists, compute, *, most_tokens=8192, progress=None):
    """(n, 3) fp32 logits on the CPU, in the order given; inside sorted by length, so that equal lengths share an attention call."""
    model.eval()
    logits = torch.empty(len(id_lists), 3)
    with compute.autocast():
        for part in data.micro_batches([len(ids) for ids in id_lists], range(len(id_lists)), most_tokens):
            tokens, lengths = data.pack([id_lists[i] for i in part], compute.device)
            logits[part] = model.classify(tokens, lengths).float().cpu()
            if progress is not None:
                progress.update(len(part))
    return logits


def encode_complaints(tokenizer, complaints, *, preprocess, max_length):
    """Id lists with the tokenizer's [CLS] and [SEP], and how many were cut: a text that is too long loses its end, not its [SEP]."""
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
    out_of_fold: dict  # key of a complaint -> probabilities from a model that was not trained on it
    trained_on: set  # keys of the complaints that the model has seen

    @classmethod
    def load(cls, run, compute):
        facts = hub.read_json(Path(run) / "run.json") if (Path(run) / "run.json").is_file() else {}
        if facts.get("script") != "train_classifier.py":
            raise InputError(f"{run} is no run of train_classifier.py")
        if not (Path(run) / "classifier.json").is_file():
            raise InputError(f"{run} was stopped before it was finished: train it again")
        result = hub.read_json(Path(run) / "classifier.json")
        model = load_model(run, device=compute.device)
        try:
            return cls(Path(run), model, load_tokenizer(run), result["temperature"], facts["preprocess"],
                       min(facts["max_length"], model.config.context), result["out_of_fold"], set(result["trained_on"]))
        except KeyError as error:
            raise InputError(f"{run} is broken, {error} is missing in its run.json or classifier.json: train it again") from error

    def probabilities(self, complaints, compute, progress=None):
        """(n, 3) calibrated probabilities of (non-critical, neutral, critical); number of complaints cut to the longest length.

        A complaint that the model was trained on gets its out-of-fold probabilities, where the run has them.
        """
        ids, cut = encode_complaints(self.tokenizer, complaints, preprocess=self.preprocess, max_length=self.max_length)
        probabilities = (class_logits(self.model, ids, compute, progress=progress) / self.temperature).softmax(-1)
        if self.out_of_fold:
            for i, complaint in enumerate(complaints):
                known = self.out_of_fold.get(data.complaint_id(complaint))
                if known is not None:
                    probabilities[i] = torch.tensor(known)
        return probabilities, cut

    def seen(self, complaints):
        """How many of the complaints the model was trained on without out-of-fold probabilities for them: it is too sure of these."""
        return sum(key in self.trained_on and key not in self.out_of_fold for key in map(data.complaint_id, complaints))


def check_target(to):
    if Path(to).suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise InputError(f"--to {to}: an annotated table is written as .jsonl, .csv or .tsv")
    if Path(to).exists():
        raise InputError(f"--to {to} exists: remove it or give another name")


def annotate_table(classifier, table, to, columns, compute):
    """Writes the table with the paper's six fields, then its other columns, to a .jsonl, .csv or .tsv file, rows in their order.

    Severity is the likeliest class; a label that the row came with stays. Rows that cannot be scored are counted by reason.
    Until it is complete the file is called `to`.partial; the same call goes on after its last chunk, so memory and what a stop
    can lose are bounded by CHUNK rows.
    """
    to = Path(to)
    check_target(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    partial, journal = Path(f"{to}.partial"), Path(f"{to}.partial.json")
    work = {"table": data.file_fingerprint(table), "columns": columns,
            "classifier": data.file_fingerprint(classifier.run / "classifier.json")}
    before = hub.read_json(journal) if journal.exists() and partial.exists() else {}
    fresh = {"work": work, "rows": 0, "bytes": 0, "cut": 0, "seen": 0, "labelled": 0}
    state = fresh | before if before.get("work") == work else fresh

    skipped = tables.Skipped()
    pairs = tables.iterate_pairs(table, needed=("complaint",), columns=columns, skipped=skipped)
    if state["rows"]:
        print(f"{to}: going on after row {state['rows']:,}")
        for _ in islice(pairs, state["rows"]):
            pass
    chunk, total = list(islice(pairs, CHUNK)), tables.count_rows(table)  # read before anything is written
    if not chunk and not state["rows"]:
        raise InputError(f"{table}: no row could be scored; {skipped}")
    with open(partial, "r+" if state["rows"] else "w", encoding="utf-8", newline="") as file, \
            tqdm(total=total, initial=state["rows"], unit="row", desc="severity", mininterval=1) as bar:
        file.truncate(state["bytes"])
        file.seek(0, os.SEEK_END)
        while chunk:
            complaints = [p.complaint for p in chunk]
            probabilities, cut = classifier.probabilities(complaints, compute, bar)
            write_rows(file, to.suffix.lower(), chunk, probabilities, header=not state["rows"])
            file.flush()
            state |= {"rows": state["rows"] + len(chunk), "bytes": file.tell(), "cut": state["cut"] + cut,
                      "seen": state["seen"] + classifier.seen(complaints),
                      "labelled": state["labelled"] + sum(p.severity is not None for p in chunk)}
            checkpoint.write_json(journal, state)
            chunk = list(islice(pairs, CHUNK))
    os.replace(partial, to)
    journal.unlink()
    print(f"wrote {to}: {state['rows']:,} rows, {state['cut']:,} complaints cut to {classifier.max_length} tokens")
    if skipped.rows:
        print(f"  {skipped}")
    if state["labelled"]:
        print(f"  {state['labelled']:,} rows came with a severity, which stays; without that column it would be the likeliest class")
    if state["seen"]:
        print(f"  the classifier was trained on {state['seen']:,} of these complaints, so it is too sure of them: train it with --folds 5")


def annotated(classifier_run, table, columns, compute):
    """Path of the annotated table, made on the first call and kept in the classifier's run folder for the next ones."""
    classifier = Classifier.load(classifier_run, compute)
    name = data.digest(data.file_fingerprint(table), columns)
    to = Path(classifier_run) / "annotated" / f"{Path(table).stem}-{name}.jsonl"
    if to.exists():
        print(f"severity of {table} is known: {to}")
    else:
        annotate_table(classifier, table, to, columns, compute)
    return to


def write_rows(file, suffix, pairs, probabilities, *, header):
    """Appends rows in the form that `suffix` names."""
    rows = []
    for pair, row in zip(pairs, probabilities.tolist()):
        label = pair.severity if pair.severity is not None else max(range(3), key=row.__getitem__)
        fields = dict(zip(FIELDS, (pair.complaint, pair.response, CLASSES[label], *(round(p, 6) for p in row))))
        rows.append(fields | {f"{name} (of the table)" if name in fields else name: cell for name, cell in pair.others.items()})
    if suffix == ".jsonl":
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    # "\r\n" ends rows, as then a "\r" inside a cell is quoted
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\r\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
