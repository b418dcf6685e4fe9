"""train_classifier.py: targets, folds without leaks, baselines, and what the report says."""

from argparse import Namespace

import pytest
import torch
from page import Page, assert_links_lead_to_sections, assert_needs_nothing

import train_classifier
from sevloss import data, severity
from sevloss.classifier import annotate, baseline, report
from sevloss.inputs import tables


def pair(row, complaint, label, specialty=""):
    return tables.Pair(row, complaint, "", label, None, specialty, {})


def test_conflicting_labels_become_shares():
    """The same complaint, spelled with other diacritics and punctuation, is one example whose target is the
    share of each label."""
    pairs = [pair(1, "ألم شديد", 0), pair(2, "أَلَم  شديد!", 2), pair(3, "ألم شديد.", 2), pair(4, "حكة", 1)]
    texts, targets = train_classifier.soft_targets(pairs)
    assert texts == ["ألم شديد", "حكة"]
    torch.testing.assert_close(targets, torch.tensor([[1 / 3, 0, 2 / 3], [0, 1, 0]]))


def test_folds_never_score_a_complaint_that_they_saw(monkeypatch):
    # each complaint twice
    pairs = [pair(i, f"شكوى رقم {i // 2}" + ("!" if i % 2 else ""), i % 3) for i in range(200)]
    rows = {p.complaint: p.row for p in pairs}
    seen = set()

    def ids_of(pairs):
        return {data.complaint_id(p.complaint) for p in pairs}

    def fit(args, compute, train, validation, seed, *, name):
        seen.clear()
        seen.update(ids_of(train + validation))
        assert not ids_of(train) & ids_of(validation)
        return train_classifier.Fitted(None, None, None, 1.0)

    def encode(args, model, tokenizer, complaints):
        assert not {data.complaint_id(complaint) for complaint in complaints} & seen
        return [rows[complaint] for complaint in complaints], 0

    def class_logits(model, ids, compute):
        return torch.tensor([[float(row), 0, 0] for row in ids])
    monkeypatch.setattr(train_classifier, "fit", fit)
    monkeypatch.setattr(train_classifier, "encode", encode)
    monkeypatch.setattr(annotate, "class_logits", class_logits)
    args = Namespace(ckpt="tiny", seed=[0])
    ordered, results = train_classifier.out_of_fold(args, None, train_classifier.make_folds(pairs, 4))
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


# --- the report ---------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> شكوى & <b>"


@pytest.fixture
def scored():
    pairs = [pair(i, f"شكوى رقم {i}", i % 3, "cardiology" if i < 20 else "ent") for i in range(30)]
    logits = torch.eye(3)[torch.arange(30) % 3] * 3
    logits[7] = torch.tensor([9.0, 0, 0])  # true class 1
    return pairs, {"bert": logits, "bert, calibrated": logits / 2, "majority class": torch.zeros(30, 3)}


@pytest.fixture
def page_of(tmp_path, scored):
    """page_of(complaint of row 7) -> text of report.html."""
    def page_of(complaint):
        scored[0][7] = scored[0][7]._replace(complaint=complaint)
        report.write_classifier_report(tmp_path, *scored, encoder="bert", basis="30 rows.")
        return (tmp_path / "report.html").read_text(encoding="utf-8")
    return page_of


def test_report(scored, page_of):
    page = Page(page_of("شكوى | رقم ٧"))
    assert page.sections == ["Scores", "By class", "By specialty",
                             "The most confident mistakes", "The weights that these probabilities give"]
    scores = report.score_rows(scored[1], torch.arange(30) % 3)
    assert page.tables["Scores"][0] == [["model", *report.SCORE_NAMES.values()], *scores]
    assert scores[1][0] == "bert, calibrated" and scores[1][1].startswith("0.967 [0.9")
    assert scores[2][4] == "1.099" and scores[2][3] == "0.500" and scores[2][6] == "–"  # 30 rows
    assert ["neutral", "10", "1.000", "0.900", "1", "9", "0"] in page.tables["By class"][0]
    assert page.tables["By specialty"][0][1:] == [["cardiology", "20", "0.950"], ["ent", "10", "1.000"]]
    mistake, = (text for text in page.texts if "row 7" in text)
    assert mistake.split() == "predicted non-critical with probability 0.978 · row 7".split()
    assert page.arabic == [("شكوى | رقم ٧", True)]  # the only mistake, right to left
    balanced = page.tables["The weights that these probabilities give"][0][3]
    assert balanced[0] == "balanced" and float(balanced[-1]) > 1.2 > 0.8 > float(balanced[-3])


def test_calibration_from_200_rows_on(scored, tmp_path):
    """Beside the error that right probabilities would show with as many rows."""
    pairs, logits = scored
    many = {name: of_model.repeat(7, 1) for name, of_model in logits.items()}
    labels = torch.tensor([pair.severity for pair in pairs * 7])
    ece = severity.scores(many["bert"], labels)["ece"]
    assert report.score_rows(many, labels)[0][-1].startswith(f"{ece:.3f} (0.0")
    report.write_classifier_report(tmp_path, pairs * 7, many, encoder="bert", basis="210 rows.")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Calibration" in Page(text).sections
    assert_needs_nothing(text, [tmp_path / "reliability.png"])


def test_warnings_in_words():
    """Where a class is never found, and where critical rows do not weigh most: the method would not act."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    sure = torch.eye(3)[labels] * 0.7 + 0.1
    assert report.warnings(sure, labels) == []
    neutral, weights = report.warnings(torch.tensor([[0.3, 0.3, 0.4]] * 6)[:, [0, 1, 2]].flip(1), labels)[1:]
    assert neutral == "None of the 2 critical rows is predicted critical."
    assert weights.startswith("Critical rows do not get the largest weights (means, balanced: non-critical 0.950, ")
    assert report.warnings(sure[2:], labels[2:]) == []  # critical and neutral rows can be compared
    for only in (slice(0, 4), slice(4, 6)):  # no critical row, critical ones alone
        assert report.warnings(sure[only], labels[only]) == [
            "The scored rows are all critical, or none is: the weights cannot be compared."]


def test_report_needs_nothing_and_texts_are_no_markup(tmp_path, page_of):
    text = page_of(HOSTILE)
    assert (HOSTILE, True) in Page(text).arabic and "<script" not in text and "<b>" not in text
    assert_needs_nothing(text, [])
    assert_links_lead_to_sections(text)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}


def test_report_without_mistakes(scored, page_of):
    scored[1]["bert, calibrated"][7] = torch.tensor([0, 9.0, 0])
    assert "The most confident mistakes" not in Page(page_of("شكوى")).sections
