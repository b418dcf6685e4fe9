"""Has a table, a file or an argument changed? Short hashes that tell."""

import hashlib
import os
from pathlib import Path

from sevloss import InputError


class Fingerprint:
    """Of pairs, more of which may be added: changes when any text, label or probability that training reads does."""

    def __init__(self, pairs=()):
        self.digest = hashlib.blake2b(digest_size=8)
        for pair in pairs:
            self.add(pair)

    def add(self, pair):
        about = len(pair.complaint), len(pair.response), pair.severity, pair.probabilities
        self.digest.update(f"{about}{pair.complaint}{pair.response}".encode())

    def __str__(self):
        return self.digest.hexdigest()


def file_fingerprint(path):
    """Changes when the file does: name, size and time of change."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    status = os.stat(path)
    return [Path(path).name, status.st_size, status.st_mtime_ns]


def digest(*parts):
    """A short name of what something was made from."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
