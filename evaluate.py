"""Answer test complaints, score the answers, and say whether one model is better than another.

    python evaluate.py                                     # the newest run of finetune.py
    python evaluate.py runs/plain runs/balanced            # runs that differ only in the seed count as one setting
    python evaluate.py runs/balanced aragpt2-medium --data maqa_severity.jsonl
    python evaluate.py runs/a/evaluation/answers-1.jsonl runs/b/evaluation/answers-1.jsonl      # answered before, elsewhere
"""

import argparse
import json
import os
from pathlib import Path

from tqdm import tqdm

from sevloss import InputError, check_positive, checkpoint, data, device, report_errors, terminal
from sevloss.data import Fingerprint, digest, file_fingerprint, sample_pairs, split_pairs
from sevloss.evaluation import findings, scores
from sevloss.evaluation.bertscore import Scorer
from sevloss.evaluation.report import write_evaluation
from sevloss.generate import generate
from sevloss.inputs import arabic, hub, tables
from sevloss.models import eos_ids, load_model, load_tokenizer
from sevloss.severity import CLASSES

ROWS_AT_ONCE = 64  # answered together; what a stop can lose
# "paper": what the published notebooks do; their prompt ends where training's says "الاجابة:", and what comes before that is cut off.
RECIPES = {"default": {}, "paper": dict(temperature=0.7, max_new_tokens=50)}
HEADING = "الاجابة:"
MBERT = "bert-base-multilingual-cased"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN_OR_CHECKPOINT", help="or an answers file; default: the newest run in runs/")
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="table with complaints and responses; default: what the first run was trained on")
    group.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post response=Plan")
    group.add_argument("--rows", type=int, default=2000, help="most test rows to answer and score")
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    group.add_argument("--max-length", type=int, default=512, help="most tokens of prompt and response together")
    group.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability")
    group.add_argument("--seed", type=int, default=0, help="of drawing")
    group.add_argument("--recipe", choices=RECIPES, default="default", help="paper: decode as the published notebooks do")
    group = parser.add_argument_group("scores")
    group.add_argument("--bertscore", metavar="CKPT|none", help=f"encoder of BERTScore; default {MBERT}; none where all models are tiny")
    group.add_argument("--bertscore-layer", type=int, default=9, help="block whose output is compared")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", choices=("auto", *device.DTYPES), default="auto", help="of the models; BERTScore runs in fp32")
    group.add_argument("--answers", type=int, default=3, help="answers to print")
    group.add_argument("--out", help="folder of the report; default: evaluation/ in the first run")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    check_positive(args, "rows", "max_length", "max_new_tokens", "top_p", or_zero=("answers", "temperature", "seed", "bertscore_layer"))
    return args


def newest_run():
    runs = [path.parent for path in Path("runs").glob("*/run.json") if findings.read_run_json(path.parent).get("script") == "finetune.py"]
    if not runs:
        raise InputError("there is no run yet: python finetune.py makes one, or name a run or checkpoint")
    return str(max(runs, key=lambda run: (run / "run.json").stat().st_mtime))


def test_rows(table, columns, most):
    """The test rows, a fixed choice of them where there are more than `most`, in the table's order."""
    pairs = split_pairs(tables.read_pairs(table, needed=("complaint", "response"), columns=columns))["test"]
    if not pairs:
        raise InputError(f"{table}: none of its complaints falls into the test split")
    return sorted(sample_pairs(pairs, most), key=lambda p: p.row)


def class_of(pair):
    """The row's label, else the likeliest class, else None."""
    if pair.severity is None and pair.probabilities:
        return max(range(3), key=pair.probabilities.__getitem__)
    return pair.severity


