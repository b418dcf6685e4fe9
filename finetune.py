"""Fine-tune a causal language model with the severity-weighted loss.

    python finetune.py                                              # embedded sample, small model, offline
    python finetune.py --ckpt aragpt2-medium --data maqa.xlsx --classifier runs/classifier-001
"""

import argparse
import json
import math
import time

import numpy as np
import torch
from tqdm import tqdm

from sevloss import InputError, check_positive, checkpoint, data, device, report_errors, terminal, training_data
from sevloss.classifier import annotate
from sevloss.data import file_fingerprint
from sevloss.evaluation import scores
from sevloss.inputs import tables
from sevloss.loss import linear_weighted_token_ce, severity_weights
from sevloss.models import enable_gradient_checkpointing, eos_ids, load_model, load_tokenizer, lora, save_model
from sevloss.models.tiny import tiny_gpt2
from sevloss.severity import parse_weighting
from sevloss.training_rows import TrainingRows

# "paper": what the published notebooks set; the README says what is wrong with it. Arguments that are given go before a recipe's.
RECIPES = {"default": {}, "paper": dict(
    supervise="row", max_length=512, train_rows=20_000, epochs=3.0, batch_size=8, lr=2e-4, warmup=0.0, weight_decay=0.0, clip=1.0,
    lora=16, lora_alpha=32.0, lora_dropout=0.05)}
VALIDATION_ROWS = 1000  # enough to choose the best step by; the test rows are evaluate.py's


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model and data")
    group.add_argument("--ckpt", default="tiny", help="short name, hub id, folder or run; tiny: small, from scratch (default)")
    group.add_argument("--data", default=tables.SAMPLE, help=".jsonl, .csv, .tsv or .xlsx with complaints and responses")
    group.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post response=Plan")
    group.add_argument("--preprocess", choices=("auto", "arabert", "none"), default="auto", help="auto: as the checkpoint was trained")
    group.add_argument("--max-length", type=int, default=512, help="most tokens of prompt and response together")
    group = parser.add_argument_group("method")
    group.add_argument("--weighting", default="balanced", help="none, mild, balanced, strong, or the three coefficients A,B,C")
    group.add_argument("--normalise", choices=("example", "token"), default="example",
                       help="example: the paper's mean over each response, then over examples; token: mean over tokens")
    group.add_argument("--classifier", metavar="RUN", help="run of train_classifier.py that gives the severity probabilities")
    group.add_argument("--supervise", choices=("response", "row"), default="response",
                       help="response: its tokens and EOS; row: the prompt too, and the EOS that fills each row to --max-length")
    group.add_argument("--train-rows", type=int, metavar="N", help="only the first N training rows")
    group.add_argument("--recipe", choices=RECIPES, default="default", help="paper: train as the published notebooks do")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora", type=int, metavar="R", help="freeze the model and train adapters of rank R")
    group.add_argument("--lora-alpha", type=float, help="their scale is alpha / R; default 2 R")
    group.add_argument("--lora-dropout", type=float, default=0.0)
    group.add_argument("--lora-targets", nargs="+", metavar="NAME", help="linear layers that get adapters, e.g. q_proj v_proj")
    group.add_argument("--merge", action="store_true", help="also write the best model with its adapters merged in, to RUN/merged")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=float, help="default 3; tiny: 10")
    group.add_argument("--max-steps", type=int, help="optimizer steps instead of --epochs")
    group.add_argument("--lr", type=float, help="peak learning rate; default 5e-5; tiny: 2e-3")
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the learning rate rises")
    group.add_argument("--batch-size", type=int, default=16, help="examples per optimizer step")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", choices=("auto", *device.DTYPES), default="auto", help="of the matrix products; parameters stay fp32")
    group.add_argument("--micro-tokens", type=int, default=4096, help="most tokens in memory at once; does not change the result")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute blocks twice, to hold the activations of one alone")
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="RUN", help="run folder; default runs/finetune-001 and so on")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="validate and save this often; default once an epoch")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, with the arguments it began with")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    tiny = args.ckpt == "tiny"
    args.epochs = args.epochs if args.epochs is not None else 10 if tiny else 3
    args.lr = args.lr if args.lr is not None else 2e-3 if tiny else 5e-5
    check_positive(args, "epochs", "max_steps", "max_length", "lr", "batch_size", "clip", "micro_tokens", "save_every", "lora",
                   "lora_alpha", "train_rows", or_zero=("warmup", "weight_decay", "seed", "lora_dropout"))
    if args.warmup > 1:
        raise InputError(f"--warmup is a share of the steps, at most 1, not {args.warmup}")
    if tiny and args.lora:
        raise InputError("--lora adapts a checkpoint; --ckpt tiny is made on the spot: train it whole, or name a checkpoint")
    if not args.lora and (args.merge or args.lora_targets):
        raise InputError("--merge and --lora-targets belong to --lora R")
    if args.lora_dropout >= 1:
        raise InputError(f"--lora-dropout must be less than 1, not {args.lora_dropout}")
    return args


