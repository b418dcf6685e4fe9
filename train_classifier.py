"""Fine-tune a BERT encoder to give p(non-critical), p(neutral), p(critical) of a complaint; calibrate it; annotate tables.

    python train_classifier.py                                                   # embedded sample, small model, offline
    python train_classifier.py --ckpt arabertv02 --data posts.xlsx --folds 5 --out runs/severity
    python train_classifier.py --ckpt runs/severity --annotate maqa.xlsx --to maqa_severity.jsonl
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sevloss import InputError, check_positive, checkpoint, data, device, report_errors, terminal
from sevloss.classifier import annotate, baseline, report
from sevloss.data import Fingerprint, complaint_id, file_fingerprint, hash_fraction, split_pairs
from sevloss.inputs import hub, tables
from sevloss.models import load_model, load_tokenizer, save_model
from sevloss.models.tiny import tiny_bert
from sevloss.severity import CLASSES, confusion_matrix, fit_temperature, scores


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model and data")
    group.add_argument("--ckpt", default="tiny", help="BERT checkpoint or a run of this script; tiny: small, from scratch (default)")
    group.add_argument("--data", help="labelled table: .jsonl, .csv, .tsv or .xlsx (default: the embedded sample)")
    group.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post severity=Severity")
    group.add_argument("--preprocess", choices=("auto", "arabert", "none"), default="auto", help="auto: as the checkpoint was trained")
    group.add_argument("--max-length", type=int, default=256, help="most tokens of a complaint")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=10, help="at most; the epoch with the lowest validation NLL is kept")
    group.add_argument("--patience", type=int, default=3, help="stop after this many epochs without a lower validation NLL")
    group.add_argument("--lr", type=float, help="peak learning rate; default 3e-5; tiny: 1e-3")
    group.add_argument("--batch-size", type=int, default=32)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    group.add_argument("--class-balanced", action="store_true", help="every class counts the same in the loss, however rare")
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="several: one model each; the best on validation is kept")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", choices=("auto", *device.DTYPES), default="auto", help="of the matrix products; parameters stay fp32")
    group = parser.add_argument_group("run and annotation")
    group.add_argument("--out", metavar="RUN", help="run folder; default runs/classifier-001 and so on")
    group.add_argument("--folds", type=int, default=0, metavar="K", help="also train K models for out-of-fold probabilities")
    group.add_argument("--annotate", metavar="TABLE", help="add severity and probabilities to this table ...")
    group.add_argument("--to", metavar="FILE", help="... and write it here: .jsonl, .csv or .tsv")
    args = parser.parse_args()
    if bool(args.annotate) != bool(args.to):
        raise InputError("--annotate TABLE and --to FILE belong together")
    if args.folds == 1 or args.folds < 0:
        raise InputError("--folds takes 2 or more")
    if min(args.seed) < 0:
        raise InputError(f"--seed must be at least 0, not {min(args.seed)}")
    args.lr = args.lr if args.lr is not None else 1e-3 if args.ckpt == "tiny" else 3e-5
    check_positive(args, "max_length", "epochs", "lr", "batch_size", or_zero=("patience", "weight_decay", "label_smoothing"))
    if args.max_length < 8 or args.label_smoothing >= 1:
        raise InputError("--max-length must be at least 8, --label-smoothing less than 1")
    return args


def start(args, texts, seed):
    """A fresh model with a 3-class head, and its tokenizer. tiny: with a vocabulary trained on `texts`."""
    device.seed_everything(seed)
    if args.ckpt == "tiny":
        model, tokenizer = tiny_bert(texts, num_labels=3)
    else:
        model, tokenizer = load_model(args.ckpt, num_labels=3), load_tokenizer(args.ckpt)
    if not hasattr(model, "classify"):
        raise InputError(f"{args.ckpt} is a language model, not an encoder such as BERT")
    model.raw_config |= {"id2label": {str(i): name for i, name in enumerate(CLASSES)},
                         "label2id": {name: i for i, name in enumerate(CLASSES)}}
    return model, tokenizer


def soft_targets(pairs):
    """Complaints without repetition and their targets (n, 3): where the same complaint has several labels, their shares."""
    counts, texts = defaultdict(lambda: [0, 0, 0]), {}
    for pair in pairs:
        counts[complaint_id(pair.complaint)][pair.severity] += 1
        texts.setdefault(complaint_id(pair.complaint), pair.complaint)
    targets = torch.tensor([counts[name] for name in texts], dtype=torch.float32)
    return list(texts.values()), targets / targets.sum(-1, keepdim=True)


def fit(args, compute, train, validation, preprocess, seed, *, label, log=None):
    """Trains on `train`, keeps the epoch with the lowest NLL on `validation`: (model, tokenizer, validation logits, temperature)."""
    complaints, targets = soft_targets(train)
    model, tokenizer = start(args, [data.prepare(c, preprocess) for c in complaints], seed)
    model.to(compute.device)
    max_length = min(args.max_length, model.config.context)
    encode = dict(preprocess=preprocess, max_length=max_length)
    ids, cut = annotate.encode_complaints(tokenizer, complaints, **encode)
    held_out, cut_held_out = annotate.encode_complaints(tokenizer, [p.complaint for p in validation], **encode)
    if cut + cut_held_out:
        print(f"  {cut + cut_held_out:,} of {len(ids) + len(held_out):,} complaints were cut to fit {max_length} tokens")
    labels = torch.tensor([p.severity for p in validation])
    class_weights = targets.mean(0).clamp(min=1e-6).reciprocal() / 3 if args.class_balanced else torch.ones(3)
    class_weights = class_weights.to(compute.device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(ids) / args.batch_size)
    steps, rise = args.epochs * steps_per_epoch, max(1, steps_per_epoch // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise)))
    scaler = compute.grad_scaler()
    best, best_epoch, kept = math.inf, 0, None
    bar = tqdm(total=steps, unit="step", desc=label, mininterval=1)
    for epoch in range(args.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(ids))
        for position in range(0, len(order), args.batch_size):
            model.train()
            began = time.perf_counter()
            chosen = sorted(order[position:position + args.batch_size], key=lambda i: len(ids[i]))
            tokens, lengths = data.pack([ids[i] for i in chosen], compute.device)
            with compute.autocast():
                logits = model.classify(tokens, lengths)  # (B, 3)
            shares = device.to_device(targets[chosen], compute.device)  # (B, 3)
            loss = F.cross_entropy(logits.float(), shares, weight=class_weights, label_smoothing=args.label_smoothing)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lr = schedule.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            value, grad_norm = torch.stack([loss.detach(), grad_norm]).tolist()
            bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
            bar.update()
            if log:
                step = epoch * steps_per_epoch + position // args.batch_size + 1
                log.write(json.dumps({"seed": seed, "step": step, "loss": value, "lr": lr, "grad_norm": grad_norm, "examples": len(chosen),
                                      "tokens": len(tokens), "seconds": round(time.perf_counter() - began, 4)}) + "\n")
        logits = annotate.class_logits(model, held_out, compute)
        nll = F.cross_entropy(logits, labels).item()
        if nll < best:
            best, best_epoch = nll, epoch
            kept = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}, logits
        elif epoch - best_epoch >= args.patience:
            break
    bar.close()
    if kept is None:
        raise InputError("the validation loss was never finite: lower --lr")
    model.load_state_dict(kept[0])
    temperature = fit_temperature(kept[1], labels)
    print(f"{label}: best epoch {best_epoch + 1} of {epoch + 1}, validation NLL {best:.4f}, temperature {temperature:.3f}")
    return model.eval(), tokenizer, kept[1], temperature


def predict(args, compute, model, tokenizer, pairs, preprocess):
    """(n, 3) logits of the pairs' complaints."""
    ids, _ = annotate.encode_complaints(tokenizer, [p.complaint for p in pairs], preprocess=preprocess,
                                        max_length=min(args.max_length, model.config.context))
    return annotate.class_logits(model, ids, compute)


