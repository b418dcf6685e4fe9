"""Fine-tune a BERT encoder to give p(non-critical), p(neutral), p(critical); calibrate it; annotate tables.

    python train_classifier.py                                      # embedded sample, small model, offline
    python train_classifier.py --ckpt arabertv02 --data posts.xlsx --folds 5 --out runs/severity
    python train_classifier.py --ckpt runs/severity --annotate maqa.xlsx --to maqa_severity.jsonl
"""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from sevloss import (
    InputError,
    check_positive,
    checkpoint,
    data,
    device,
    distributed,
    interpreting,
    lock,
    report_errors,
)
from sevloss.classifier import annotate, baseline, report
from sevloss.inputs import tables
from sevloss.models import load_model, load_tokenizer, save_model
from sevloss.models.tiny import tiny_bert
from sevloss.optimizer import adamw, set_learning_rate
from sevloss.severity import CLASSES, confusion_matrix, fit_temperature, scores

# --- configuration ------------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add("--ckpt", default="tiny", help="BERT checkpoint or a run of this script; default: tiny, from scratch")
    add("--data", help="labelled table: .jsonl, .csv, .tsv or .xlsx (default: the embedded sample)")
    add("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post")
    add("--preprocess", choices=("auto", "arabert", "none"), default="auto", help="auto: as in pre-training")
    add("--max-length", type=int, default=256, help="most tokens of a complaint")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=10, help="at most; the epoch with the lowest validation NLL is kept")
    add("--patience", type=int, default=3, help="stop after this many epochs without a lower validation NLL")
    add("--lr", type=float, help="peak learning rate; default 3e-5; tiny: 1e-3")
    add("--batch-size", type=int, default=32)
    add("--weight-decay", type=float, default=0.01)
    add("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    add("--class-balanced", action="store_true", help="every class counts the same in the loss, however rare")
    add("--seed", type=int, nargs="+", default=[0], help="several: a model each; the best is kept")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *device.DTYPES), default="auto", help="of products; parameters stay fp32")
    add("--deterministic", action="store_true", help="only operations that give the same bits every time")
    add = parser.add_argument_group("run and annotation").add_argument
    add("--out", metavar="RUN", help="run folder; default runs/classifier-001 and so on")
    add("--folds", type=int, default=0, metavar="K", help="also train K models for out-of-fold probabilities")
    add("--annotate", metavar="TABLE", help="add severity and probabilities to this table ...")
    add("--to", metavar="FILE", help="... and write it here: .jsonl, .csv or .tsv")
    args = parser.parse_args()
    if args.lr is None:
        args.lr = 1e-3 if args.ckpt == "tiny" else 3e-5
    check_positive(args, "max_length", "epochs", "lr", "batch_size",
                   or_zero=("patience", "weight_decay", "label_smoothing", "seed", "folds"))
    tables.check_files(args.data, args.annotate)
    if bool(args.annotate) != bool(args.to):
        raise InputError("--annotate TABLE and --to FILE belong together")
    if args.folds == 1:
        raise InputError("--folds takes 2 or more")
    if args.max_length < 8 or args.label_smoothing >= 1:
        raise InputError("--max-length must be at least 8, --label-smoothing less than 1")
    return args


# --- model and data -----------------------------------------------------------------------------------------

def make_model(args, complaints, seed):
    """(model with a head for the classes, tokenizer). tiny: new, its vocabulary made of the complaints."""
    device.seed_everything(seed)
    if args.ckpt == "tiny":
        preprocess = data.choose_preprocess(args.preprocess, args.ckpt, {})
        model, tokenizer = tiny_bert([data.prepare(c, preprocess) for c in complaints], num_labels=3)
    else:
        model = load_model(args.ckpt, num_labels=3)
        tokenizer = load_tokenizer(args.ckpt)
        preprocess = data.choose_preprocess(args.preprocess, args.ckpt, model.raw_config)
    if not hasattr(model, "classify"):
        raise InputError(f"{args.ckpt} is a language model, not an encoder such as BERT")
    model.raw_config["id2label"] = {str(i): name for i, name in enumerate(CLASSES)}
    model.raw_config["label2id"] = {name: i for i, name in enumerate(CLASSES)}
    model.raw_config["sevloss"] = {"preprocess": preprocess}
    return model, tokenizer


def soft_targets(pairs):
    """Distinct complaints and targets (n, 3): where one has several labels, the labels' shares."""
    complaints = {}
    counts = defaultdict(lambda: [0, 0, 0])
    for pair in pairs:
        name = data.complaint_id(pair.complaint)
        complaints.setdefault(name, pair.complaint)
        counts[name][pair.severity] += 1
    targets = torch.tensor([counts[name] for name in complaints], dtype=torch.float32)
    return list(complaints.values()), targets / targets.sum(-1, keepdim=True)