def show_weights(weights, coefficients):
    low, high = min(coefficients), max(coefficients)
    print(f"severity weights of the {len(weights):,} training examples: mean {weights.mean():.3f}, sd {weights.std(correction=0):.3f}, "
          f"from {weights.min():.3f} to {weights.max():.3f}")
    if low == high:
        return
    print(terminal.histogram(weights.tolist(), low, high))
    if weights.std(correction=0) < 0.05 * (high - low):
        print("  Nearly all weights are the same: the probabilities hardly tell the classes apart, so the weighting will hardly act.")


def learning_rate(step, steps, warmup):
    """Factor on the peak: linear rise over the warm-up, linear decay to 0 at the end."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


@report_errors
def main():
    args = parse_arguments()
    coefficients = parse_weighting(args.weighting)
    run = checkpoint.new_run(args.out, "finetune", args.resume)
    compute = device.choose(args.device, args.dtype, small=args.ckpt == "tiny")
    print(compute)

    weighted = len(set(coefficients)) > 1
    table, columns = args.data, tables.parse_columns(args.columns)
    if weighted and args.classifier:
        table, columns = annotate.annotated(args.classifier, table, columns, compute), {}
    elif args.classifier:
        print(f"--weighting {args.weighting} treats all alike: {args.classifier} is not asked")
    reading = dict(needed=("complaint", "response", "critical") if weighted else ("complaint", "response"), columns=columns,
                   train_rows=args.train_rows, validation_rows=VALIDATION_ROWS)
    rows = TrainingRows(table, **reading)

    # Model and tokenizer; seeded here, so that runs that differ only in their weights start from the same model
    device.seed_everything(args.seed)
    if args.ckpt == "tiny":
        preprocess = data.choose_preprocess(args.preprocess, args.ckpt, {})
        pairs = list(rows)
        texts = [data.prepare(t, preprocess) for p in pairs for t in (data.PROMPT.format(complaint=p.complaint), p.response)]
        model, tokenizer = tiny_gpt2(texts)
    else:
        file_fingerprint(table)  # refuses a table that is not there, before a large model is loaded
        rows.begin()  # a large table is read while the model is loaded
        # a frozen base in the dtype it is computed in: autocast would cast it anew at every use
        model = load_model(args.ckpt, dtype=compute.dtype if args.lora else torch.float32)
        tokenizer = load_tokenizer(args.ckpt)
        preprocess = data.choose_preprocess(args.preprocess, args.ckpt, model.raw_config)
    if not hasattr(model, "head_weight") or not eos_ids(model):
        raise InputError(f"{args.ckpt} is no causal language model with an end-of-text token: nothing to fine-tune")
    model.raw_config["sevloss"] = {"prompt": data.PROMPT, "preprocess": preprocess}

    if args.lora:
        lora.attach(model, args.lora, alpha=args.lora_alpha or 2 * args.lora, dropout=args.lora_dropout, targets=args.lora_targets)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    model.to(compute.device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    total, learning = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), trainable))
    print(f"{args.ckpt}: {total:,} parameters, {learning:,} of them trainable ({learning / total:.2%}), "
          f"vocabulary {len(model.head_weight):,}, preprocessing {preprocess}")

    # Optimizer; decay on matrices only
    matrices, vectors = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, fused=True)  # one kernel for all parameters; exists for CPU and CUDA

    # Table -> pairs -> splits -> ids
    max_length = min(args.max_length, model.config.context)
    encoding = dict(max_length=max_length, eos_id=eos_ids(model)[0], preprocess=preprocess,
                    encode=data.encode_published if args.supervise == "row" else data.encode_pairs)
    if args.ckpt == "tiny":
        ready = training_data.prepare(rows, pairs, tokenizer, **encoding)
    else:
        ready = training_data.remembered("runs/cache", rows, tokenizer, (reading, encoding | {"encode": args.supervise}),
                                         lambda: training_data.prepare(rows, rows, tokenizer, **encoding))
    examples, held_out = ready.examples, ready.held_out
    print(f"{len(examples):,} pairs to train on, {len(held_out):,} to validate on, {ready.kept:,} kept for evaluate.py")

    # Severity -> one weight per example; with the normalisation folded in it is the weight of each of its tokens
    weights = severity_weights(torch.from_numpy(ready.probabilities), coefficients)
    show_weights(weights, coefficients)
    token_weights = weights.numpy() / (examples.target_counts if args.normalise == "example" else 1)

    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
    save_every = args.save_every or steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, args.warmup))
    scaler = compute.grad_scaler()

    progress = {"step": 0, "best": math.inf, "best_step": 0, "validation": []}
    if args.resume:
        checkpoint.check_resumed(run, "finetune.py", vars(args), ready.fingerprint)
        progress = checkpoint.load_state(run, model, optimizer, scaler, schedule)
        checkpoint.keep_lines(run / "metrics.jsonl", progress["step"])
        print(f"going on after step {progress['step']} of {steps}")
    else:
        checkpoint.write_run_json(run, "finetune.py", vars(args), coefficients=coefficients, preprocess=preprocess, prompt=data.PROMPT,
                                  compute=str(compute), table=str(table), columns=columns, data_fingerprint=ready.fingerprint, steps=steps)
    metrics_file = open(run / "metrics.jsonl", "a", encoding="utf-8")
    bar = tqdm(total=steps, initial=progress["step"], unit="step", mininterval=1)

    def batches_of(step):
        """(examples of the optimizer step, their micro-batches on the way to the device)"""
        epoch, position = divmod(step, steps_per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(examples))
        chosen = order[position * args.batch_size:(position + 1) * args.batch_size]
        parts = data.micro_batches(examples.input_lengths, chosen, args.micro_tokens)
        return chosen, [data.make_batch(examples, part, compute.device, token_weights) for part in parts]

    # The loop
    upcoming = batches_of(progress["step"])
    for step in range(progress["step"], steps):
        model.train()
        began = time.perf_counter()
        chosen, batches = upcoming
        supervised = int(examples.target_counts[chosen].sum())
        denominator = len(chosen) if args.normalise == "example" else supervised  # of the whole step, known before any forward pass

        total = torch.zeros((), device=compute.device)
        with compute.autocast():  # around all micro-batches: inside, a weight is cast to 16 bits once
            for batch in batches:
                hidden = model(batch.tokens, batch.lengths)  # (N, D)
                loss = linear_weighted_token_ce(hidden[batch.supervised_index], model.head_weight, batch.targets, batch.weights,
                                                denominator=denominator, ignore_index=None)
                with torch.autocast(compute.device.type, enabled=False):  # of the forward pass alone
                    scaler.scale(loss).backward()  # gradients add up over micro-batches
                total += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, args.clip)
        lr = schedule.get_last_lr()[0]
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        upcoming = batches_of(step + 1)  # made while the device works: nothing has waited for it yet
        total, grad_norm = torch.stack([total, grad_norm]).tolist()  # the step's one transfer from the device
        if not math.isfinite(total):
            raise InputError(f"the loss is {total} at step {step + 1}: lower --lr, or --resume from the last save with --dtype fp32")
        seconds, tokens = time.perf_counter() - began, int(examples.input_lengths[chosen].sum())
        metrics_file.write(json.dumps({"step": step + 1, "loss": total, "lr": lr, "grad_norm": grad_norm, "examples": len(chosen),
                                       "tokens": tokens, "supervised_tokens": supervised, "seconds": round(seconds, 4)}) + "\n")
        bar.set_postfix_str(f"loss {total:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update()

        if (step + 1) % save_every == 0 or step + 1 == steps:
            score = scores.per_token(scores.response_nll(model, held_out, compute), held_out.target_counts)["nll"]  # unweighted, always
            better = score < progress["best"]
            if better:
                progress |= {"best": score, "best_step": step + 1}
                save_model(model, tokenizer, run / "best")
            progress["validation"].append([step + 1, score])
            checkpoint.write_json(run / "validation.json", progress["validation"])
            metrics_file.flush()
            checkpoint.save_state(run, model, tokenizer, optimizer, scaler, schedule, {**progress, "step": step + 1})
            bar.write(f"step {step + 1}: validation NLL {score:.4f} per token{' (best)' if better else ''}")
    bar.close()

    print(f"best validation NLL {progress['best']:.4f} at step {progress['best_step']}; "
          f"peak memory {compute.peak_memory() / 2 ** 30:.2f} GiB")
    if args.merge:
        save_model(load_model(run / "best"), tokenizer, run / "merged")
    print(f"wrote {run} (last step) and {run / 'best'}{', merged too' if args.merge else ''}\nnext: python evaluate.py {run}")


if __name__ == "__main__":
    main()
