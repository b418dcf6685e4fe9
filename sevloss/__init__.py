"""Severity-aware fine-tuning for Arabic medical text generation, in plain PyTorch."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there two processes in one folder are not noticed
    fcntl = None

# Every ragged batch has shapes of its own, and oneDNN keeps what it prepared for each of the last 1,024:
# hundreds of megabytes. A step needs about 150, each of them in every block.
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was found, and what to do."""


@contextlib.contextmanager
def interpreting(path, advice="correct it or get it again", wanted="used"):
    """Around code that interprets a file which someone else may have written: whatever goes wrong there
    becomes an InputError that names the file and says what to do."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # what wrong types and shapes, or native code, raise has no common class
        if out_of_memory(error):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        raise InputError(f"{path} cannot be {wanted} ({_reason(error)}); {advice}") from error


def writing(path):
    """Like `interpreting`, around code that writes a file."""
    return interpreting(path, "what was saved before stays", wanted="written")


def out_of_memory(error):
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(
        re.search("out of memory|allocate memory", str(error))))


def _reason(error):
    if isinstance(error.__context__, OSError):
        error = error.__context__
    first_line = str(error).strip().partition("\n")[0][:300]
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line}"


def check_positive(args, *names, or_zero=()):
    """InputError unless the arguments `names`, numbers or lists of them, are above 0, and those of `or_zero`
    at least 0. None passes; nothing beyond 64 bits does."""
    for name in (*names, *or_zero):
        given = getattr(args, name)
        wanted = "at least 0" if name in or_zero else "positive"  # NaN and infinity are neither
        for value in given if isinstance(given, list) else [given]:
            if not (value is None or 0 < value < 2 ** 63 or value == 0 and name in or_zero):
                raise InputError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")


def is_rank_0():
    """Of the processes that torchrun has started this one writes and prints; without torchrun: yes."""
    return os.environ.get("RANK", "0") == "0"


# --- files --------------------------------------------------------------------------------------------------

def write_atomically(path, write, size=0):
    """write(temporary path), to the disk, then a rename: the file is the old one or the new one, never half
    of it, even when power fails. size: bytes that must be free. InputError names what cannot be written."""
    if not is_rank_0():
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise InputError(f"{path} cannot be written: it needs {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB "
                             "are free; what was saved before stays")
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # the usual one: safetensors lets nobody but the owner read
            flush_to_disk(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_to_disk(path.parent)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def flush_to_disk(path):
    """A file's content, or a folder's names."""
    if os.name != "nt":  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def lock(path, wait=False):
    """Holds the file `path`, which the system lets go when its holder dies; InputError where another process
    holds it, unless `wait`. Where the file system has no locks, it goes on without."""
    if not is_rank_0():  # rank 0 holds it for all
        yield
        return
    path = Path(path)
    made = not path.parent.exists()
    held = False
    while not held:  # the holder before may remove the file while we open it
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process works on {path.parent} and holds {path.name}: wait for it, or "
                             "give another folder") from None
        except OSError:
            pass
        held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if made:
                path.parent.rmdir()  # where nothing has come into it
        file.close()


# --- how a script ends --------------------------------------------------------------------------------------

class Stop:
    """What Ctrl-C and SIGTERM do: they end the script at once; or, where a loop has set `waits`, the first
    one is kept in `signal` until the loop calls `leave_if`, its step done and saved."""
    waits = False
    signal = 0

    def handle(self, number, frame):
        at_once = self.signal or not self.waits
        self.signal = number
        if at_once:
            raise KeyboardInterrupt
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be at work just now

    def leave_if(self, signal, message):
        if signal:
            self.signal = signal  # it may be another rank's
            raise KeyboardInterrupt(message)


stop = Stop()


def report_errors(main):
    """Decorates a script's main(). One line and exit code 2: an InputError, a file that cannot be read or
    written, too little memory. Ctrl-C or SIGTERM: one line and the usual code, 130 or 143."""
    @functools.wraps(main)
    def run():
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal without Arabic loses letters, not the run
        stop.waits = False
        stop.signal = 0
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has set it
                handlers[number] = signal.signal(number, stop.handle)
        try:
            return main()
        except (InputError, OSError) as error:
            named = getattr(error, "filename", None)
            message = f"{named}: {error.strerror}" if named else str(error)
            # one line, and nothing in it that steers a terminal
            line = "error: " + "".join(c if c.isprintable() else " " for c in message)
        except KeyboardInterrupt as stopped:
            line = f"\nstopped; {str(stopped) or 'what was saved before stays'}"
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            line = ("error: out of memory: lower --batch-size, --max-length or, in finetune.py, "
                    "--micro-tokens; there --gradient-checkpointing helps, too; what was saved before stays")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        rank = "" if is_rank_0() else f"rank {os.environ['RANK']}: "
        print(rank + line, file=sys.stderr)
        sys.exit(2 if line.startswith("error") else 128 + (stop.signal or signal.SIGINT))
    return run
