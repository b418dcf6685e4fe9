r"""Severity probabilities out of fold from what a few thousand labels allow: n-grams and frozen encoders.

    python benchmarks/ensemble.py --data posts.xlsx --to new.jsonl \
        --encoders intfloat/multilingual-e5-small:11

Members: the linear model on character n-grams, and for each encoder (CKPT:BLOCK, any checkpoint of
sevloss.models) a linear model on the mean of the block's output over the tokens. Their logits are added up.
Everything is out of fold: the members are trained on four fifths; the L2 penalty of a member and the
temperature of the sum for a fold are those that fit the other four folds best. All rows get probabilities,
test rows too: for tables that are split anew, as benchmarks/experiment.py does.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from experiment import write_table
from tabulate import tabulate

from sevloss import InputError, data, device, report_errors
from sevloss.classifier import baseline
from sevloss.inputs import hub, tables
from sevloss.models import load_model, load_tokenizer
from sevloss.severity import CLASSES, WEIGHTINGS, fit_temperature, scores

FOLDS = 5
PENALTIES = (1.0, 3.0, 10.0, 30.0)


@torch.no_grad()
def features(ckpt, block, texts, compute, max_length=256):
    """(n, D) fp32: the mean over the tokens of each text of what `block` puts out."""
    model = load_model(ckpt).to(compute.device).eval()
    tokenizer = load_tokenizer(ckpt)
    if not 0 <= block < len(model.blocks):
        raise InputError(f"{ckpt} has blocks 0 to {len(model.blocks) - 1}, not {block}")
    output = []
    model.blocks[block].register_forward_hook(lambda module, inputs, hidden: output.append(hidden))
    ids, _ = data.encode_and_cut(tokenizer, texts, max_length)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    rows = {}
    for start in range(0, len(order), 32):
        part = order[start:start + 32]
        tokens, lengths = data.pack([ids[i] for i in part], compute.device)
        model(tokens, lengths)
        for i, hidden in zip(part, output.pop().split(lengths)):  # each (T, D)
            rows[i] = hidden.mean(0).cpu()
    return torch.stack([rows[i] for i in range(len(texts))])


def linear_logits(x, targets, others, penalty):
    """Logistic regression on standardised features x (n, D), targets (n, 3), with penalty * |W|^2 / 2 beside
    the summed loss; others (m, D) -> (m, 3)."""
    mean = x.mean(0)
    scale = (x.std(0) + 1e-6) * x.shape[1] ** 0.5
    x = (x - mean) / scale
    weight = torch.zeros(x.shape[1], 3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, targets, reduction="sum")
        loss = loss + penalty * weight.square().sum() / 2
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():
        return (others - mean) / scale @ weight + bias


def out_of_fold(fold, predict):
    """(n, 3): predict(train, held_out) of index tensors gives the held-out rows' logits, fold by fold."""
    logits = torch.zeros(len(fold), 3)
    for f in range(FOLDS):
        held_out = (fold == f).nonzero().flatten()
        logits[held_out] = predict((fold != f).nonzero().flatten(), held_out)
    return logits


def ngram_member(texts, labels, fold):
    """(n, 3) logits out of fold."""
    targets = F.one_hot(labels, 3).float()

    def predict(train, held_out):
        logits, = baseline.linear_logits([texts[i] for i in train], targets[train],
                                         [[texts[i] for i in held_out]])
        return logits
    return out_of_fold(fold, predict)


def linear_member(x, labels, fold):
    """(n, 3) logits out of fold from features x (n, D)."""
    targets = F.one_hot(labels, 3).float()
    candidates = []
    for penalty in PENALTIES:
        def predict(train, held_out, penalty=penalty):
            return linear_logits(x[train], targets[train], x[held_out], penalty)
        candidates.append(out_of_fold(fold, predict))
    return choose(candidates, labels, fold)


def choose(candidates, labels, fold):
    """(n, 3): for each fold the candidate's logits (a list of (n, 3)) that fit the other folds best."""
    logits = torch.zeros_like(candidates[0])
    for f in range(FOLDS):
        others = fold != f
        best = min(candidates, key=lambda c: F.cross_entropy(c[others], labels[others]).item())
        logits[fold == f] = best[fold == f]
    return logits


def calibrated(logits, labels, fold):
    """Logits over the temperature that fits the other folds."""
    result = torch.zeros_like(logits)
    for f in range(FOLDS):
        others = fold != f
        result[fold == f] = logits[fold == f] / fit_temperature(logits[others], labels[others])
    return result


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE, help="table with complaints and severity labels")
    parser.add_argument("--encoders", nargs="*", default=[], metavar="CKPT:BLOCK")
    parser.add_argument("--features", default="runs/features", help="folder in which features are kept")
    parser.add_argument("--to", help=".jsonl to write, with the probabilities")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    pairs = tables.read_pairs(args.data, needed=("complaint", "severity"))
    texts = [pair.complaint for pair in pairs]
    labels = torch.tensor([pair.severity for pair in pairs])
    fold = torch.tensor([data.fold_of(text, FOLDS) for text in texts])

    members = {"n-grams": ngram_member(texts, labels, fold)}
    for encoder in args.encoders:
        ckpt, _, block = encoder.rpartition(":")
        made_of = data.digest(texts, hub.full_name(ckpt))
        kept = Path(args.features) / f"{Path(args.data).stem}-{Path(ckpt).name}-{block}-{made_of}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            x = features(ckpt, int(block), texts, device.choose(args.device, "fp32"))
            np.save(kept, x.numpy())
        members[encoder] = linear_member(torch.from_numpy(np.load(kept)), labels, fold)
    members["all of them"] = sum(members.values())

    lines = []
    for name, logits in members.items():
        s = scores(logits, labels)
        together = calibrated(logits, labels, fold)  # the last is that of all of them
        after = F.cross_entropy(together, labels)
        lines.append([name, *(f"{s[key]:.3f}" for key in ("accuracy", "macro_f1", "auc")),
                      f"{s['nll']:.4f}", f"{after:.4f}"])
    header = ["out of fold", "accuracy", "macro-F1", "AUC critical", "NLL", "calibrated"]
    print(tabulate(lines, header, disable_numparse=True, stralign="right", colalign=("left",)))
    probabilities = together.double().softmax(-1)
    for name in ("balanced", "strong"):
        weights = probabilities @ torch.tensor(WEIGHTINGS[name], dtype=torch.float64)
        means = ", ".join(f"{weights[labels == c].mean():.3f} {CLASSES[c]}" for c in range(3))
        print(f"weights of {name}: sd {weights.std():.3f}; mean by true class {means}")
    if args.to:
        write_table(args.to, pairs, probabilities)
        print(f"wrote {args.to}")


if __name__ == "__main__":
    main()
