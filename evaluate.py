"""Answer test complaints and score them: one run, several side by side, or a plain checkpoint.

    python evaluate.py                                     # the newest run of finetune.py
    python evaluate.py runs/finetune-001 runs/finetune-002
    python evaluate.py runs/finetune-001 aragpt2-medium --data maqa_severity.jsonl
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from sevloss import InputError, arabic, check_positive, checkpoint, command, data, device, hub, metrics, severity, terminal
from sevloss.generate import generate
from sevloss.models import eos_ids, load_model, load_tokenizer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN_OR_CHECKPOINT", help="default: the newest run in runs/")
    parser.add_argument("--data", help="table with complaints and responses; default: what the first run was trained on")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post response=Plan")
    parser.add_argument("--rows", type=int, default=2000, help="most test rows to score")
    parser.add_argument("--answers", type=int, default=3, help="complaints to answer")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--max-length", type=int, default=512, help="most tokens of prompt and response together")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", *device.DTYPES), default="auto")
    parser.add_argument("--out", help="folder; default: evaluation/ in the first run")
    args = parser.parse_args()
    check_positive(args, "rows", "max_length", or_zero=("answers", "max_new_tokens", "temperature", "seed"))
    return args


def newest_run():
    runs = [path.parent for path in Path("runs").glob("*/run.json") if facts_of(path.parent).get("script") == "finetune.py"]
    if not runs:
        raise InputError("there is no run yet: python finetune.py makes one, or name a run or checkpoint")
    return str(max(runs, key=lambda run: (run / "run.json").stat().st_mtime))


def facts_of(name):
    """run.json of a run or of its best/; {} for a plain checkpoint."""
    for folder in (Path(name), Path(name).resolve().parent):
        if (folder / "run.json").is_file():
            return hub.read_json(folder / "run.json")
    return {}


def test_rows(table, columns, most):
    """The test rows, a fixed choice of them where there are more than `most`."""
    pairs = data.split_pairs(data.read_pairs(table, needed=("complaint", "response"), columns=columns))["test"]
    pairs = sorted(pairs, key=lambda p: data.fraction(p.complaint, "order"))[:most]
    if not pairs:
        raise InputError(f"{table}: none of its complaints falls into the test split")
    return pairs


def class_of(pair):
    """The row's label, else the likeliest class, else None."""
    if pair.severity is None and pair.probabilities:
        return max(range(3), key=pair.probabilities.__getitem__)
    return pair.severity


def answer(model, tokenizer, pairs, preprocess, args, compute):
    limit = min(args.max_length, model.config.context) - args.max_new_tokens
    prompts, cut = data.encode_prompts(tokenizer, [data.prepare(p.complaint, preprocess) for p in pairs], limit)
    if cut:
        print(f"  {cut:,} of {len(pairs):,} complaints to answer were cut to leave room for {args.max_new_tokens} new tokens")
    with compute.autocast():
        ids = generate(model, prompts, max_new_tokens=args.max_new_tokens, eos_ids=eos_ids(model), temperature=args.temperature,
                       seed=args.seed)
    texts = [tokenizer.decode(i).strip() for i in ids]
    return [arabic.unpreprocess(t) for t in texts] if preprocess == "arabert" else texts


def evaluate(name, pairs, shown, args):
    """(n,) NLL sums and (n,) target counts of the pairs, and an answer to each complaint of `shown`."""
    model, tokenizer = load_model(name), load_tokenizer(name)
    if not hasattr(model, "head_weight") or not eos_ids(model):
        raise InputError(f"{name} is no causal language model with an end-of-text token")
    compute = device.choose(args.device, args.dtype, small=sum(p.numel() for p in model.parameters()) < 10e6)
    print(f"{name}: {compute}")
    model.to(compute.device)
    preprocess = data.choose_preprocess("auto", name, model.raw_config)
    max_length = min(args.max_length, model.config.context)
    if args.max_new_tokens > max_length // 2:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} leaves too little of {max_length} tokens for the complaint: "
                         f"{max_length // 2} at most")
    examples = data.encode_pairs(pairs, tokenizer, max_length=max_length, eos_id=eos_ids(model)[0], preprocess=preprocess)
    with tqdm(total=len(pairs), unit="row", desc=name, mininterval=1) as bar:
        nll = metrics.response_nll(model, examples, compute, progress=bar)
    return nll, examples.targets, answer(model, tokenizer, shown, preprocess, args, compute)


@command
def main():
    args = parse_arguments()
    runs = args.runs or [newest_run()]
    for name in runs:
        hub.local_folder(name)  # refuses what cannot be loaded before any work is done
    trained = next((facts for facts in map(facts_of, runs) if "table" in facts), {})
    table, columns = args.data or trained.get("table", data.SAMPLE), data.parse_columns(args.columns)
    pairs = test_rows(table, columns if args.data else trained.get("columns", columns), args.rows)
    classes = [class_of(p) for p in pairs]
    groups = {"all": list(range(len(pairs)))}
    groups |= {name: [i for i, c in enumerate(classes) if c == n] for n, name in enumerate(severity.CLASSES)}
    print(f"{len(pairs):,} test rows: " + ", ".join(f"{len(rows):,} {name}" for name, rows in groups.items() if name != "all"))
    by_turns = sorted(range(len(pairs)), key=lambda i: (classes[:i].count(classes[i]), -(classes[i] or 0)))  # a class after the other
    shown = [pairs[i] for i in by_turns[:args.answers]]
    out = Path(args.out or (Path(runs[0]) if Path(runs[0]).is_dir() else Path("runs")) / "evaluation")

    rows, scores, answers = [], [], {}
    for name in runs:
        nll, targets, answers[name] = evaluate(name, pairs, shown, args)
        scores += [{"run": name, "row": p.row, "nll": round(n, 4), "tokens": t} for p, n, t in zip(pairs, nll.tolist(), targets.tolist())]
        for group, which in groups.items():
            if which:
                score = metrics.per_token(nll[which], targets[which])
                counts = f"{len(which):,}", f"{targets[which].sum():,}"
                rows.append([name, group, *counts, f"{score['nll']:.4f}", f"{score['perplexity']:,.1f}"])

    for i, pair in enumerate(shown):
        label = severity.CLASSES[class_of(pair)] if class_of(pair) is not None else "severity unknown"
        print(f"\n[{label}] {pair.complaint}\n  reference: {pair.response}")
        for name in runs:
            print(f"  {name}: {answers[name][i] or '(empty)'}")
    text = terminal.table(["model", "severity", "rows", "tokens", "NLL per token", "perplexity"], rows)
    print(f"\n{text}\n\nNLL: in nats, over response and end-of-text tokens; lower is better; only for models with the same tokenizer.")
    generations = [{"row": p.row, "complaint": p.complaint, "reference": p.response, "answers": {name: answers[name][i] for name in runs}}
                   for i, p in enumerate(shown)]
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_lines(out / "scores.jsonl", (json.dumps(row, ensure_ascii=False) for row in scores))
    checkpoint.write_lines(out / "generations.jsonl", (json.dumps(row, ensure_ascii=False) for row in generations))
    checkpoint.write_lines(out / "table.txt", [text])
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