def answer_rows(name, pairs, args, protocol, out):
    """Answers every complaint and scores every reference; returns the answers file. It is written as rows are done, the longest prompts
    first; the same call goes on where it was stopped, and what is complete is not done again."""
    run = findings.read_run_json(name)
    weights = file_fingerprint(hub.find_file(name, (*hub.ADAPTERS, *hub.WEIGHTS)))
    name_hash = digest(protocol, [(pair.row, pair.specialty) for pair in pairs], args.dtype, weights, "" if run else hub.full_name(name))
    path = Path(name) / "evaluation" / f"answers-{name_hash}.jsonl" if run else out / f"answers-{Path(name).name}-{name_hash}.jsonl"
    head, records = findings.read_answers(path)
    done = {record["row"] for record in records}
    left = [i for i, pair in enumerate(pairs) if pair.row not in done]
    if not left:
        print(f"{name}: answered before, {path}")
        return path

    model, tokenizer = load_model(name), load_tokenizer(name)
    if not hasattr(model, "head_weight") or not eos_ids(model):
        raise InputError(f"{name} is no causal language model with an end-of-text token")
    compute = device.choose(args.device, args.dtype, small=sum(p.numel() for p in model.parameters()) < 10e6)
    print(f"{name}: {compute}" + (f"; {len(done):,} of {len(pairs):,} rows were answered before" if done else ""))
    model.to(compute.device)
    preprocess = data.choose_preprocess("auto", name, model.raw_config)
    max_length = min(args.max_length, model.config.context)
    if args.max_new_tokens > max_length // 2:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} leaves too little of {max_length} tokens for the complaint: "
                         f"{max_length // 2} at most")
    examples, cuts = data.encode_pairs(pairs, tokenizer, max_length=max_length, eos_id=eos_ids(model)[0], preprocess=preprocess)
    if cuts_line := data.describe_cuts(cuts, len(pairs), max_length):
        print(cuts_line)
    complaints = [data.prepare(p.complaint, preprocess) for p in pairs]
    prompt = data.PROMPT if args.recipe == "default" else data.PROMPT.partition("\n" + HEADING)[0]
    prompts, cut = data.encode_prompts(tokenizer, complaints, max_length - args.max_new_tokens, prompt=prompt)
    if cut:
        print(f"  {cut:,} of {len(pairs):,} complaints were cut to leave room for {args.max_new_tokens} new tokens")

    path.parent.mkdir(parents=True, exist_ok=True)
    left.sort(key=lambda i: -len(prompts[i]))
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without the line that a stop cut off
    bar = tqdm(total=len(pairs), initial=len(done), unit="row", desc=name, mininterval=1)
    with open(path, "a", encoding="utf-8") as file, bar, compute.autocast():  # around all rows: a weight is cast to 16 bits once
        if not head:
            file.write(json.dumps({"name": name, "run": run, "protocol": protocol}, ensure_ascii=False) + "\n")
        for start in range(0, len(left), ROWS_AT_ONCE):
            part = left[start:start + ROWS_AT_ONCE]
            nll = scores.response_nll(model, examples, compute, indices=part)
            answers = generate(model, [prompts[i] for i in part], max_new_tokens=args.max_new_tokens, eos_ids=eos_ids(model),
                               temperature=args.temperature, top_p=args.top_p, seed=args.seed)
            for i, ids in zip(part, answers):
                pair, text = pairs[i], tokenizer.decode(ids).rstrip("\ufffd").strip()  # half a character where it was cut off
                if args.recipe == "paper":
                    text = text.rpartition(HEADING)[2].strip()
                file.write(json.dumps({
                    "row": pair.row, "complaint": pair.complaint, "reference": pair.response, "severity": class_of(pair),
                    "probabilities": pair.probabilities, "specialty": pair.specialty,
                    "answer": arabic.unpreprocess(text) if preprocess == "arabert" else text,
                    "finished": len(ids) < args.max_new_tokens, "nll": nll[i].item(), "tokens": int(examples.target_counts[i]),
                }, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))
    return path


def bert_scores(answers, args, notes):
    """{name: [F1, ...]}, kept beside the answers; {} where there is no scorer, with a note that says how to get one."""
    tiny = all(a.run.get("arguments", {}).get("ckpt") == "tiny" for a in answers)
    ckpt, scorer, f1 = args.bertscore or ("none" if tiny else MBERT), None, {}
    if ckpt == "none":
        notes.append("BERTScore was not computed" + (f"; --bertscore {MBERT} does it for tiny models too" if not args.bertscore else ""))
        return {}
    for a in answers:
        kept = a.path.with_name(f"{a.path.stem}-{Path(ckpt).name}-{args.bertscore_layer}.json")
        before = hub.read_json(kept) if kept.is_file() and kept.stat().st_mtime_ns > a.path.stat().st_mtime_ns else {}
        if before.get("encoder") == hub.full_name(ckpt):
            f1[a.name] = before["f1"]
            continue
        try:
            scorer = scorer or Scorer.load(ckpt, args.bertscore_layer, compute=device.choose(args.device, "fp32"))
        except InputError as error:
            how = f"`hf download {hub.full_name(ckpt)}` gets it with a connection; " if isinstance(error, hub.Unreachable) else ""
            notes.append(f"BERTScore was not computed: {error}. {how}--bertscore CKPT names another encoder")
            return {}
        with tqdm(total=2 * len(a.rows), unit="text", desc=f"BERTScore {a.name}", mininterval=1) as bar:
            scores = scorer.score([row["answer"] for row in a.rows], [row["reference"] for row in a.rows], progress=bar)[2]
        f1[a.name] = scores.tolist()
        checkpoint.write_json(kept, {"encoder": hub.full_name(ckpt), "f1": f1[a.name]})
        if scorer.cut:
            notes.append(f"BERTScore of {a.name}: {scorer.cut:,} texts were cut to {scorer.model.config.context} pieces")
    return f1


