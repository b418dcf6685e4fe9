"""The severity classes, the paper's weightings, and how well probabilities fit the labels."""

import math

import torch
import torch.nn.functional as F

from sevloss import InputError

CLASSES = ("non-critical", "neutral", "critical")

# coefficients (a, b, c) of w = a p_nc + b p_n + c p_c; paper, section on the weighted loss
WEIGHTINGS = {"none": (1.0, 1.0, 1.0), "mild": (0.75, 1.0, 1.25), "balanced": (0.5, 1.0, 1.5),
              "strong": (0.25, 1.0, 1.75)}


def class_name(label, probabilities):
    """"critical" by label (an index or None); "predicted critical" where probabilities alone (three or None)
    say so; else "severity unknown"."""
    if label is not None:
        return CLASSES[label]
    if probabilities:
        return "predicted " + CLASSES[max(range(3), key=probabilities.__getitem__)]
    return "severity unknown"


def parse_weighting(text):
    """A name of WEIGHTINGS, or three numbers "a,b,c" -> (a, b, c)."""
    if text in WEIGHTINGS:
        return WEIGHTINGS[text]
    try:
        coefficients = tuple(float(part) for part in text.split(","))
    except ValueError:
        coefficients = ()
    in_range = all(0 <= c <= 1e6 for c in coefficients) and any(coefficients)
    if len(coefficients) != 3 or not in_range:
        raise InputError(f"--weighting is one of {', '.join(WEIGHTINGS)}, or three numbers from 0 to 1e6 "
                         f"such as 0.5,1,1.5, not all of them 0; not {text!r}")
    return coefficients


def confusion_matrix(predicted, labels):
    """(3, 3) counts; row: true class, column: predicted class."""
    return torch.bincount(labels * 3 + predicted, minlength=9).view(3, 3)


def accuracy_and_f1(confusion):
    """(..., 3, 3) counts -> accuracy and macro-F1, each (...): the mean F1 of the classes, 0 for one that is
    neither there nor predicted."""
    confusion = confusion.double()
    hits = confusion.diagonal(dim1=-2, dim2=-1)
    f1 = 2 * hits / (confusion.sum(-1) + confusion.sum(-2)).clamp(min=1)
    return hits.sum(-1) / confusion.sum((-2, -1)), f1.mean(-1)


def scores(logits, labels):
    """logits (n, 3), labels (n,) -> {accuracy, macro_f1, auc, nll, brier, ece, confusion}. auc is that of
    p(critical), nll in nats."""
    logits = logits.float()
    probabilities = logits.softmax(-1)
    confusion = confusion_matrix(logits.argmax(-1), labels)
    accuracy, macro_f1 = accuracy_and_f1(confusion)
    return {
        "accuracy": accuracy.item(),
        "macro_f1": macro_f1.item(),
        "auc": auc(probabilities[:, 2], labels == 2),
        "nll": F.cross_entropy(logits, labels).item(),
        "brier": (probabilities - F.one_hot(labels, 3)).square().sum(-1).mean().item(),
        "ece": expected_calibration_error(probabilities, labels),
        "confusion": confusion.tolist(),
    }


def auc(values, positive):
    """The chance that a positive row has a higher value than another row; equal values count half. nan where
    one kind is missing. values (n,), positive (n,) bool."""
    others, own = values[~positive].sort().values, values[positive]
    ranks = torch.searchsorted(others, own) + torch.searchsorted(others, own, right=True)
    return (ranks.double().mean() / 2 / len(others)).item() if len(others) else math.nan


def expected_calibration_error(probabilities, labels, bins=15):
    """Mean |confidence - accuracy| over equal-width bins of the largest probability (Guo et al. 2017)."""
    confidence, predicted = probabilities.max(-1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    error = (confidence - (predicted == labels).float()).double()
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, error)
    return (gap.abs().sum() / len(labels)).item()


def calibration_error_by_chance(probabilities, draws=100):
    """The mean error that probabilities (n, 3) show where they are right: labels are drawn from them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(probabilities, draws, replacement=True, generator=generator)  # (n, draws)
    return sum(expected_calibration_error(probabilities, drawn) for drawn in labels.T) / draws


def fit_temperature(logits, labels):
    """The T that minimises the NLL of softmax(logits / T) (Guo et al. 2017), with log T ~ normal(0, 0.5) as
    prior: a few rows that happen to be all right or all wrong must not send T to 0 or infinity; with hundreds
    of rows it does not matter."""
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        nll = F.cross_entropy(logits.double() / log_t.exp(), labels)
        loss = nll + (log_t / 0.5).square() / (2 * len(labels))
        loss.backward()
        return loss
    optimizer.step(closure)
    return log_t.exp().item()
