"""A table made ready for fine-tuning: its training rows, a few to validate on, all as numbers, kept for the next start."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sevloss import InputError, arabic, data, hashes, splits, tables, write_atomically


@dataclass
class Prepared:
    """All that training needs of a table, in numbers."""
    examples: data.Examples
    held_out: data.Examples  # of the validation rows
    probabilities: np.ndarray  # (n, 3) of the examples
    fingerprint: str  # of the whole table
    kept: int  # rows of the test split


class TrainingRows:
    """Iterating gives the training pairs of a table, the first `train_rows` of them. After that it also knows

    probabilities   one tuple for each
    validation      at most `validation_rows` pairs, the same ones always
    fingerprint     of all rows
    kept            how many rows are in the test split
    """

    def __init__(self, table, *, needed, columns, train_rows, validation_rows):
        self.table, self.reading = table, dict(needed=needed, columns=columns)
        self.train_rows, self.validation_rows = train_rows, validation_rows

    def __iter__(self):
        self.probabilities, self.validation, self.fingerprint, self.kept = [], [], hashes.Fingerprint(), 0
        for pair in tables.usable_pairs(self.table, **self.reading):
            self.fingerprint.add(pair)
            side = splits.split_of(pair.complaint)
            self.kept += side == "test"
            if side == "validation":
                self.validation.append(pair)
            elif side == "train" and (self.train_rows is None or len(self.probabilities) < self.train_rows):
                self.probabilities.append(pair.probabilities or (0.0, 1.0, 0.0))
                yield pair
        self.validation = splits.some_of(self.validation, self.validation_rows)
        if not self.probabilities or not self.validation:
            raise InputError(f"{self.table} has too few complaints to train and validate on")


def prepare(rows, pairs, tokenizer, encode, **encoding):
    """rows: TrainingRows; pairs: themselves once more, or the list that they gave; encode: data.encode_pairs or data.encode_published."""
    examples = encode(pairs, tokenizer, **encoding)
    return Prepared(examples, data.encode_pairs(rows.validation, tokenizer, **encoding), np.array(rows.probabilities, np.float32),
                    str(rows.fingerprint), rows.kept)


def remembered(folder, table, tokenizer, arguments, make):
    """make() -> Prepared; or what it gave before for the same table (name, size, time of change), tokenizer, arguments and code."""
    code = [Path(module).read_bytes() for module in (__file__, tables.__file__, splits.__file__, data.__file__, arabic.__file__)]
    parts = hashes.file_fingerprint(table), tokenizer.to_str(), arguments, code
    path = Path(folder) / f"{Path(table).stem}-{hashes.digest(*parts)}.npz"
    if path.is_file():
        print(f"{table} is encoded already: {path}")
        with np.load(path) as a:
            return Prepared(data.Examples(a["ids"], a["starts"], a["first"]),
                            data.Examples(a["held_ids"], a["held_starts"], a["held_first"]),
                            a["probabilities"], str(a["fingerprint"]), int(a["kept"]))
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = dict(ids=made.examples.ids, starts=made.examples.starts, first=made.examples.first_target, held_ids=made.held_out.ids,
                  held_starts=made.held_out.starts, held_first=made.held_out.first_target, probabilities=made.probabilities,
                  fingerprint=made.fingerprint, kept=made.kept)

    def write(temporary):
        with open(temporary, "wb") as file:  # given a name, numpy would put .npz behind it
            np.savez(file, **arrays)
    write_atomically(path, write)
    return made