def print_findings(found, answers, shown):
    for row in sorted(found["rows"], key=lambda row: -(row["p_critical"] or 0))[:shown]:
        print(f"\n[{row['severity'] or 'severity unknown'}] {row['complaint']}\n  reference: {row['reference']}")
        for a in answers:
            print(f"  {a.name}: {row['answers'][a.name] or '(empty)'}")
    columns = list(found["score_names"])
    means = {(m["setting"], m["group"], m["score"]): m for m in found["means"]}
    groups = [g for g in found["groups"] if not g.startswith("specialty: ")]
    rows = [[s["name"], group, found["groups"][group], *(_number(means[s["name"], group, c]["mean"]) for c in columns)]
            for s in found["settings"] for group in groups]
    text = terminal.table(["model", "rows of", "n", *columns], rows)
    print(f"\n{text}\n\nNLL: in nats per token of response and end of text. 95% intervals, specialties and pictures are in the report.")
    for entry in found["comparisons"]:
        if entry["group"] == "all" or entry["p_holm"] is not None and entry["p_holm"] < 0.05:
            print(f"  {entry['sentence']}")
    for note in found["notes"]:
        print(f"  {note}")
    return text


def _number(value):
    return "–" if value is None else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


@report_errors
def main():
    args = parse_arguments()
    names = args.runs or [newest_run()]
    places = [Path(name).resolve() if Path(name).exists() else name for name in names]
    if twice := [name for name, place in zip(names, places) if places.count(place) > 1]:
        raise InputError(f"{twice[-1]} is given twice")
    answers = {name: findings.load_answers(name) for name in names if Path(name).is_file()}
    models = [name for name in names if name not in answers]
    for name in models:
        hub.local_folder(name)  # refuses what cannot be loaded before any work is done
    out = Path(args.out or (Path(names[0]) if Path(names[0]).is_dir() else Path("runs")) / "evaluation")
    planned = []
    if models:
        trained = next((facts for facts in map(findings.read_run_json, models) if "table" in facts), {})
        table, columns = args.data or trained.get("table", tables.SAMPLE), tables.parse_columns(args.columns)
        pairs = test_rows(table, columns if args.data else trained.get("columns", {}) | columns, args.rows)
        counts = [sum(class_of(p) == i for p in pairs) for i in range(3)]
        print(f"{len(pairs):,} test rows: " + ", ".join(f"{count:,} {name}" for count, name in zip(counts, CLASSES)))
        protocol = {"table": Path(table).name, "rows": len(pairs), "fingerprint": str(Fingerprint(pairs))}
        protocol |= {key: getattr(args, key) for key in ("recipe", "max_new_tokens", "max_length", "temperature", "top_p", "seed")}
        planned = [findings.Answers(models[0], protocol, [], out)]
    findings.check_same([*answers.values(), *planned])  # before hours of answering
    for name in models:
        answers[name] = findings.load_answers(answer_rows(name, pairs, args, protocol, out))
        answers[name].name, answers[name].run = name, findings.read_run_json(name)  # not as typed then, maybe in another folder
    answers = [answers[name] for name in names]
    for a in answers:  # files that were brought from elsewhere may bear the same name
        a.name = str(a.path) if [b.name for b in answers].count(a.name) > 1 else a.name

    notes = []
    found = findings.evaluate(answers, bert_scores(answers, args, notes), notes)
    text = print_findings(found, answers, args.answers)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_lines(out / "table.txt", [text])
    checkpoint.write_json(out / "evaluation.json", {key: value for key, value in found.items() if key != "rows"})
    write_evaluation(out, found)
    print(f"wrote {out / 'report.html'}, report.md and what they are made of")


if __name__ == "__main__":
    main()
