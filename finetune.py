"""Fine-tune a causal language model with the severity-weighted loss.

    python finetune.py                                              # embedded sample, small model, offline
    python finetune.py --ckpt aragpt2-medium --data maqa.xlsx --classifier runs/classifier-001
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sevloss import InputError, check_positive, checkpoint, data, device, distributed, report_errors, stop
from sevloss.classifier import annotate
from sevloss.evaluation import scores
from sevloss.inputs import tables
from sevloss.loss import linear_weighted_token_ce, severity_weights
from sevloss.models import (
    check_causal,
    enable_gradient_checkpointing,
    eos_ids,
    load_model,
    load_tokenizer,
    lora,
    save_model,
)
from sevloss.models.tiny import tiny_gpt2
from sevloss.optimizer import adamw, set_learning_rate
from sevloss.severity import parse_weighting

# "paper": what the published notebooks set; docs/paper-recipe.md says what is wrong with it. Arguments that
# are given override a recipe's.
RECIPES = {"default": {}, "paper": dict(
    supervise="row", max_length=512, train_rows=20_000, epochs=3.0, batch_size=8, lr=2e-4, warmup=0.0,
    weight_decay=0.0, clip=1.0, lora=16, lora_alpha=32.0, lora_dropout=0.05)}
NEEDED = ("complaint", "response")


# --- configuration ------------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add("--ckpt", default="tiny", help="short name, hub id, folder or run; default: tiny, from scratch")
    add("--data", default=tables.SAMPLE, help=".jsonl, .csv, .tsv or .xlsx with complaints and responses")
    add("--validation", metavar="TABLE", help="validate on it, train on all of --data; default: on a tenth")
    add("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post response=Plan")
    add("--preprocess", choices=("auto", "arabert", "none"), default="auto", help="auto: as in pre-training")
    add("--max-length", type=int, default=512, help="most tokens of prompt and response together")
    add("--train-rows", type=int, metavar="N", help="only the first N training rows")
    add = parser.add_argument_group("method").add_argument
    add("--weighting", default="balanced", help="none, mild, balanced, strong, or three coefficients A,B,C")
    add("--normalise", choices=("example", "token"), default="example",
        help="example: the paper's mean over each response, then over examples; token: mean over tokens")
    add("--classifier", metavar="RUN", help="run of train_classifier.py that gives the probabilities")
    add("--supervise", choices=("response", "row"), default="response",
        help="response: its tokens and EOS; row: the prompt, and EOS up to --max-length, too")
    add("--recipe", choices=RECIPES, default="default", help="paper: train as the published notebooks do")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora", type=int, metavar="R", help="freeze the model and train adapters of rank R")
    add("--lora-alpha", type=float, help="their scale is alpha / R; default 2 R")
    add("--lora-dropout", type=float, default=0.0)
    add("--lora-targets", nargs="+", metavar="NAME", help="layers that get adapters, e.g. q_proj v_proj")
    add("--merge", action="store_true", help="also write the best model, adapters merged in, to RUN/merged")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, help="default 3; tiny: 10")
    add("--max-steps", type=int, help="optimizer steps instead of --epochs")
    add("--lr", type=float, help="peak learning rate; default 5e-5; tiny: 2e-3")
    add("--warmup", type=float, default=0.05, help="share of the steps in which the learning rate rises")
    add("--batch-size", type=int, default=16, help="examples per optimizer step")
    add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *device.DTYPES), default="auto", help="of products; what learns is fp32")
    add("--micro-tokens", type=int, default=4096, help="most tokens of a forward pass, or one longer text")
    add("--gradient-checkpointing", action="store_true", help="less memory: compute each block twice")
    add("--compile", action="store_true", help="on a GPU: steps in 0.5 to 0.7 of the time, but a slow start")
    add("--deterministic", action="store_true", help="only operations that give the same bits every time")
    add("--shard", action="store_true", help="with torchrun: each rank holds its part of the model (FSDP2)")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="RUN", help="run folder; default runs/finetune-001 and so on")
    add("--save-every", type=int, metavar="STEPS", help="validate and save this often; default once an epoch")
    add("--resume", action="store_true", help="go on with the run in --out, with the same arguments; "
        "more --epochs or --max-steps make it longer")

    recipe = parser.parse_known_args()[0].recipe
    parser.set_defaults(**RECIPES[recipe])
    args = parser.parse_args()
    tiny = args.ckpt == "tiny"
    if args.epochs is None:
        args.epochs = 10 if tiny else 3
    if args.lr is None:
        args.lr = 2e-3 if tiny else 5e-5
    check_positive(args, "epochs", "max_steps", "max_length", "lr", "batch_size", "clip", "micro_tokens",
                   "save_every", "lora", "lora_alpha", "train_rows",
                   or_zero=("warmup", "weight_decay", "seed", "lora_dropout"))
    tables.check_files(args.data, args.validation)
    if args.warmup > 1:
        raise InputError(f"--warmup is a share of the steps, at most 1, not {args.warmup}")
    if tiny and recipe == "paper":
        raise InputError("--recipe paper adapts a checkpoint with LoRA: name one, e.g. --ckpt aragpt2-base")
    if tiny and args.lora:
        raise InputError("--lora adapts a checkpoint; --ckpt tiny is made on the spot: train it whole, or "
                         "name a checkpoint")
    if not args.lora and (args.merge or args.lora_targets):
        raise InputError("--merge and --lora-targets belong to --lora R")
    if args.lora_dropout >= 1:
        raise InputError(f"--lora-dropout must be less than 1, not {args.lora_dropout}")
    return args


def choose_compute(args):
    compute = device.choose(args.device, args.dtype, small=args.ckpt == "tiny",
                            deterministic=args.deterministic)
    print(compute)
    if args.compile and compute.device.type != "cuda":
        raise InputError("--compile is for a GPU: on a CPU every batch would be compiled anew")
    if args.shard and (not torch.distributed.is_initialized() or compute.dtype == torch.float16):
        raise InputError("--shard needs torchrun, and --dtype bf16 or fp32: torchrun --nproc_per_node 2 "
                         "finetune.py ...")
    return compute


# --- data ---------------------------------------------------------------------------------------------------

def table_with_severity(args, weighted, compute):
    """(path of the table to train on, arguments of tables.usable_pairs). Its severity probabilities are the
    table's own, or those of a classifier."""
    table = args.data
    columns = tables.parse_columns(args.columns)
    # "if present": w = 1 leaves out the same rows as a weighted run
    probabilities = "required" if weighted else "if present"
    if args.classifier and weighted:
        table = annotate.annotated(args.classifier, table, columns, compute)
        columns = {}
    elif args.classifier:
        probabilities = "optional"
        print(f"--weighting {args.weighting} treats all alike: {args.classifier} is not used")
    return table, dict(needed=NEEDED, probabilities=probabilities, columns=columns)


