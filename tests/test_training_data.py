"""A table made ready for training: read once, remembered, and noticed when it has changed."""

import numpy as np

from sevloss import data, training_data, training_rows
from sevloss.models.tiny import tiny_gpt2
from sevloss.training_rows import TrainingRows


def test_remembered(tiny, write_table, rows, tmp_path, monkeypatch):
    """The second start reads no table, and ends the process that has begun to; another table, tokenizer or argument is noticed."""
    monkeypatch.setattr(training_rows, "LARGE", 0)
    tokenizer, made = tiny[1], []
    table = write_table("table.jsonl", rows)
    reading = dict(needed=("complaint", "response", "critical"), columns={}, train_rows=None, validation_rows=5)
    encoding = dict(max_length=60, eos_id=0, preprocess="none")

    def ready(tokenizer=tokenizer, **encoding):
        table_rows = TrainingRows(table, **reading)
        table_rows.begin()
        process = table_rows.reader

        def make():
            made.append(encoding)
            return training_data.prepare(table_rows, table_rows, tokenizer, data.encode_pairs, **encoding)
        found = training_data.remembered(tmp_path / "cache", table_rows, tokenizer, (reading, encoding), make)
        assert process.returncode is not None  # ended, and waited for
        return found

    first, again = ready(**encoding), ready(**encoding)
    assert len(made) == 1 and len(first.held_out) == 5
    for one, other in ((first.examples, again.examples), (first.held_out, again.held_out)):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "starts", "first_target"))
    assert np.array_equal(first.probabilities, again.probabilities) and first.probabilities.shape == (len(first.examples), 3)
    assert (first.fingerprint, first.kept) == (again.fingerprint, again.kept)

    ready(**encoding | {"max_length": 40})
    ready(tiny_gpt2([row["Answer"] for row in rows], vocab_size=300)[1], **encoding)
    table.write_text(table.read_text(encoding="utf-8").replace("أرق", "قلق"), encoding="utf-8")
    ready(**encoding)
    monkeypatch.setattr(training_data, "CODE", training_data.CODE[1:])  # stands for changed code
    ready(**encoding)
    assert len(made) == 5
