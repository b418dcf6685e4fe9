"""The report of train_classifier.py: report.html with its pictures."""

from collections import defaultdict

import torch
from matplotlib.figure import Figure

from sevloss import severity
from sevloss.loss import severity_weights
from sevloss.page import Table, picture, write_page
from sevloss.severity import CLASSES
from sevloss.terminal import histogram

SCORE_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "nll": "NLL (nats)", "brier": "Brier score",
               "ece": "calibration error"}


def score_rows(logits, labels):
    """A table row per entry of `logits` ({name: (n, 3)}): name and the scores."""
    rows = []
    for name, of_model in logits.items():
        scores = severity.scores(of_model, labels)
        rows.append([name, *(f"{scores[score]:.4f}" for score in SCORE_NAMES)])
    return rows


def write_classifier_report(run, pairs, logits, *, encoder, basis):
    """report.html, confusion.png and reliability.png in `run`. pairs: the scored rows; logits: {name: (n,
    3)}, of which "<encoder>" is as trained and "<encoder>, calibrated" final. basis: a sentence on where the
    rows come from."""
    labels = torch.tensor([pair.severity for pair in pairs])
    as_trained = logits[encoder].softmax(-1)
    calibrated = logits[f"{encoder}, calibrated"].softmax(-1)
    predicted = calibrated.argmax(-1)
    confusion = severity.confusion_matrix(predicted, labels)
    reliability = draw_reliability({"as trained": as_trained, "calibrated": calibrated}, labels)
    write_page(
        run / "report.html", "classifier/report.html",
        basis=basis,
        scores=Table(["model", *SCORE_NAMES.values()], score_rows(logits, labels)),
        by_class=class_table(confusion),
        confusion=picture(draw_confusion(confusion), "confusion matrix", run / "confusion.png"),
        reliability=picture(reliability, "reliability by class", run / "reliability.png"),
        by_specialty=specialty_table(pairs, predicted == labels),
        mistakes=confident_mistakes(pairs, calibrated, labels),
        weightings=weightings_text(calibrated),
    )


def class_table(confusion):
    """confusion: (3, 3), rows are true classes."""
    precision = confusion.diag() / confusion.sum(0).clamp(min=1)
    recall = confusion.diag() / confusion.sum(1).clamp(min=1)
    rows = []
    for i, name in enumerate(CLASSES):
        counts = confusion[i].tolist()
        rows.append([name, sum(counts), f"{precision[i]:.3f}", f"{recall[i]:.3f}", *counts])
    header = ["true class", "rows", "precision", "recall", *(f"predicted {name}" for name in CLASSES)]
    return Table(header, rows)


def specialty_table(pairs, right):
    """right: (n,) whether the predicted class is the label."""
    specialties = defaultdict(list)
    for pair, hit in zip(pairs, right.tolist()):
        specialties[pair.specialty or "(none)"].append(hit)
    rows = [[name, len(hits), f"{sum(hits) / len(hits):.3f}"] for name, hits in specialties.items()]
    return Table(["specialty", "rows", "accuracy"], sorted(rows, key=lambda row: -row[1]))


def confident_mistakes(pairs, probabilities, labels, most=10):
    """[(pair, label, predicted class, its probability), ...], the most confident first. probabilities: (n,
    3), labels: (n,)."""
    confidence, predicted = probabilities.max(-1)
    wrong = (predicted != labels).nonzero().squeeze(1).tolist()
    wrong.sort(key=lambda i: -confidence[i])
    return [(pairs[i], CLASSES[labels[i]], CLASSES[predicted[i]], confidence[i].item()) for i in wrong[:most]]


def weightings_text(probabilities):
    """What each weighting makes of the probabilities (n, 3): mean, spread and histogram of the weights."""
    lines = []
    for name, coefficients in severity.WEIGHTINGS.items():
        w = severity_weights(probabilities, coefficients)
        sd = w.std(correction=0)
        lines.append(f"{name}: mean {w.mean():.3f}, sd {sd:.3f}, from {w.min():.3f} to {w.max():.3f}")
        if len(set(coefficients)) > 1:
            lines.append(histogram(w.tolist(), min(coefficients), max(coefficients)))
    return "\n".join(lines)


def draw_confusion(confusion):
    """Counts, and their share of the true class."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i in range(3):
        for j in range(3):
            colour = "white" if shares[i, j] > 0.5 else "black"
            text = f"{confusion[i, j]:,}\n{shares[i, j]:.0%}"
            axes.text(j, i, text, ha="center", va="center", color=colour)
    axes.set(xticks=range(3), yticks=range(3), xticklabels=CLASSES, yticklabels=CLASSES)
    axes.set(xlabel="predicted", ylabel="true class")
    return figure


def draw_reliability(probabilities, labels, bins=10):
    """A panel per class: predicted probability against the share of rows that are of the class; the number of
    rows below. probabilities: {name: (n, 3)}."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, height_ratios=(3, 1))
    edges = torch.linspace(0, 1, bins + 1)
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
            bottom.stairs(count, edges, label=label)
        top.set(title=name, xlim=(0, 1), ylim=(0, 1), ylabel="share that is " + name)
        bottom.set(xlabel="predicted probability", ylabel="rows")
    panels[0, 0].legend()
    return figure