def baselines(train, validation, scored):
    """{name: logits on `scored`} of the majority class and of a linear model, calibrated on `validation` as the encoder is."""
    complaints, targets = soft_targets(train)
    held_out, linear = baseline.linear_logits(complaints, targets, [[p.complaint for p in pairs] for pairs in (validation, scored)])
    temperature = fit_temperature(held_out, torch.tensor([p.severity for p in validation]))
    return {"majority class": baseline.majority_logits(targets, len(scored)), "linear on n-grams": linear,
            "linear on n-grams, calibrated": linear / temperature}


def make_folds(pairs, folds):
    """A list of (train, validation, scored), by complaint, so that none stands on two sides."""
    parts = []
    for fold in range(folds):
        scored = [p for p in pairs if int(hash_fraction(p.complaint, "fold") * folds) == fold]
        others = [p for p in pairs if int(hash_fraction(p.complaint, "fold") * folds) != fold]
        validation = [p for p in others if hash_fraction(p.complaint, "inner") < 0.125]
        train = [p for p in others if hash_fraction(p.complaint, "inner") >= 0.125]
        if not (scored and train and validation):
            raise InputError(f"--folds {folds} leaves a fold of {len(pairs)} rows empty: use fewer")
        parts.append((train, validation, scored))
    return parts


