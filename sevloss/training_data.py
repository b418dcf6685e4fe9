"""A table made ready for fine-tuning: its training rows, a few to validate on, all as numbers, kept for the next start."""

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sevloss import data, training_rows, write_atomically
from sevloss.inputs import arabic, tables, tokenizer_files

CODE = [Path(module.__file__) for module in (tables, training_rows, data, tokenizer_files, arabic)]  # what the ids depend on


@dataclass
class Prepared:
    """All that training needs of a table, in numbers."""
    examples: data.Examples
    held_out: data.Examples  # of the validation rows
    probabilities: np.ndarray  # (n, 3) of the examples
    fingerprint: str  # of the whole table
    kept: int  # rows of the test split


def prepare(rows, pairs, tokenizer, encode, **encoding):
    """rows: TrainingRows; pairs: themselves once more, or the list that they gave; encode: data.encode_pairs or data.encode_published."""
    gc.disable()  # of the millions of objects made here none refers to itself; looking for that takes a tenth of the time
    try:
        examples = encode(pairs, tokenizer, **encoding)
    finally:
        gc.enable()
    return Prepared(examples, data.encode_pairs(rows.validation, tokenizer, **encoding), np.array(rows.probabilities, np.float32),
                    rows.fingerprint, rows.kept)


def remembered(folder, rows, tokenizer, arguments, make):
    """make() -> Prepared; or what it gave before for the same table (name, size, time of change), tokenizer, arguments and code.
    Then `rows`, a TrainingRows, are closed."""
    table = rows.table
    parts = data.file_fingerprint(table), tokenizer.to_str(), arguments, [path.read_bytes() for path in (Path(__file__), *CODE)]
    path = Path(folder) / f"{Path(table).stem}-{data.digest(*parts)}.npz"
    if path.is_file():
        rows.close()
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