def load_examples(args, table, tokenizer, read_options, encode_options):
    """The data.EncodedTable. Rank 0 makes it first; then the others find it."""
    validation_options = None
    if args.validation:  # of which no probabilities are needed
        columns = tables.parse_columns(args.columns)
        columns = {role: column for role, column in columns.items() if role in NEEDED}
        validation_options = dict(path=args.validation, needed=NEEDED, columns=columns)
    if distributed.rank() > 0:
        distributed.wait_for_all()
    encoded = data.encoded_table(table, tokenizer, read_options=read_options, encode_options=encode_options,
                                 supervise=args.supervise, train_rows=args.train_rows,
                                 validation_options=validation_options)
    if distributed.rank() == 0:
        distributed.wait_for_all()
    print(f"{len(encoded.train):,} pairs to train on, {len(encoded.validation):,} to validate on, "
          f"{encoded.test_rows:,} kept for evaluate.py")
    return encoded


# --- model --------------------------------------------------------------------------------------------------

def load_checkpoint(args, compute, table, read_options):
    """(model, tokenizer, preprocessing) of --ckpt; `tiny`: new, its vocabulary made of the training texts."""
    if args.ckpt == "tiny":
        preprocess = data.choose_preprocess(args.preprocess, args.ckpt, {})
        model, tokenizer = tiny_gpt2(training_texts(args, table, read_options, preprocess))
    else:
        checkpoint.check_layout(args.ckpt)
        # A frozen base is held in the dtype it is computed in: autocast would cast it anew at every use.
        # Shards have one dtype and are cast when they are gathered.
        dtype = compute.dtype if args.lora and not args.shard else torch.float32
        model = load_model(args.ckpt, dtype=dtype)
        tokenizer = load_tokenizer(args.ckpt)
        preprocess = data.choose_preprocess(args.preprocess, args.ckpt, model.raw_config)
    check_causal(model, args.ckpt)
    model.raw_config["sevloss"] = {"preprocess": preprocess}
    return model, tokenizer, preprocess