def out_of_fold(args, compute, pairs, preprocess):
    """`pairs` in the order of their folds, and {name: logits} from models that have not seen them, encoder and baselines."""
    ordered, parts = [], defaultdict(list)
    for fold, (train, validation, scored) in enumerate(make_folds(pairs, args.folds)):
        label = f"fold {fold + 1}/{args.folds}"
        model, tokenizer, _, temperature = fit(args, compute, train, validation, preprocess, args.seed[0], label=label)
        logits = predict(args, compute, model, tokenizer, scored, preprocess)
        by_name = {args.ckpt: logits, f"{args.ckpt}, calibrated": logits / temperature} | baselines(train, validation, scored)
        for name, z in by_name.items():
            parts[name].append(z)
        ordered += scored
    return ordered, {name: torch.cat(z) for name, z in parts.items()}


@report_errors
def main():
    args = parse_arguments()
    if args.annotate:  # what would fail should fail before hours of training
        annotate.check_target(args.to)
        file_fingerprint(args.annotate)
    annotate_only = bool(args.annotate) and not args.data
    if annotate_only and not (Path(args.ckpt) / "classifier.json").is_file():
        raise InputError(f"{args.ckpt} is no finished run of this script, so it cannot annotate: give one, or --data to train one first")
    compute = device.choose(args.device, args.dtype, small=args.ckpt == "tiny")
    print(compute)
    run = Path(args.ckpt) if annotate_only else train_and_save(args, compute)
    if args.annotate:
        classifier = annotate.Classifier.load(run, compute)
        annotate.annotate_table(classifier, args.annotate, args.to, tables.parse_columns(args.columns) if annotate_only else {}, compute)


