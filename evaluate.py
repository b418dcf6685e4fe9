"""Answer test complaints, score the answers, and say whether one setting is better than another.

    python evaluate.py                              # the newest run of finetune.py
    python evaluate.py runs/plain-? runs/mild-?     # runs that differ only in the seed are one setting
    python evaluate.py runs/plain-? runs/mild-? --max-new-tokens 0   # likelihoods: enough for a verdict
    python evaluate.py runs/balanced aragpt2-medium --data maqa_severity.jsonl
    python evaluate.py a/evaluation/answers-1.jsonl b/evaluation/answers-1.jsonl     # answered elsewhere
"""

import argparse
import contextlib
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from sevloss import (
    InputError,
    check_positive,
    checkpoint,
    data,
    device,
    distributed,
    interpreting,
    report_errors,
    stop,
    write_text,
)
from sevloss.data import Fingerprint, complaint_id, digest, sample_pairs, split_pairs
from sevloss.evaluation import findings, scores
from sevloss.evaluation.bertscore import Scorer
from sevloss.evaluation.report import write_evaluation
from sevloss.generate import generate
from sevloss.inputs import arabic, hub, tables
from sevloss.models import check_causal, eos_ids, load_model, load_tokenizer

ROWS_AT_ONCE = 64  # answered together; what a stop can lose
# "paper": what the published notebooks do; their prompt ends before the HEADING that ends training's, and
# what the model says up to it is cut off.
RECIPES = {"default": {}, "paper": dict(temperature=0.7, max_new_tokens=50)}
HEADING = data.PROMPT.split()[-1]  # "الاجابة:"
MBERT = "bert-base-multilingual-cased"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN_OR_CHECKPOINT",
                        help="or an answers file; default: the newest run in runs/")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="table with complaints and responses; default: what the first run was trained on")
    add("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="e.g. complaint=Post response=Plan")
    add("--split", choices=("test", "all"), default="test", help="all: the whole table is a test set")
    add("--rows", type=int, default=2000, help="most rows to answer and score")
    add = parser.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=int, default=64, help="longest answer; 0: none, only likelihoods")
    add("--max-length", type=int, default=512, help="most tokens of prompt and response together")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this probability")
    add("--seed", type=int, default=0, help="of drawing")
    add("--recipe", choices=RECIPES, default="default", help="paper: decode as the published notebooks do")
    add = parser.add_argument_group("scores").add_argument
    add("--against", metavar="RUN", help="a run of the control; default: equal weights, else the first")
    add("--bertscore", metavar="CKPT|none", help=f"encoder; default {MBERT}; none where all models are tiny")
    add("--bertscore-layer", type=int, default=9, help="block whose output is compared")
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *device.DTYPES), default="auto", help="of the models; BERTScore: fp32")
    add("--answers", type=int, default=3, help="answers to print")
    add("--out", help="folder of the report; default: evaluation/ in the first run")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args = parser.parse_args()
    check_positive(args, "rows", "max_length", "top_p",
                   or_zero=("answers", "temperature", "seed", "bertscore_layer", "max_new_tokens"))
    return args


# --- what is evaluated --------------------------------------------------------------------------------------

def newest_run():
    """The run of finetune.py in runs/ that was begun or resumed last."""
    runs = [path.parent for path in Path("runs").glob("*/run.json")]
    runs = [run for run in runs if findings.read_run_json(run).get("script") == "finetune.py"]
    if not runs:
        raise InputError("there is no run yet: python finetune.py makes one, or name a run or checkpoint")
    return str(max(runs, key=lambda run: (run / "run.json").stat().st_mtime))


def check_names(names):
    """Refuses a model that is given twice, and runs of an older version."""
    places = [Path(name).resolve() if Path(name).exists() else name for name in names]
    for name, place in zip(names, places):
        if places.count(place) > 1:
            raise InputError(f"{name} is given twice")
        checkpoint.check_layout(name)


def tables_of_run(name, run, table):
    """Where a run's table, as it was typed, may lie: seen from where training was called, from here, from a
    folder above the run."""
    folders = (run.get("called_in", ""), Path(), *Path(name).resolve().parents)
    return [Path(folder, table).resolve() for folder in folders]


