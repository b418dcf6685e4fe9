"""Weightings and scores against numbers worked out by hand, and calibration."""

import math

import pytest
import torch
import torch.nn.functional as F

from sevloss import InputError, severity


def test_weightings_are_the_papers():
    assert severity.CLASSES == ("non-critical", "neutral", "critical")
    assert severity.WEIGHTINGS == {"none": (1, 1, 1), "mild": (0.75, 1, 1.25), "balanced": (0.5, 1, 1.5),
                                   "strong": (0.25, 1, 1.75)}


def test_parse_weighting():
    assert severity.parse_weighting("strong") == (0.25, 1, 1.75)
    assert severity.parse_weighting("0, .5,2") == (0, 0.5, 2)
    for text in ("hard", "", "1,2", "1,2,3,4", "1,2,x", "1,2,-1", "1,2,nan", "1,2,inf", "1e39,1,1"):
        with pytest.raises(InputError,
                           match="one of none, mild, balanced, strong, or three numbers from 0 to 1e6"):
            severity.parse_weighting(text)


def test_confusion_rows_are_the_true_classes():
    predicted, labels = torch.tensor([2, 2, 1, 0]), torch.tensor([0, 0, 1, 0])
    assert severity.confusion_matrix(predicted, labels).tolist() == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]


def test_scores_by_hand():
    """Four complaints; class 1 is neither there nor predicted, so its F1 is 0 and counts."""
    p = torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.1, 0.4], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]])
    scores = severity.scores(p.log(), torch.tensor([0, 2, 2, 0]))
    # predicted: 0 0 2 0
    assert scores["confusion"] == [[2, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 * 2 / (2 + 3) + 0 + 2 * 1 / (2 + 1)) / 3)
    assert scores["nll"] == pytest.approx(-math.log(0.6 * 0.4 * 0.8 * 0.7) / 4)
    assert scores["brier"] == pytest.approx((0.16 + 0.04 + 0.04 + 0.25 + 0.01 + 0.36 + 0.01 + 0.01 + 0.04
                                             + 0.09 + 0.04 + 0.01) / 4)
    # four confidences in four of the fifteen bins: 0.6 right, 0.5 wrong, 0.8 right, 0.7 right
    assert scores["ece"] == pytest.approx((0.4 + 0.5 + 0.2 + 0.3) / 4)


def test_calibration_error_compares_means_of_bins():
    """In one bin, over- and underconfidence cancel; confidence 1 belongs to the last one."""
    p = torch.tensor([[0.75, 0.25, 0.0]] * 4 + [[1.0, 0.0, 0.0]])
    assert severity.expected_calibration_error(p, torch.tensor([0, 0, 0, 1, 0])) == 0
    assert severity.expected_calibration_error(p, torch.tensor([0, 0, 0, 0,
                                                                0])) == pytest.approx(4 / 5 * 0.25)
    assert severity.expected_calibration_error(p, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(1 / 5)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_fit_temperature_finds_what_was_put_in(temperature):
    torch.manual_seed(0)
    logits = torch.randn(20000, 3) * 2
    labels = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    fitted = severity.fit_temperature(logits * temperature, labels)
    assert fitted == pytest.approx(temperature, rel=0.05)
    nll = [F.cross_entropy(logits * temperature / t, labels).item()
           for t in (fitted, fitted * 1.02, fitted / 1.02)]
    assert nll[0] == min(nll)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("shift", [0, 1])
def test_fit_temperature_stays_bounded(scale, shift):
    """Four rows, all right or all wrong: without a prior the optimum would be 0 or infinity."""
    labels = torch.tensor([0, 1, 2, 0])
    assert 0.4 <= severity.fit_temperature(F.one_hot(labels, 3) * scale, (labels + shift) % 3) <= 6


def test_auc_by_hand():
    """Of 2 x 3 pairs 4 are in order and one is even; all the same is 0.5; without one of the kinds there is none."""
    values, positive = torch.tensor([0.9, 0.4, 0.4, 0.1, 0.6]), torch.tensor([True, True, False, False, False])
    assert severity.auc(values, positive) == pytest.approx(4.5 / 6)
    assert severity.auc(torch.ones(5), positive) == 0.5
    assert math.isnan(severity.auc(values, torch.zeros(5, dtype=torch.bool)))
    assert math.isnan(severity.auc(values, torch.ones(5, dtype=torch.bool)))


def test_calibration_error_by_chance():
    """Right probabilities show an error that falls with the number of rows, and not 0."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    few, many = (severity.calibration_error_by_chance(p.repeat(n, 1)) for n in (12, 1200))
    assert 0.08 < few < 0.2 and 0.005 < many < 0.02
