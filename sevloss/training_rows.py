"""The training rows of a table. A large table is read by a process of its own, beside the one that encodes; that one needs no PyTorch."""

import contextlib
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import weakref
from itertools import islice
from pathlib import Path

from sevloss import InputError, data
from sevloss.data import Fingerprint
from sevloss.inputs import tables

LARGE = 2 ** 22  # bytes: below that, another process would take longer to begin than it saves


class TrainingRows:
    """Iterating gives the training pairs of a table, the first `train_rows` of them. After that it also knows

    probabilities   one tuple for each
    validation      at most `validation_rows` pairs, the same ones always
    fingerprint     of all rows
    kept            how many rows are in the test split
    """

    def __init__(self, table, *, needed, columns, train_rows, validation_rows):
        self.table, self.reading = os.fspath(table), dict(needed=needed, columns=columns)
        self.train_rows, self.validation_rows, self.reader = train_rows, validation_rows, None

    def begin(self):
        """From now on a large table is read, by a process of its own. Not needed before iterating, but time is won."""
        if not Path(self.table).is_file() or Path(self.table).stat().st_size <= LARGE:
            return
        arguments = self.reading | dict(train_rows=self.train_rows, validation_rows=self.validation_rows)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).resolve().parent.parent), *filter(None, sys.path)))}
        self.reader = subprocess.Popen([sys.executable, "-c", f"from {__name__} import serve; serve({self.table!r}, {arguments!r})"],
                                       env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        weakref.finalize(self, self.reader.kill)

    def close(self):
        """Ends what begin() began."""
        if self.reader:
            self.reader.kill()
            self.reader.wait()
            self.reader.stdout.close()
            self.reader = None

    def __iter__(self):
        if not self.reader:
            self.begin()
        return self._receive() if self.reader else self._read()

    def _read(self):
        self.probabilities, self.validation, self.kept, fingerprint = [], [], 0, Fingerprint()
        for pair in tables.usable_pairs(self.table, **self.reading):
            fingerprint.add(pair)
            side = data.split_of(pair.complaint)
            self.kept += side == "test"
            if side == "validation":
                self.validation.append(pair)
            elif side == "train" and (self.train_rows is None or len(self.probabilities) < self.train_rows):
                self.probabilities.append(pair.probabilities or (0.0, 1.0, 0.0))
                yield pair
        self.validation, self.fingerprint = data.sample_pairs(self.validation, self.validation_rows), str(fingerprint)
        if not self.probabilities or not self.validation:
            raise InputError(f"{self.table} has too few complaints to train and validate on")

    def _receive(self):
        try:
            end = None
            while not end:
                printed, pairs, end = pickle.load(self.reader.stdout)
                print(printed, end="")
                yield from map(tables.Pair._make, pairs)
            if isinstance(end, Exception):
                raise end
            vars(self).update(end)
        except (EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{self.table}: the process that read it has ended (exit code {self.reader.wait()}); "
                             "if nothing is said above, it may have needed more memory than there is") from error
        finally:
            self.close()


def serve(table, arguments):
    """The other process: gives (what was printed, pairs, in the end an error or all that TrainingRows know) repeatedly."""
    for name in ("SIGINT", "SIGPIPE"):  # Ctrl-C, and the end of who reads this, end it without a word
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    gc.disable()  # as in training_data.prepare
    rows, out = TrainingRows(table, **arguments), sys.stdout.buffer

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pairs, part, end = rows._read(), [], None
        while not end:
            try:
                part = list(map(tuple, islice(pairs, tables.ROWS_AT_ONCE)))  # as plain tuples: a third of the time to pickle
                end = None if part else {name: getattr(rows, name) for name in ("probabilities", "validation", "fingerprint", "kept")}
            except (InputError, OSError) as error:
                part, end = [], error
            pickle.dump((printed.getvalue(), part, end), out, pickle.HIGHEST_PROTOCOL)
            out.flush()
            printed.seek(printed.truncate(0))
