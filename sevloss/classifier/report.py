"""The report of train_classifier.py: report.html with its pictures."""

import math
from collections import defaultdict

import numpy as np
import torch
from matplotlib.figure import Figure

from sevloss import severity
from sevloss.loss import severity_weights
from sevloss.page import Table, picture, write_page
from sevloss.severity import CLASSES

SCORE_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "auc": "AUC of p(critical)",
               "nll": "NLL (nats)", "brier": "Brier score", "ece": "calibration error (by chance)"}
CALIBRATION_ROWS = 200  # of fewer, a calibration error is chance


def score_rows(logits, labels):
    """A table row per entry of `logits` ({name: (n, 3)}): name and the scores, with 95% intervals of accuracy
    and macro-F1, from 2,000 bootstrap samples, and the calibration error that chance alone would show."""
    rows = []
    for name, of_model in logits.items():
        scores = severity.scores(of_model, labels)
        shares = np.array(scores["confusion"]).flatten() / len(labels)
        samples = np.random.default_rng(0).multinomial(len(labels), shares, size=2000).reshape(-1, 3, 3)
        cells = {score: f"{scores[score]:.3f}" for score in SCORE_NAMES}
        for score, values in zip(("accuracy", "macro_f1"), severity.accuracy_and_f1(torch.tensor(samples))):
            low, high = np.quantile(values, (0.025, 0.975))
            cells[score] += f" [{low:.3f}, {high:.3f}]"
        by_chance = severity.calibration_error_by_chance(of_model.softmax(-1))
        cells["ece"] = f"{cells['ece']} ({by_chance:.3f})" if len(labels) >= CALIBRATION_ROWS else "–"
        rows.append([name, *cells.values()])
    return rows


def weight_table(probabilities, labels):
    """What each weighting makes of the probabilities (n, 3), of all rows and of those of each true class."""
    rows = []
    for name, coefficients in severity.WEIGHTINGS.items():
        w = severity_weights(probabilities, coefficients)
        numbers = [w.mean(), w.std(correction=0), w.min(), w.max(), *class_means(w, labels)]
        rows.append([name, *(f"{number:.3f}" for number in numbers)])
    header = ["weighting", "mean", "sd", "least", "most", *(f"mean, true {name}" for name in CLASSES)]
    return Table(header, rows)


def class_means(w, labels):
    """Mean of w (n,) over the rows of each true class; nan of one without rows."""
    return [w[labels == c].mean().item() for c in range(3)]


def warnings(probabilities, labels):
    """Sentences on what keeps the method from acting. probabilities (n, 3), labels (n,)."""
    sentences = []
    counts = severity.confusion_matrix(probabilities.argmax(-1), labels)
    for c, name in enumerate(CLASSES):
        if counts[c].any() and not counts[c, c]:
            sentences.append(f"None of the {counts[c].sum()} {name} rows is predicted {name}.")
    means = class_means(severity_weights(probabilities, severity.WEIGHTINGS["balanced"]), labels)
    others = [mean for mean in means[:2] if not math.isnan(mean)]
    if math.isnan(means[2]) or not others:
        sentences.append("The scored rows are all critical, or none is: the weights cannot be compared.")
    elif means[2] <= max(others):
        weights = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(CLASSES, means))
        sentences.append(f"Critical rows do not get the largest weights (means, balanced: {weights}), so the "
                         "weighted loss would not do what it is for.")
    return sentences


def write_classifier_report(run, pairs, logits, *, encoder, basis):
    """report.html and, of rows enough, reliability.png in `run`. pairs: the n scored rows. logits: {name: (n,
    3)}, among them "<encoder>", as trained, and "<encoder>, calibrated". basis: where the rows come from."""
    labels = torch.tensor([pair.severity for pair in pairs])
    as_trained = logits[encoder].softmax(-1)
    calibrated = logits[f"{encoder}, calibrated"].softmax(-1)
    predicted = calibrated.argmax(-1)
    confusion = severity.confusion_matrix(predicted, labels)
    reliability = None
    if len(labels) >= CALIBRATION_ROWS:
        figure = draw_reliability({"as trained": as_trained, "calibrated": calibrated}, labels)
        reliability = picture(figure, "reliability by class", run / "reliability.png")
    write_page(
        run / "report.html", "classifier/report.html", basis=basis, warnings=warnings(calibrated, labels),
        scores=Table(["model", *SCORE_NAMES.values()], score_rows(logits, labels)),
        by_class=class_table(confusion),
        reliability=reliability, weights=weight_table(calibrated, labels),
        by_specialty=specialty_table(pairs, predicted == labels),
        mistakes=confident_mistakes(pairs, calibrated, labels))


def class_table(confusion):
    """confusion: (3, 3), rows are true classes."""
    precision = confusion.diag() / confusion.sum(0).clamp(min=1)
    recall = confusion.diag() / confusion.sum(1).clamp(min=1)
    rows = [[name, sum(counts), f"{precision[i]:.3f}", f"{recall[i]:.3f}", *counts]
            for i, (name, counts) in enumerate(zip(CLASSES, confusion.tolist()))]
    header = ["true class", "rows", "precision", "recall", *(f"predicted {name}" for name in CLASSES)]
    return Table(header, rows)


def specialty_table(pairs, right):
    """right: (n,) whether the predicted class is the label."""
    specialties = defaultdict(list)
    for pair, hit in zip(pairs, right.tolist()):
        specialties[pair.specialty or "(none)"].append(hit)
    rows = [[name, len(hits), f"{sum(hits) / len(hits):.3f}"] for name, hits in specialties.items()]
    return Table(["specialty", "rows", "accuracy"], sorted(rows, key=lambda row: -row[1]))


def confident_mistakes(pairs, probabilities, labels):
    """Ten at most of (pair, label, predicted class, its probability). probabilities (n, 3), labels (n,)."""
    confidence, predicted = probabilities.max(-1)
    order = confidence.argsort(descending=True, stable=True)
    wrong = order[predicted[order] != labels[order]][:10].tolist()
    return [(pairs[i], CLASSES[labels[i]], CLASSES[predicted[i]], confidence[i].item()) for i in wrong]


def draw_reliability(probabilities, labels, bins=10):
    """By class and bin of the predicted probability: the share of rows that are of the class, and the number
    of rows below. probabilities: {name: (n, 3)}."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, height_ratios=(3, 1))
    for c, name in enumerate(CLASSES):
        top, bottom = panels[:, c]
        top.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
        for label, of_model in probabilities.items():
            p = of_model[:, c]
            which = (p * bins).long().clamp(max=bins - 1)
            count = torch.bincount(which, minlength=bins)
            filled = count > 0
            mean = torch.bincount(which, p, minlength=bins) / count
            share = torch.bincount(which, (labels == c).float(), minlength=bins) / count
            top.plot(mean[filled], share[filled], marker="o", markersize=4, label=label)
            bottom.stairs(count, torch.linspace(0, 1, bins + 1), label=label)
        top.set(title=name, xlim=(0, 1), ylim=(0, 1), ylabel="share that is " + name)
        bottom.set(xlabel="predicted probability", ylabel="rows")
    panels[0, 0].legend()
    return figure
