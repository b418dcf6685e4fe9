"""Severity-aware fine-tuning for Arabic medical text generation, in plain PyTorch."""

import functools
import math
import os
import sys
from pathlib import Path

# Every ragged batch has shapes of its own, and oneDNN keeps what it prepared for each of the last 1,024:
# hundreds of megabytes. A step needs about 150, each of them in every block.
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was found, and what to do."""


def check_positive(args, *names, or_zero=()):
    """InputError unless the arguments `names` are above 0, and those of `or_zero` at least 0; None passes."""
    for name in (*names, *or_zero):
        value = getattr(args, name)
        if value is None or math.isfinite(value) and (value > 0 or value == 0 and name in or_zero):
            continue
        wanted = "at least 0" if name in or_zero else "positive"
        raise InputError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


def is_rank_0():
    """Of the processes that torchrun started this one writes and prints; without torchrun: yes."""
    return os.environ.get("RANK", "0") == "0"


def write_atomically(path, write):
    """write(temporary path), then a rename: the file is the old one or the new one, never half of it."""
    if not is_rank_0():
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # the usual one: safetensors lets nobody but the owner read
    os.replace(temporary, path)


def open_to_append(path):
    """`path` for text, UTF-8, line by line; nowhere on a rank that does not write."""
    return open(path if is_rank_0() else os.devnull, "a", encoding="utf-8", newline="")


def report_errors(main):
    """Decorates a script's main(): InputError becomes a line and exit code 2, Ctrl-C a line and code 130."""
    @functools.wraps(main)
    def run():
        try:
            main()
        except (InputError, OSError) as error:  # OSError: a full disk, a folder where a file should be
            rank = "" if is_rank_0() else f"rank {os.environ['RANK']}: "
            print(f"{rank}error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\nstopped by Ctrl-C; what was saved before stays", file=sys.stderr)
            sys.exit(130)
    return run