def test_rows(args, runs):
    """The rows to evaluate, in the table's order, and the protocol: what must be the same for answers to be
    compared. runs: {name: run.json}; the first one's table is taken, unless another is given."""
    trained = {name: run for name, run in runs.items() if "table" in run}
    table = args.data or tables.SAMPLE
    columns = tables.parse_columns(args.columns)
    if trained and not args.data:
        name, run = next(iter(trained.items()))
        table = next((path for path in tables_of_run(name, run, run["table"]) if path.is_file()), None)
        if table is None:
            raise InputError(f"{name} was trained on {run['table']}, which is not here: give --data TABLE")
        columns = run.get("columns", {}) | columns
    pairs = tables.read_pairs(table, needed=("complaint", "response"), columns=columns)
    fingerprint = str(Fingerprint(pairs))
    for name, run in trained.items():
        known = tables_of_run(name, run, run["table"])
        known += tables_of_run(name, run, run["arguments"].get("data", ""))  # before it was annotated
        same_file = Path(table).resolve() in known
        whole = args.split == "all" or run["arguments"].get("validation")  # then all of it was trained on
        same = same_file or run["data_fingerprint"] == fingerprint
        if whole and same or fingerprint in run.get("seen", ()):
            raise InputError(f"{name} was trained on {table}: that would score what it has seen; give "
                             "another table with --data, or leave --split all out")
    pairs = split_pairs(pairs)["test"] if args.split == "test" else pairs
    if not pairs:
        raise InputError(f"{table}: none of its complaints falls into the test split; if it is a test set, "
                         "--split all takes all of it")
    first = {}
    for pair in pairs:
        first.setdefault(complaint_id(pair.complaint), pair)
    if len(first) < len(pairs):
        print(f"  {len(pairs) - len(first):,} rows repeat a complaint and are left out: intervals and tests "
              "count rows as independent")
    pairs = sorted(sample_pairs(first.values(), args.rows), key=lambda pair: pair.row)
    print(f"{len(pairs):,} rows are evaluated")

    protocol = {"table": Path(table).name, "rows": len(pairs), "fingerprint": str(Fingerprint(pairs))}
    for key in ("split", "recipe", "max_new_tokens", "max_length", "temperature", "top_p", "seed"):
        protocol[key] = getattr(args, key)
    return pairs, protocol


# --- answers ------------------------------------------------------------------------------------------------

def answer_rows(name, run, pairs, protocol, args, path):
    """Answers every complaint and scores every reference, into the answers file `path`. It is written as rows
    are done, the longest prompts first; the same call goes on where it was stopped."""
    stored = findings.read_answers(path)
    done = {answer.row for answer in stored.rows} if stored else set()
    left = [i for i, pair in enumerate(pairs) if pair.row not in done]
    if not left:
        print(f"{name}: answered before, {path}")
        return

    # Model
    model, tokenizer = load_model(name), load_tokenizer(name)
    check_causal(model, name)
    compute = device.choose(args.device, args.dtype, small=sum(p.numel() for p in model.parameters()) < 10e6)
    if stored and stored.dtype not in ("", compute.dtype_name):
        raise InputError(f"{path} was begun in {stored.dtype}, this would go on in {compute.dtype_name}: "
                         f"--dtype {stored.dtype} goes on")
    model.to(compute.device)
    print(f"{name}: {compute}; {len(done):,} of {len(pairs):,} rows were answered before")

    # Texts -> ids
    preprocess = data.choose_preprocess("auto", name, model.raw_config)
    max_length = min(args.max_length, model.config.context)
    most_new = max_length // 2
    if args.max_new_tokens > most_new:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} leaves too little of {max_length} tokens "
                         f"for the complaint: {most_new} at most")
    examples, cuts = data.encode_pairs(pairs, tokenizer, max_length=max_length, eos_id=eos_ids(model)[0],
                                       preprocess=preprocess)
    if line := data.describe_cuts(cuts, len(pairs), max_length):
        print(line)
    complaints = [data.prepare(pair.complaint, preprocess) for pair in pairs]
    prompt = data.PROMPT.partition("\n" + HEADING)[0] if args.recipe == "paper" else data.PROMPT
    most = max_length - args.max_new_tokens
    prompts, cut = data.encode_prompts(tokenizer, complaints, most, prompt=prompt)
    if cut:
        print(f"  {cut:,} of {len(pairs):,} complaints were cut to leave room for the answer")
    prompt_lengths = [len(ids) for ids in prompts]
    left.sort(key=lambda i: -prompt_lengths[i])

    def text_of(ids):
        text = tokenizer.decode(ids).rstrip("\ufffd").strip()  # half a character where it was cut off
        if args.recipe == "paper":
            text = text.rpartition(HEADING)[2].strip()
        return arabic.unpreprocess(text) if preprocess == "arabert" else text

    # Answers, ROWS_AT_ONCE at a time; autocast around all rows: a weight is cast to 16 bits once
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.keep_lines(path)  # without one that a stop cut in half
    if not stored:
        head = {"name": name, "run": run, "protocol": protocol, "dtype": compute.dtype_name}
        checkpoint.append(path, json.dumps(head, ensure_ascii=False) + "\n")
    bar = tqdm(total=len(pairs), initial=len(done), unit="row", desc=name, mininterval=1)
    with bar, compute.autocast():
        for start in range(0, len(left), ROWS_AT_ONCE):
            stop.waits = True  # a signal is looked at when the part is written
            part = left[start:start + ROWS_AT_ONCE]
            nll = scores.response_nll(model, examples, compute, indices=part)
            own = distributed.share(prompt_lengths, part)[distributed.rank()]
            new_ids = generate(model, [prompts[i] for i in own], max_new_tokens=args.max_new_tokens,
                               eos_ids=eos_ids(model), temperature=args.temperature, top_p=args.top_p,
                               seed=args.seed)
            generated = {}
            for rank_answers in distributed.gather(dict(zip(own, new_ids))):
                generated.update(rank_answers)
            lines = ""
            for i in part:
                pair, ids = pairs[i], generated[i]
                answer = findings.Answer(
                    pair.row, pair.complaint, pair.response, pair.severity, pair.probabilities,
                    pair.specialty, text_of(ids), finished=len(ids) < args.max_new_tokens,
                    nll=nll[i].item(), tokens=int(examples.target_counts[i]))
                lines += json.dumps(asdict(answer), ensure_ascii=False) + "\n"
            checkpoint.append(path, lines, to_disk=True)
            bar.update(len(part))
            stop.waits = False  # before the look: one that comes later stops at once
            stop.leave_if(max(distributed.gather(stop.signal)),
                          "the answers so far are kept; the same command goes on")
    distributed.wait_for_all()  # until rank 0 has written the last of them