def training_texts(args, table, read_options, preprocess):
    with contextlib.redirect_stdout(io.StringIO()):  # load_examples will say the same about the table
        pairs = tables.read_pairs(table, **read_options)
    if not args.validation:
        pairs = data.split_pairs(pairs)["train"]
    texts = []
    for pair in pairs[:args.train_rows]:
        texts.append(data.PROMPT.format(complaint=data.prepare(pair.complaint, preprocess)))
        texts.append(data.prepare(pair.response, preprocess))
    return texts


def prepare_for_training(model, args, compute):
    """LoRA, --gradient-checkpointing, --compile, the device, --shard."""
    if args.lora:
        lora.attach(model, args.lora, alpha=args.lora_alpha or 2 * args.lora, dropout=args.lora_dropout,
                    targets=args.lora_targets)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=True)  # lengths differ from batch to batch
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.ckpt}: {parameters:,} parameters, {trainable:,} ({trainable / parameters:.2%}) learn, "
          f"vocabulary {len(model.head_weight):,}, preprocessing {model.raw_config['sevloss']['preprocess']}")
    model.to(compute.device)
    if args.shard:
        distributed.shard(model, compute)


# --- the pieces of the loop ---------------------------------------------------------------------------------

def show_weights(weights, coefficients):
    low = min(coefficients)
    high = max(coefficients)
    sd = weights.std(correction=0)
    print(f"severity weights of the {len(weights):,} training examples: "
          f"mean {weights.mean():.3f}, sd {sd:.3f}, from {weights.min():.3f} to {weights.max():.3f}")
    if low < high:
        counts, edges = np.histogram(weights.numpy().clip(low, high), 12, (low, high))
        for count, start, end in zip(counts, edges, edges[1:]):
            bar = "#" * math.ceil(40 * count / counts.max())
            print(f"  {start:5.2f} to {end:5.2f} {count:7,} {bar}")
        if sd < 0.05 * (high - low):
            print("  Nearly all weights are the same: the probabilities hardly tell the classes apart, so "
                  "the weighting will hardly act.")


def step_batches(examples, weight_per_token, args, compute, first_step):
    """Yields (indices of the examples, their micro-batches on the device) of each optimizer step.

    Each epoch has an order of its own, made of seed and epoch; its last step may have fewer examples. With
    several ranks the micro-batches are this rank's.
    """
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    order = None
    for step in itertools.count(first_step):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if order is None or step_of_epoch == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(len(examples))
        indices = order[step_of_epoch * args.batch_size:(step_of_epoch + 1) * args.batch_size]
        parts = distributed.micro_batches(examples.input_lengths, indices, args.micro_tokens)
        yield indices, [data.make_batch(examples, part, compute.device, weight_per_token) for part in parts]


def resume_or_begin(run, args, record, model, tokenizer, optimizer, scaler):
    """-> progress. record: what run.json says of the run beside its arguments."""
    progress = {"step": 0, "updates": 0, "best": math.inf, "best_step": 0, "validation": []}
    if checkpoint.has_state(run):
        checkpoint.check_resumed(run, vars(args), record)
        progress = checkpoint.load_state(run, model, optimizer, scaler)
        save_best(run, model, tokenizer, progress)
        finished = "; the run is finished" if progress["step"] == record["steps"] else ""
        print(f"going on after step {progress['step']} of {record['steps']}{finished}")
    elif args.resume:
        print(f"nothing was saved in {run} yet: it begins at step 0")
    checkpoint.keep_lines(run / "metrics.jsonl", progress["step"])
    checkpoint.write_run_json(run, "finetune.py", vars(args), **record)
    return progress


