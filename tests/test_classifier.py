"""train_classifier.py: targets, folds without leaks, baselines, and what the report says."""

from argparse import Namespace

import pytest
import torch

import train_classifier
from sevloss import data
from sevloss.classifier import baseline, report
from sevloss.inputs import tables


def pair(row, complaint, label, specialty=""):
    return tables.Pair(row, complaint, "", label, None, specialty, {})


def test_conflicting_labels_become_shares():
    """The same complaint, spelled with other diacritics and punctuation, is one example whose target is the share of each label."""
    pairs = [pair(1, "ألم شديد", 0), pair(2, "أَلَم  شديد!", 2), pair(3, "ألم شديد.", 2), pair(4, "حكة", 1)]
    texts, targets = train_classifier.soft_targets(pairs)
    assert texts == ["ألم شديد", "حكة"]
    torch.testing.assert_close(targets, torch.tensor([[1 / 3, 0, 2 / 3], [0, 1, 0]]))


def test_folds_never_score_a_complaint_that_they_saw(monkeypatch):
    pairs = [pair(i, f"شكوى رقم {i // 2}" + ("!" if i % 2 else ""), i % 3) for i in range(200)]  # each complaint twice
    seen = {}

    def fit(args, compute, train, validation, preprocess, seed, *, label):
        seen["keys"] = {data.complaint_id(p.complaint) for p in train + validation}
        assert not {data.complaint_id(p.complaint) for p in train} & {data.complaint_id(p.complaint) for p in validation}
        return None, None, None, 1.0

    def predict(args, compute, model, tokenizer, scored, preprocess):
        assert not {data.complaint_id(p.complaint) for p in scored} & seen["keys"]
        return torch.tensor([[float(p.row), 0, 0] for p in scored])
    monkeypatch.setattr(train_classifier, "fit", fit)
    monkeypatch.setattr(train_classifier, "predict", predict)
    ordered, results = train_classifier.out_of_fold(Namespace(folds=4, ckpt="tiny", seed=[0]), None, pairs, "none")
    assert sorted(p.row for p in ordered) == list(range(200))
    assert results["tiny"][:, 0].tolist() == [p.row for p in ordered]  # rows and logits stay together
    assert {len(z) for z in results.values()} == {200}


def test_linear_baseline_learns_what_letters_tell():
    texts = [f"{word} {i}" for i in range(30) for word in ("حكة بسيطة", "ألم مزمن", "نزيف حاد")]
    labels = torch.arange(90) % 3
    fitted, unseen = baseline.linear_logits(texts, torch.eye(3)[labels], [texts, ["نزيف", "حكة", "شيء آخر"]])
    assert (fitted.argmax(-1) == labels).all()
    assert unseen.argmax(-1)[:2].tolist() == [2, 0]
    assert unseen[2].softmax(-1).max() < unseen[0].softmax(-1).max()  # unknown letters: unsure


def test_majority_baseline_gives_the_shares():
    logits = baseline.majority_logits(torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.5, 0, 0.5], [1, 0, 0]]), 2)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.625, 0.0, 0.375]] * 2), atol=1e-5, rtol=0)


@pytest.fixture
def scored():
    pairs = [pair(i, f"شكوى | رقم {i}", i % 3, "cardiology" if i < 20 else "ent") for i in range(30)]
    logits = torch.eye(3)[torch.arange(30) % 3] * 3
    logits[7] = torch.tensor([9.0, 0, 0])  # true class 1
    return pairs, {"bert": logits, "bert, calibrated": logits / 2, "majority class": torch.zeros(30, 3)}


def test_report(scored, tmp_path):
    report.write_classifier_report(tmp_path, *scored, encoder="bert", basis="30 rows.")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| cardiology | 20 | 0.950 |" in text and "| ent | 10 | 1.000 |" in text
    assert "| 7 | neutral | non-critical | 0.978 | شكوى \\| رقم 7 |" in text  # a bar in a text does not break the table
    assert "| neutral | 10 | 1.000 | 0.900 | 1 | 9 | 0 |" in text
    assert "balanced: mean" in text
    assert (tmp_path / "confusion.png").stat().st_size > 5000 and (tmp_path / "reliability.png").stat().st_size > 5000
    rows = report.score_rows(scored[1], torch.arange(30) % 3)
    assert rows[1][:2] == ["bert, calibrated", f"{29 / 30:.4f}"]
    assert float(rows[2][3]) == pytest.approx(1.0986, abs=1e-4)