# --- BERTScore ----------------------------------------------------------------------------------------------

def bert_scores(answers, args, notes):
    """{name: (n,) F1}, kept beside the answers; {} where there is no encoder, with a note that says how to
    get one."""
    if answers[0].protocol["max_new_tokens"] == 0:
        return {}
    all_tiny = all(a.run.get("arguments", {}).get("ckpt") == "tiny" for a in answers)
    ckpt = args.bertscore or ("none" if all_tiny else MBERT)
    if ckpt == "none":
        how = "" if args.bertscore else f"; --bertscore {MBERT} does it for tiny models too"
        notes.append(f"BERTScore was not computed{how}")
        return {}
    scorer = None
    f1 = {}
    for a in answers:
        texts = [row.answer for row in a.rows], [row.reference for row in a.rows]
        made_of = [hub.full_name(ckpt), digest(texts)]
        path = a.path.with_name(f"{a.path.stem}-{Path(ckpt).name}-{args.bertscore_layer}.json")
        kept = hub.read_json(path) if path.is_file() else {}
        if kept.get("made_of") != made_of:
            try:
                compute = device.choose(args.device, "fp32")
                scorer = scorer or Scorer.load(ckpt, args.bertscore_layer, compute=compute)
            except InputError as error:
                how = ""
                if isinstance(error, hub.Unreachable):
                    how = f"`hf download {hub.full_name(ckpt)}` gets it with a connection; "
                notes.append(f"BERTScore was not computed: {error}. {how}--bertscore CKPT names another "
                             "encoder")
                return {}
            kept = {"made_of": made_of, "f1": scorer.score(*texts)[2].tolist(), "notes": []}
            if scorer.cut:
                kept["notes"] = [f"BERTScore of {a.name}: {scorer.cut:,} texts were cut to what the encoder "
                                 "reads"]
            with contextlib.suppress(InputError):  # beside answers that lie in another's folder
                checkpoint.write_json(path, kept)
        with interpreting(path, "remove it"):
            f1[a.name] = np.array(kept["f1"], dtype=float).reshape(len(a.rows))
            notes += kept["notes"]
    return f1


# --- what is printed ----------------------------------------------------------------------------------------

