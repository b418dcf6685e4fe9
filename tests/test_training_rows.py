"""A large table is read by a process of its own: nothing of it may differ, get lost or stay behind."""

import subprocess

import pytest

from sevloss import InputError, training_rows
from sevloss.training_rows import TrainingRows

READING = dict(needed=("complaint", "response"), columns={}, train_rows=None, validation_rows=5)


@pytest.fixture
def beside(monkeypatch):
    """Every table is large, and parts are small."""
    monkeypatch.setattr(training_rows, "LARGE", 0)


def known(rows):
    return rows.probabilities, rows.validation, rows.fingerprint, rows.kept


@pytest.mark.parametrize("train_rows", [None, 7])
def test_same_rows_from_either_process(write_table, rows, beside, capsys, train_rows):
    table = write_table("table.csv", [*rows, {"Question": "👍", "Answer": "نعم"}])
    here, there = (TrainingRows(table, **READING | {"train_rows": train_rows}) for _ in range(2))
    expected = list(here._read())
    printed = capsys.readouterr().out
    assert [pair._asdict() for pair in there] == [pair._asdict() for pair in expected] and known(there) == known(here)
    assert capsys.readouterr().out == printed and "1 without a complaint" in printed


@pytest.mark.parametrize("name, content, message", [
    ("late.csv", b"question,answer\n" + "سؤال,جواب\n".encode() * 9000 + "سؤال,جواب\n".encode("cp1256"), "is not UTF-8"),
    ("no.csv", b"q,answer\na,b\n", "has no column for the complaint"),
    ("one.csv", b"question,answer\na,b\n", "too few complaints"),
    ("book.xlsx", b"no zip", "cannot be read as an Excel workbook"),
])
def test_errors_of_the_other_process_are_raised_in_this_one(tmp_path, beside, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(TrainingRows(tmp_path / name, **READING))


@pytest.fixture
def reading(write_table, rows, beside, monkeypatch):
    """(what a table of 20,000 rows is read with, after its first row; the process that reads it)"""
    started = []

    class Started(subprocess.Popen):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            started.append(self)
    monkeypatch.setattr(subprocess, "Popen", Started)
    table = write_table("table.csv", [{**rows[0], "Question": f"{rows[0]['Question']} {i}"} for i in range(20_000)])
    reading = iter(TrainingRows(table, **READING))
    next(reading)
    return reading, started[0]


def test_reading_may_begin_before_the_rows_are_wanted(write_table, rows, beside, monkeypatch):
    reader = TrainingRows(write_table("table.csv", rows), **READING)
    reader.begin()
    monkeypatch.setattr(TrainingRows, "begin", None)  # not once more
    assert len(list(reader)) == len(reader.probabilities) > 0 and reader.reader is None


@pytest.mark.parametrize("end", [TrainingRows.close, lambda rows: None])
def test_rows_that_nobody_wants_leave_no_process(write_table, rows, beside, end):
    """They were encoded before, or the checkpoint cannot be loaded."""
    reader = TrainingRows(write_table("table.csv", rows * 9000), **READING)
    reader.begin()
    process = reader.reader
    assert process.poll() is None
    end(reader)
    del reader
    assert process.wait(timeout=10) == -9


def test_an_end_of_the_other_process_is_one_line(reading):
    """As when the system kills it for its memory."""
    reading, process = reading
    process.kill()
    with pytest.raises(InputError, match=r"the process that read it has ended \(exit code -9\)"):
        list(reading)


def test_who_stops_listening_leaves_no_process(reading):
    reading, process = reading
    assert process.poll() is None  # it waits: there is more than a pipe holds
    reading.close()
    assert process.returncode is not None
