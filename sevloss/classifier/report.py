"""Reports: Markdown with pictures."""

from collections import defaultdict

import matplotlib
import torch

from sevloss import severity
from sevloss.loss import severity_weights
from sevloss.severity import CLASSES
from sevloss.terminal import histogram

matplotlib.use("Agg")  # files, no window
from matplotlib import pyplot  # noqa: E402

SCORE_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "nll": "NLL (nats)", "brier": "Brier score", "ece": "calibration error"}


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in line) + " |" for line in lines)


def score_rows(logits, labels):
    """A table row per entry of `logits` ({name: (n, 3)}): name and the scores."""
    return [[name, *(f"{severity.scores(z, labels)[k]:.4f}" for k in SCORE_NAMES)] for name, z in logits.items()]


def write_classifier_report(run, pairs, logits, *, encoder, basis):
    """report.md, confusion.png and reliability.png in `run`. pairs: the scored rows; logits: {name: (n, 3)}, of which
    "<encoder>" is as trained and "<encoder>, calibrated" final. basis: a sentence on where the rows come from."""
    labels = torch.tensor([p.severity for p in pairs])
    final = logits[f"{encoder}, calibrated"]
    probabilities = final.softmax(-1)
    confidence, predicted = probabilities.max(-1)
    confusion = severity.confusion_matrix(predicted, labels)
    hits = confusion.diag()
    draw_confusion(run / "confusion.png", confusion)
    draw_reliability(run / "reliability.png", {"as trained": logits[encoder].softmax(-1), "calibrated": probabilities}, labels)

    precision, recall = (hits / confusion.sum(side).clamp(min=1) for side in (0, 1))
    by_class = [[name, int(confusion[i].sum()), f"{precision[i]:.3f}", f"{recall[i]:.3f}", *confusion[i].tolist()]
                for i, name in enumerate(CLASSES)]
    specialties = defaultdict(list)
    for pair, right in zip(pairs, (predicted == labels).tolist()):
        specialties[pair.specialty or "(none)"].append(right)
    by_specialty = [[name, len(r), f"{sum(r) / len(r):.3f}"] for name, r in sorted(specialties.items(), key=lambda item: -len(item[1]))]
    wrong = sorted((i for i in range(len(pairs)) if predicted[i] != labels[i]), key=lambda i: -confidence[i])[:10]
    mistakes = [[pairs[i].row, CLASSES[labels[i]], CLASSES[predicted[i]], f"{confidence[i]:.3f}", pairs[i].complaint[:300]] for i in wrong]
    weightings = []
    for name, coefficients in severity.WEIGHTINGS.items():
        w = severity_weights(probabilities, coefficients)
        weightings.append(f"{name}: mean {w.mean():.3f}, sd {w.std(correction=0):.3f}, from {w.min():.3f} to {w.max():.3f}")
        if len(set(coefficients)) > 1:
            weightings.append(histogram(w.tolist(), min(coefficients), max(coefficients)))
    sections = [
        ("Severity classifier", basis + "\n\n" + markdown_table(["model", *SCORE_NAMES.values()], score_rows(logits, labels))),
        ("By class", markdown_table(["true class", "rows", "precision", "recall", *(f"predicted {c}" for c in CLASSES)], by_class)
         + "\n\n![confusion matrix](confusion.png)"),
        ("Calibration", "Of the rows that get probability p for a class, a share p should be of that class: the diagonal.\n\n"
         "![reliability by class](reliability.png)"),
        ("By specialty", markdown_table(["specialty", "rows", "accuracy"], by_specialty)),
        ("The most confident mistakes", markdown_table(["row", "label", "predicted", "probability", "complaint"], mistakes)),
        ("The weights that these probabilities give", "```\n" + "\n".join(weightings) + "\n```"),
    ]
    text = "\n\n".join(f"{'#' * (1 + bool(i))} {title}\n\n{body}" for i, (title, body) in enumerate(sections))
    (run / "report.md").write_text(text + "\n", encoding="utf-8")


def draw_confusion(path, confusion):
    figure, axes = pyplot.subplots(figsize=(4.6, 4))
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i in range(3):
        for j in range(3):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{confusion[i, j]:,}\n{shares[i, j]:.0%}", ha="center", va="center", color=color)
    axes.set(xticks=range(3), yticks=range(3), xticklabels=CLASSES, yticklabels=CLASSES, xlabel="predicted", ylabel="true class")
    _save(figure, path)


def draw_reliability(path, probabilities, labels, bins=10):
    """A panel per class: predicted probability against the share of rows that are of the class; the number of rows below."""
    figure, panels = pyplot.subplots(2, 3, figsize=(11, 4.8), sharex=True, height_ratios=(3, 1))
    edges = torch.linspace(0, 1, bins + 1)
    for c, name in enumerate(CLASSES):
        top, bottom = panels[:, c]
        top.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
        for label, p in probabilities.items():
            which = (p[:, c] * bins).long().clamp(max=bins - 1)
            count = torch.bincount(which, minlength=bins)
            there = count > 0
            mean = torch.bincount(which, p[:, c], minlength=bins) / count.clamp(min=1)
            share = torch.bincount(which, (labels == c).float(), minlength=bins) / count.clamp(min=1)
            top.plot(mean[there], share[there], marker="o", markersize=4, label=label)
            bottom.stairs(count, edges, label=label)
        top.set(title=name, xlim=(0, 1), ylim=(0, 1), ylabel="share that is " + name)
        bottom.set(xlabel="predicted probability", ylabel="rows")
    panels[0, 0].legend()
    _save(figure, path)


def _save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
