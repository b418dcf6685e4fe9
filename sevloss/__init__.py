"""Severity-aware fine-tuning for Arabic medical text generation, in plain PyTorch."""

import contextlib
import functools
import os
import sys
from pathlib import Path

# Every ragged batch has shapes of its own, and oneDNN keeps what it prepared for each of the last 1,024:
# hundreds of megabytes. A step needs about 150, each of them in every block.
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was found, and what to do."""


@contextlib.contextmanager
def interpreting(path, advice="correct it or get it again"):
    """Around code that interprets a file which someone else may have written: whatever goes wrong there
    becomes an InputError that names the file and says what to do."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # what wrong types and shapes raise has no common class
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(f"{path} cannot be used ({type(error).__name__}: {reason}); {advice}") from error


def printable(text):
    """The text on one line, without characters that steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def check_positive(args, *names, or_zero=()):
    """InputError unless the arguments `names` are above 0, and those of `or_zero` at least 0. None passes;
    nothing beyond 64 bits does."""
    for name in (*names, *or_zero):
        value = getattr(args, name)
        if value is None or 0 < value < 2 ** 63 or value == 0 and name in or_zero:
            continue
        wanted = "at least 0" if name in or_zero else "positive"  # NaN and infinity are neither
        raise InputError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


def write_atomically(path, write):
    """write(temporary path), then a rename: the file is the old one or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # the usual one: safetensors lets nobody but the owner read
    os.replace(temporary, path)


def report_errors(main):
    """Decorates a script's main(): InputError becomes a line and exit code 2, Ctrl-C a line and code 130."""
    @functools.wraps(main)
    def run():
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal without Arabic loses letters, not the run
        try:
            main()
        except (InputError, OSError) as error:  # OSError: a full disk, a folder where a file should be
            print(f"error: {printable(str(error))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\nstopped by Ctrl-C; what was saved before stays", file=sys.stderr)
            sys.exit(130)
    return run