def validate_and_save(run, model, tokenizer, optimizer, scaler, validation, compute, progress):
    """Scores the model by the unweighted NLL of validation rows, whatever the weighting; returns a line.

    The state is saved first, then the model if it is the best so far: resuming mends a stop in between.
    """
    nll = float(scores.response_nll(model, validation, compute).sum() / validation.target_counts.sum())
    if not math.isfinite(nll):
        raise checkpoint.record_not_finite(run, f"the validation NLL is {nll} after step {progress['step']}")
    if nll < progress["best"]:
        progress["best"] = nll
        progress["best_step"] = progress["step"]
    progress["validation"].append([progress["step"], nll])
    checkpoint.save_state(run, model, optimizer, scaler, progress)
    save_best(run, model, tokenizer, progress)
    best = " (best)" if progress["best_step"] == progress["step"] else ""
    skipped = progress["step"] - progress["updates"]
    return (f"step {progress['step']}: validation NLL {nll:.4f} per token{best}"
            + (f"; fp16 has skipped {skipped} steps" if skipped else ""))


def save_best(run, model, tokenizer, progress):
    """What follows the state: the model, if its step is the best, and validation.json."""
    if progress["best_step"] == progress["step"]:
        save_model(model, tokenizer, run)
    checkpoint.write_json(run / "validation.json", progress["validation"])


def finish(run, args, tokenizer, progress, compute):
    """--merge, and what is printed at the end."""
    if not progress["updates"]:
        raise InputError(f"fp16 skipped all {progress['step']} steps, nothing was learned: start anew with "
                         "--dtype fp32")
    print(f"best NLL {progress['best']:.4f}, at step {progress['best_step']}; {compute.peak_memory()}")
    if args.merge or (run / "merged").is_dir():  # one that an earlier call wrote would be of another step
        distributed.wait_for_all()  # until rank 0 has written the best model
        save_model(load_model(run), tokenizer, run / "merged")
        print(f"wrote {run}/merged")
    test_table = " --data TABLE --split all" if args.validation else ""
    print(f"wrote {run}\nnext: python evaluate.py {run}{test_table}")


@report_errors
def main():
    args = parse_arguments()
    args.device = distributed.start(args.device)
    with checkpoint.open_run(args.out, "finetune", args.resume) as run:
        train(args, run)