def print_answers(evaluation, shown):
    """The rows that are most critical, with the answer of each setting's first run."""
    answers = {a.name: a.rows for a in evaluation.answers}
    rows = evaluation.answers[0].rows
    for i in evaluation.most_critical_first()[:shown]:
        print(f"\n[{rows[i].class_name}] {tables.clean(rows[i].complaint)}")
        print(f"  reference: {tables.clean(rows[i].reference)}")
        for setting in evaluation.settings:
            print(f"  {setting.name}: {tables.clean(answers[setting.runs[0]][i].answer) or '(empty)'}")


def table_of(evaluation):
    """Means of every score: a line per setting and group of rows, without specialties."""
    rows = []
    for setting, (group, count) in product(evaluation.settings, evaluation.groups.items()):
        if not group.startswith("specialty: "):
            means = [evaluation.means[setting.name, score, group] for score in evaluation.score_names]
            rows.append([setting.name, group, count, *(f"{mean.value:.4f}" for mean in means)])
    header = ["setting", "rows of", "n", *evaluation.score_names]
    return tabulate(rows, header, disable_numparse=True, stralign="right", colalign=("left", "left"))


# --- all of it ----------------------------------------------------------------------------------------------

@report_errors
def main():
    args = parse_arguments()
    args.device = distributed.start(args.device)

    names = [name.rstrip("/") for name in args.runs] or [newest_run()]
    if args.against:
        same = [name for name in names if Path(name).resolve() == Path(args.against).resolve()]
        args.against = same[0] if same else args.against.rstrip("/")
        names += [] if same else [args.against]
    check_names(names)
    out = Path(args.out or (Path(names[0]) if Path(names[0]).is_dir() else Path("runs")) / "evaluation")
    with contextlib.ExitStack() as locks:  # of all that is written to
        for folder in {out.resolve(), *map(checkpoint.run_folder, names)} - {None}:
            locks.enter_context(checkpoint.lock_folder(folder))
        evaluate(args, names, out)


def evaluate(args, names, out):
    # Models and answers that were made before
    answers, runs, weights = {}, {}, {}
    for name in names:
        if Path(name).is_file():
            answers[name] = findings.load_answers(name)
        else:
            runs[name] = findings.read_run_json(name)  # {} for a plain checkpoint
            weights[name] = checkpoint.weights_digest(name)

    # Test rows
    protocols = {name: a.protocol for name, a in answers.items()}
    if runs:
        with interpreting(f"run.json of {' or '.join(runs)}", "name a run of finetune.py"):
            pairs, protocol = test_rows(args, runs)
        protocols[next(iter(runs))] = protocol
    findings.check_same(protocols)  # before hours of answering

    # Answers, kept in a model's run, or in `out`, by a name made of all they depend on
    for name, run in runs.items():
        specialties = [(pair.row, pair.specialty) for pair in pairs]
        made_of = digest(protocol, specialties, args.dtype, weights[name], "" if run else hub.full_name(name))
        path = out / f"answers-{Path(name).name}-{made_of}.jsonl"
        if run:
            path = Path(name) / "evaluation" / f"answers-{made_of}.jsonl"
        answer_rows(name, run, pairs, protocol, args, path)
        answers[name] = findings.load_answers(path)
        answers[name].name = name  # not as it was typed then
        answers[name].run = run
    answers = [answers[name] for name in names]
    known = [a.name for a in answers]
    for a in answers:
        if known.count(a.name) > 1:  # files from elsewhere may bear the same name
            a.name = str(a.path)

    # Scores and comparisons
    notes = []
    against = next((a.name for a, name in zip(answers, names) if name == args.against), None)
    evaluation = findings.evaluate(answers, bert_scores(answers, args, notes), notes, against)

    # What is written
    table = table_of(evaluation)
    write_evaluation(out, evaluation)
    write_text(out / "table.txt", table + "\n")
    checkpoint.write_json(out / "evaluation.json", evaluation.to_json())

    # What is printed
    if evaluation.protocol["max_new_tokens"]:
        print_answers(evaluation, args.answers)
    print(f"\n{table}\n\nNLL: in nats per token of response and end of text. Intervals are in the report.")
    for sentence in (*evaluation.summary, *(v.sentence for v in evaluation.verdicts), *evaluation.notes):
        print(f"  {sentence}")
    print(f"wrote {out / 'report.html'} and what it is made of")


if __name__ == "__main__":
    main()
    distributed.end()