def train_and_save(args, compute):
    run = checkpoint.new_run(args.out, "classifier", False)
    table = args.data or tables.SAMPLE
    pairs = tables.read_pairs(table, needed=("complaint", "severity"), columns=tables.parse_columns(args.columns))
    sides = split_pairs(pairs)
    train, validation = sides["train"], sides["validation"]
    print(f"{len(train):,} rows to train on, {len(validation):,} to validate on, {len(sides['test']):,} kept aside")
    if conflicts := int((soft_targets(pairs)[1].max(-1).values < 1).sum()):
        print(f"  {conflicts:,} complaints occur with different labels; their shares are the target")
    if not train or not validation:
        raise InputError(f"{table} has too few complaints to train and validate on")
    before, known = Path(args.ckpt) / "classifier.json", {complaint_id(p.complaint) for p in train + validation}
    trained_on = set(hub.read_json(before)["trained_on"]) if before.is_file() else set()
    if args.folds:
        make_folds(train + validation, args.folds)  # refuses what cannot be split
        if trained_on & known:
            raise InputError(f"{args.ckpt} was trained on these complaints: --folds would score what it has seen; use another --ckpt")
    start(args, [p.complaint for p in train], args.seed[0])  # refuses a checkpoint that does not fit, before anything is written
    raw = {} if args.ckpt == "tiny" else hub.read_json(hub.local_folder(args.ckpt) / "config.json")
    preprocess = data.choose_preprocess(args.preprocess, args.ckpt, raw)
    print(f"{args.ckpt}: preprocessing {preprocess}")
    checkpoint.write_run_json(run, "train_classifier.py", vars(args), preprocess=preprocess, max_length=args.max_length,
                              compute=str(compute), data_fingerprint=str(Fingerprint(pairs)))

    # One model a seed; the best on validation stays
    labels, best = torch.tensor([p.severity for p in validation]), None
    by_seed = []
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as log:
        for seed in args.seed:
            fitted = fit(args, compute, train, validation, preprocess, seed, label=f"seed {seed}", log=log)
            by_seed.append(scores(fitted[2] / fitted[3], labels))
            if best is None or by_seed[-1]["nll"] < min(s["nll"] for s in by_seed[:-1]):
                best = fitted
    model, tokenizer, logits, temperature = best
    model.raw_config["sevloss"] = {"preprocess": preprocess}
    save_model(model, tokenizer, run)
    if len(args.seed) > 1:
        spread = {k: torch.tensor([s[k] for s in by_seed]) for k in report.SCORE_NAMES}
        print(f"{len(args.seed)} seeds, calibrated, on validation: " + ", ".join(
            f"{report.SCORE_NAMES[k]} {v.mean():.4f} (sd {v.std():.4f})" for k, v in spread.items()))

    # Scores: out of fold where asked for, else on the validation rows that also chose the epoch and the temperature
    if args.folds:
        scored, results = out_of_fold(args, compute, train + validation, preprocess)
        basis = f"{len(scored):,} rows, each scored by a model that has not seen its complaint ({args.folds} folds)."
    else:
        scored, results = validation, {args.ckpt: logits, f"{args.ckpt}, calibrated": logits / temperature}
        results |= baselines(train, validation, validation)
        basis = f"{len(scored):,} validation rows, which also chose the epoch and the temperature: --folds 5 gives honest figures."
    calibrated, labels = results[f"{args.ckpt}, calibrated"], torch.tensor([p.severity for p in scored])
    unseen = dict(zip((complaint_id(p.complaint) for p in scored), calibrated.softmax(-1).tolist())) if args.folds else {}
    checkpoint.write_json(run / "classifier.json", {
        "temperature": temperature, "scores": {name: scores(z, labels) for name, z in results.items()},
        "seeds": dict(zip(map(str, args.seed), by_seed)), "split_rule": data.SPLIT_RULE, "out_of_fold": unseen,
        "trained_on": sorted(trained_on | known)})
    report.write_classifier_report(run, scored, results, encoder=args.ckpt, basis=basis)
    print(f"\n{basis}\n")
    print(terminal.table(["model", *report.SCORE_NAMES.values()], report.score_rows(results, labels)))
    confusion = confusion_matrix(calibrated.argmax(-1), labels).tolist()
    print("\nconfusion (rows: true class, columns: predicted)")
    print(terminal.table(["", *CLASSES], [[name, *row] for name, row in zip(CLASSES, confusion)]))
    print(f"\nwrote {run} (model, report.md with pictures); peak memory {compute.peak_memory() / 2 ** 30:.2f} GiB")
    print(f"next: python finetune.py --classifier {run}")
    return run


if __name__ == "__main__":
    main()