def train(args, run):
    # ---- device; severity: the table's own probabilities, or those of a classifier
    coefficients = parse_weighting(args.weighting)
    compute = choose_compute(args)
    table, read_options = table_with_severity(args, len(set(coefficients)) > 1, compute)

    # ---- model and tokenizer; seeded here: runs that differ only in their weights start from the same model
    device.seed_everything(args.seed)
    model, tokenizer, preprocess = load_checkpoint(args, compute, table, read_options)
    prepare_for_training(model, args, compute)

    # ---- data: table -> pairs -> splits -> ids
    encode_options = dict(max_length=min(args.max_length, model.config.context), eos_id=eos_ids(model)[0],
                          preprocess=preprocess)
    encoded = load_examples(args, table, tokenizer, read_options, encode_options)
    examples = encoded.train

    # ---- severity -> weight of each example -> weight of each of its tokens, the normalisation folded in
    weights = severity_weights(torch.tensor(examples.probabilities), coefficients)  # (n, 3) -> (n,)
    if not weights.any():
        raise InputError(f"--weighting {args.weighting} gives every example the weight 0: nothing to learn")
    show_weights(weights, coefficients)
    weight_per_token = weights.numpy()
    if args.normalise == "example":
        weight_per_token = weight_per_token / examples.target_counts  # the paper's w / L

    # ---- optimizer
    optimizer = adamw(model, args.lr, args.weight_decay)
    scaler = compute.grad_scaler()
    trainable = [p for p in model.parameters() if p.requires_grad]
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
    save_every = args.save_every or steps_per_epoch

    # ---- what the run is known by: its model, and the tables that were trained on whole, here or before
    seen = set(checkpoint.read_run_json(args.ckpt).get("seen", ()))
    if args.validation:
        seen.add(encoded.fingerprint)
    model_fingerprint = ""
    if args.ckpt != "tiny":
        weights_digest = checkpoint.weights_digest(args.ckpt)
        model_fingerprint = data.digest(weights_digest, tokenizer.to_str(), model.raw_config)

    # ---- resume, or begin; `record` goes into run.json, beside the arguments
    record = dict(coefficients=coefficients, preprocess=preprocess, prompt=data.PROMPT, compute=str(compute),
                  table=str(table), called_in=str(Path().resolve()), columns=read_options["columns"],
                  steps=steps, data_fingerprint=encoded.fingerprint,
                  validation_fingerprint=encoded.validation_fingerprint,
                  seen=sorted(seen), model_fingerprint=model_fingerprint)
    progress = resume_or_begin(run, args, record, model, tokenizer, optimizer, scaler)
    bar = tqdm(total=steps, initial=progress["step"], unit="step", mininterval=1)

    # ---- the loop: an optimizer step a turn
    batches = step_batches(examples, weight_per_token, args, compute, progress["step"])
    upcoming = next(batches)
    stop.waits = True  # a signal is looked at between steps
    for step in range(progress["step"], steps):
        began = time.perf_counter()
        indices, micro_batches = upcoming
        model.train()
        device.seed_everything(args.seed, step, distributed.rank())  # dropout's draws, the same when resumed

        # learning rate; it stands still at steps that fp16 skips
        lr = set_learning_rate(optimizer, args.lr, progress["updates"], steps, round(args.warmup * steps))

        # the denominator of the loss, of the whole optimizer step and known before any forward pass
        supervised_tokens = int(examples.target_counts[indices].sum())
        denominator = len(indices) if args.normalise == "example" else supervised_tokens

        # forward and backward of each micro-batch; gradients add up
        step_loss = torch.zeros((), device=compute.device)
        for batch in micro_batches:
            with compute.autocast():
                hidden = model(batch.tokens, batch.lengths)  # (N, D)
                hidden = hidden.index_select(0, batch.supervised_index)  # (S, D)
                loss = linear_weighted_token_ce(hidden, model.head_weight, batch.targets, batch.weights,
                                                denominator=denominator, ignore_index=None)
            scaler.scale(loss).backward()
            step_loss += loss.detach()

        # the sum over the ranks
        distributed.add_up_gradients(trainable)
        distributed.add_up(step_loss)

        # clip; make the next step's batches while the device works; then wait for it, once a step
        scaler.unscale_(optimizer)
        grad_norm = distributed.whole(torch.nn.utils.clip_grad_norm_(trainable, args.clip))
        upcoming = next(batches)
        step_loss, grad_norm = torch.stack([step_loss, grad_norm]).tolist()

        # optimizer step; fp16 skips it where the scaled gradients overflowed, and lowers the scale
        finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
        skipped = scaler.is_enabled() and math.isfinite(step_loss) and not finite
        if not finite and not skipped:
            rows = ", ".join(map(str, sorted(examples.rows[indices])))
            what = (f"loss {step_loss} and gradient norm {grad_norm} at step {step + 1}, with rows {rows} of "
                    "the table")
            raise checkpoint.record_not_finite(run, what)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress["step"] = step + 1
        progress["updates"] += finite

        # metrics
        seconds = time.perf_counter() - began
        tokens = int(examples.input_lengths[indices].sum())
        metrics = {"step": step + 1, "loss": step_loss, "lr": lr, "grad_norm": grad_norm if finite else None,
                   "examples": len(indices), "tokens": tokens, "supervised_tokens": supervised_tokens,
                   "seconds": round(seconds, 4)}
        checkpoint.append(run / "metrics.jsonl", json.dumps(metrics) + "\n")
        bar.set_postfix_str(f"loss {step_loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update()

        # validation and checkpoint; a signal saves the state alone, so that going on comes to the same end
        stopping = max(distributed.gather(stop.signal))
        if (step + 1) % save_every == 0 or step + 1 == steps:
            bar.write(validate_and_save(run, model, tokenizer, optimizer, scaler, encoded.validation, compute,
                                        progress))
        elif stopping:
            checkpoint.save_state(run, model, optimizer, scaler, progress)
        if step + 1 < steps:
            stop.leave_if(stopping, f"saved after step {step + 1} of {steps}: --resume --out {run} goes on")
    stop.waits = False
    bar.close()
    finish(run, args, tokenizer, progress, compute)


if __name__ == "__main__":
    main()
    distributed.end()