def labels_of(pairs):
    """(n,) indices into CLASSES"""
    return torch.tensor([pair.severity for pair in pairs])


def encode(args, model, tokenizer, complaints):
    """(id lists, how many were cut)"""
    return data.encode_and_cut(tokenizer, complaints, min(args.max_length, model.config.context),
                               model.raw_config["sevloss"]["preprocess"])


# --- training -----------------------------------------------------------------------------------------------

@dataclass
class Fitted:
    model: nn.Module  # of the epoch with the lowest validation NLL
    tokenizer: Tokenizer
    logits: torch.Tensor  # (n, 3) of the validation rows
    temperature: float  # fitted on them


def fit(args, compute, train, validation, seed, *, name, log=None):
    """Trains on the pairs `train` and keeps the epoch with the lowest NLL on the pairs `validation`: Fitted.

    name: of the progress bar; log: a file that gets a line of JSON per optimizer step.
    """
    # ---- model and data
    complaints, targets = soft_targets(train)
    model, tokenizer = make_model(args, complaints, seed)
    model.to(compute.device)
    train_ids, train_cut = encode(args, model, tokenizer, complaints)
    validation_ids, validation_cut = encode(args, model, tokenizer, [pair.complaint for pair in validation])
    validation_labels = labels_of(validation)
    train_lengths = np.array([len(ids) for ids in train_ids])
    if train_cut + validation_cut:
        print(f"  {train_cut + validation_cut:,} of {len(train_ids) + len(validation_ids):,} complaints "
              f"were cut to fit {min(args.max_length, model.config.context)} tokens")
    class_weights = None
    if args.class_balanced:
        class_weights = (targets.mean(0).clamp(min=1e-6).reciprocal() / 3).to(compute.device)

    # ---- optimizer
    optimizer = adamw(model, args.lr, args.weight_decay)
    scaler = compute.grad_scaler()
    steps_per_epoch = math.ceil(len(train_ids) / args.batch_size)
    steps = args.epochs * steps_per_epoch
    best_nll = math.inf
    best_epoch = 0
    step = 0
    updates = 0
    bar = tqdm(total=steps, unit="step", desc=name, mininterval=1)

    # ---- the loop: an optimizer step a turn
    for epoch in range(args.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train_ids))
        for position in range(0, len(order), args.batch_size):
            began = time.perf_counter()
            model.train()

            # learning rate: it rises for half an epoch
            lr = set_learning_rate(optimizer, args.lr, updates, steps, steps_per_epoch // 2)

            # forward and backward of this rank's share; one without rows takes a row that counts for nothing
            indices = order[position:position + args.batch_size]
            own = distributed.share(train_lengths, indices)[distributed.rank()]
            rows = sorted(own or indices[:1], key=lambda i: train_lengths[i])
            tokens, lengths = data.pack([train_ids[i] for i in rows], compute.device)
            shares = device.to_device(targets[rows], compute.device)  # (B, 3)
            with compute.autocast():
                logits = model.classify(tokens, lengths)  # (B, 3)
                nll = F.cross_entropy(logits.float(), shares, reduction="none",
                                      label_smoothing=args.label_smoothing)  # (B,)
                if class_weights is not None:  # of the rows: cross_entropy's would weigh what smoothing adds
                    nll = nll * (shares * class_weights).sum(-1)
                loss = nll.sum() / len(indices)
            if not own:
                loss = 0 * loss
            scaler.scale(loss).backward()
            distributed.add_up_gradients(list(model.parameters()))
            loss = distributed.add_up(loss.detach())

            # clip, check, step; fp16 skips the step where the scaled gradients overflowed
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step_loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
            finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
            skipped = scaler.is_enabled() and math.isfinite(step_loss) and not finite
            if not finite and not skipped:
                raise InputError(f"loss {step_loss}, gradient norm {grad_norm} at step {step + 1}: lower "
                                 "--lr, or use --dtype fp32")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            updates += finite

            # metrics
            bar.set_postfix_str(f"loss {step_loss:.3f}", refresh=False)
            bar.update()
            if log:
                checkpoint.append(log, json.dumps({
                    "seed": seed, "step": step, "loss": step_loss, "lr": lr,
                    "grad_norm": grad_norm if finite else None,
                    "examples": len(indices), "tokens": int(train_lengths[indices].sum()),
                    "seconds": round(time.perf_counter() - began, 4)}) + "\n")

        # validation: keep the best epoch, and stop where none was better for a while
        logits = annotate.class_logits(model, validation_ids, compute)
        nll = F.cross_entropy(logits, validation_labels).item()
        if nll < best_nll:
            best_nll = nll
            best_epoch = epoch
            best_logits = logits
            best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        elif epoch - best_epoch >= args.patience:
            break
    bar.close()
    if not updates or best_nll == math.inf:
        raise InputError("fp16 skipped all steps, or the validation loss was never finite: lower --lr, or "
                         "use --dtype fp32")

    # ---- the best epoch, calibrated
    model.load_state_dict(best_state)
    temperature = fit_temperature(best_logits, validation_labels)
    print(f"{name}: best epoch {best_epoch + 1} of {epoch + 1}, validation NLL {best_nll:.4f}, temperature "
          f"{temperature:.3f}")
    return Fitted(model.eval(), tokenizer, best_logits, temperature)


def baselines(train, validation, scored):
    """{name: logits on `scored`} of the majority class and of a linear model, calibrated on `validation`."""
    complaints, targets = soft_targets(train)
    texts = [[pair.complaint for pair in pairs] for pairs in (validation, scored)]
    validation_logits, logits = baseline.linear_logits(complaints, targets, texts)
    temperature = fit_temperature(validation_logits, labels_of(validation))
    return {"majority class": baseline.majority_logits(targets, len(scored)), "linear on n-grams": logits,
            "linear on n-grams, calibrated": logits / temperature}


# --- out of fold --------------------------------------------------------------------------------------------

def make_folds(pairs, count):
    """A list of (train, validation, scored), by complaint, so that none stands on two sides."""
    folds = []
    for fold in range(count):
        train = []
        validation = []
        scored = []
        for pair in pairs:
            if data.fold_of(pair.complaint, count) == fold:
                scored.append(pair)
            elif data.hash_fraction(pair.complaint, "inner") < 0.125:
                validation.append(pair)
            else:
                train.append(pair)
        if not (scored and train and validation):
            raise InputError(f"--folds {count} leaves a fold of {len(pairs)} rows empty: use fewer")
        folds.append((train, validation, scored))
    return folds


def out_of_fold(args, compute, folds):
    """The pairs in the order of the folds, and {name: logits} of models that have not seen them, baselines
    too."""
    ordered = []
    parts = defaultdict(list)
    for fold, (train, validation, scored) in enumerate(folds, 1):
        name = f"fold {fold}/{len(folds)}"
        fitted = fit(args, compute, train, validation, args.seed[0], name=name)
        ids, _ = encode(args, fitted.model, fitted.tokenizer, [pair.complaint for pair in scored])
        logits = annotate.class_logits(fitted.model, ids, compute)
        parts[args.ckpt].append(logits)
        parts[f"{args.ckpt}, calibrated"].append(logits / fitted.temperature)
        for baseline_name, baseline_logits in baselines(train, validation, scored).items():
            parts[baseline_name].append(baseline_logits)
        ordered += scored
    return ordered, {name: torch.cat(logits) for name, logits in parts.items()}


# --- the script ---------------------------------------------------------------------------------------------

@report_errors
def main():
    args = parse_arguments()
    args.device = distributed.start(args.device)
    annotate_only = args.annotate and not args.data
    if args.annotate:  # what would fail should fail before hours of training
        columns = tables.parse_columns(args.columns)
        if not annotate_only and not Path(args.annotate).samefile(args.data):
            columns = {}  # they are those of the other table
        source, header, _ = tables.read_rows(args.annotate, ("complaint",), columns)
        tables.find_columns(source, header, columns, ("complaint",))
        with lock(f"{args.to}.lock"):  # a lock that a killed process left goes with it
            annotate.check_target(args.to)
    compute = device.choose(args.device, args.dtype, small=args.ckpt == "tiny",
                            deterministic=args.deterministic)
    print(compute)
    run = Path(args.ckpt)
    if not annotate_only:
        with checkpoint.open_run(args.out, "classifier") as run:
            train_and_save(args, compute, run)
        distributed.wait_for_all()  # until rank 0 has written it
    if args.annotate:
        annotate.annotate_table(annotate.Classifier(run, compute), args.annotate, args.to, columns)


def train_and_save(args, compute, run):
    """Trains, scores, and writes the run folder."""
    # ---- data
    table = args.data or tables.SAMPLE
    pairs = tables.read_pairs(table, needed=("complaint", "severity"),
                              columns=tables.parse_columns(args.columns))
    sides = data.split_pairs(pairs)
    train = sides["train"]
    validation = sides["validation"]
    print(f"{len(train):,} rows to train on, {len(validation):,} to validate on, {len(sides['test']):,} "
          "kept for evaluate.py")
    conflicts = int((soft_targets(pairs)[1].max(-1).values < 1).sum())
    if conflicts:
        print(f"  {conflicts:,} complaints occur with different labels; their shares are the target")
    if not train or not validation:
        raise InputError(f"{table} has too few complaints to train and validate on")

    # ---- what would fail should fail before anything is written
    known = {data.complaint_id(pair.complaint) for pair in train + validation}
    trained_on = set()
    if checkpoint.read_run_json(args.ckpt).get("script") == "train_classifier.py":
        _, result = annotate.read_run(args.ckpt)
        with interpreting(f"classifier.json of {args.ckpt}", "train it again"):
            trained_on = set(result["trained_on"])
    if args.folds and trained_on & known:
        raise InputError(f"{args.ckpt} was trained on these complaints: --folds would score what it has "
                         "seen; use another --ckpt")
    folds = make_folds(train + validation, args.folds)
    checkpoint.check_layout(args.ckpt)
    model, _ = make_model(args, [pair.complaint for pair in train], args.seed[0])
    preprocess = model.raw_config["sevloss"]["preprocess"]
    print(f"{args.ckpt}: preprocessing {preprocess}")
    checkpoint.write_run_json(
        run, "train_classifier.py", vars(args), preprocess=preprocess, max_length=args.max_length,
        compute=str(compute), data_fingerprint=str(data.Fingerprint(pairs)))

    # ---- one model a seed; the best on validation stays
    best = None
    best_nll = math.inf
    scores_by_seed = {}
    log = run / "metrics.jsonl"
    checkpoint.keep_lines(log, 0)
    for seed in args.seed:
        fitted = fit(args, compute, train, validation, seed, name=f"seed {seed}", log=log)
        scores_by_seed[seed] = scores(fitted.logits / fitted.temperature, labels_of(validation))
        if scores_by_seed[seed]["nll"] < best_nll:
            best = fitted
            best_nll = scores_by_seed[seed]["nll"]
    save_model(best.model, best.tokenizer, run)
    if len(args.seed) > 1:
        print_seeds(scores_by_seed)

    # ---- scores: out of fold where asked for, else on the validation rows that also chose the epoch and
    # temperature
    if args.folds:
        scored, logits = out_of_fold(args, compute, folds)
        out_of_fold_ids = [data.complaint_id(pair.complaint) for pair in scored]
        basis = (f"{len(scored):,} rows, each scored by a model that has not seen its complaint "
                 f"({args.folds} folds).")
    else:
        scored = validation
        out_of_fold_ids = []
        logits = {args.ckpt: best.logits, f"{args.ckpt}, calibrated": best.logits / best.temperature}
        logits |= baselines(train, validation, validation)
        basis = (f"{len(scored):,} validation rows, which also chose the epoch and the temperature: --folds "
                 "5 gives honest figures.")
    labels = labels_of(scored)
    probabilities = logits[f"{args.ckpt}, calibrated"].softmax(-1)

    # ---- the run folder: classifier.json makes it complete
    report.write_classifier_report(run, scored, logits, encoder=args.ckpt, basis=basis)
    checkpoint.write_json(run / "classifier.json", {
        "temperature": best.temperature, "scores": {name: scores(z, labels) for name, z in logits.items()},
        "seeds": {str(seed): seed_scores for seed, seed_scores in scores_by_seed.items()},
        "out_of_fold": dict(zip(out_of_fold_ids, probabilities.tolist())),
        "trained_on": sorted(trained_on | known), "split_rule": data.SPLIT_RULE})
    print(f"\n{basis}\n")
    print_table(["model", *report.SCORE_NAMES.values()], report.score_rows(logits, labels))
    confusion = confusion_matrix(probabilities.argmax(-1), labels).tolist()
    for warning in report.warnings(probabilities, labels):
        print(f"  warning: {warning}")
    print("\nconfusion (rows: true class, columns: predicted)")
    print_table(["", *CLASSES], [[name, *row] for name, row in zip(CLASSES, confusion)])
    print(f"\nwrote {run} (model, report.html); {compute.peak_memory()}")
    print(f"next: python finetune.py --classifier {run}")


def print_table(header, rows):
    print(tabulate(rows, header, disable_numparse=True, stralign="right", colalign=("left",)))


def print_seeds(scores_by_seed):
    """Mean and standard deviation of each score over the seeds."""
    parts = []
    for key in ("accuracy", "macro_f1", "auc", "nll", "brier"):
        values = torch.tensor([seed_scores[key] for seed_scores in scores_by_seed.values()])
        parts.append(f"{report.SCORE_NAMES[key]} {values.mean():.4f} (sd {values.std():.4f})")
    print(f"{len(scores_by_seed)} seeds, calibrated, on validation: {', '.join(parts)}")


if __name__ == "__main__":
    main()
    distributed.end()
