"""The training rows of a table. A large table is read by a process of its own, beside the one that encodes; that one needs no PyTorch."""

import contextlib
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

from sevloss import InputError, splits, tables
from sevloss.hashes import Fingerprint

LARGE = 2 ** 22  # bytes: below that, another process would take longer to begin than it saves


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
        large = Path(self.table).is_file() and Path(self.table).stat().st_size > LARGE
        return self._read_beside() if large else self._read()

    def _read(self):
        self.probabilities, self.validation, self.kept, fingerprint = [], [], 0, Fingerprint()
        for pair in tables.usable_pairs(self.table, **self.reading):
            fingerprint.add(pair)
            side = splits.split_of(pair.complaint)
            self.kept += side == "test"
            if side == "validation":
                self.validation.append(pair)
            elif side == "train" and (self.train_rows is None or len(self.probabilities) < self.train_rows):
                self.probabilities.append(pair.probabilities or (0.0, 1.0, 0.0))
                yield pair
        self.validation, self.fingerprint = splits.some_of(self.validation, self.validation_rows), str(fingerprint)
        if not self.probabilities or not self.validation:
            raise InputError(f"{self.table} has too few complaints to train and validate on")

    def _read_beside(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).resolve().parent.parent), *filter(None, sys.path)))}
        with subprocess.Popen([sys.executable, "-c", f"from {__name__} import serve; serve()"], env=environment,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            try:
                with reader.stdin as arguments:
                    pickle.dump(self, arguments)
                while True:
                    printed, pairs, end = pickle.load(reader.stdout)
                    print(printed, end="")
                    yield from pairs
                    if isinstance(end, Exception):
                        raise end
                    if end:
                        vars(self).update(end)
                        return
            except (EOFError, pickle.UnpicklingError, BrokenPipeError) as error:
                raise InputError(f"{self.table}: the process that read it has ended (exit code {reader.wait()}); "
                                 "if nothing is said above, it may have needed more memory than there is") from error
            finally:
                reader.kill()


def serve():
    """The other process: gets TrainingRows; gives (what was printed, pairs, in the end an error or all that they know) repeatedly."""
    for name in ("SIGINT", "SIGPIPE"):  # Ctrl-C, and the end of who reads this, end it without a word
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    gc.disable()  # as in training_data.prepare
    rows, out = pickle.load(sys.stdin.buffer), sys.stdout.buffer

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pairs, part, end = rows._read(), [], None
        while not end:
            try:
                part = list(islice(pairs, tables.ROWS_AT_ONCE))
                end = None if part else vars(rows)
            except (InputError, OSError) as error:
                part, end = [], error
            pickle.dump((printed.getvalue(), part, end), out, pickle.HIGHEST_PROTOCOL)
            out.flush()
            printed.seek(printed.truncate(0))
