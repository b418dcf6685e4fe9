"""sevloss.bertscore against the package bert-score: time, and how far the scores are apart.

    pip install bert-score==0.3.13 transformers==5.23.0
    python benchmarks/bertscore.py [--ckpt CHECKPOINT] [--layer 9] [--data TABLE] [--rows 64] [--repeat 3]

Without --ckpt: a BERT with random weights in the shape of bert-base-multilingual-cased and a tokenizer trained on the texts. Responses
of the table are scored against other responses of it. All contenders read the same folder, hold their model loaded, and run in turn in
one process, on the CPU, with the same threads, texts and order. Ratios are the package's time over ours, round by round; differences
are those of F between ours and the package's, which is fp32. Ours in fp32 must agree to 1e-6.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from turns import DTYPE, machine, need, print_row, ratio, take_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss import check_positive, device, report_errors  # noqa: E402
from sevloss.evaluation.bertscore import Scorer  # noqa: E402
from sevloss.inputs import tables  # noqa: E402
from sevloss.models import from_scratch, load_model, load_tokenizer, save_model  # noqa: E402
from sevloss.models.tiny import tiny_bert  # noqa: E402

MBERT = dict(model_type="bert", vocab_size=119_547, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def write_checkpoint(ckpt, texts, folder):
    """Weights in fp32 and a tokenizer_config.json with a longest length, without which the package overflows."""
    if ckpt is None:
        torch.manual_seed(0)
        model, tokenizer = from_scratch(MBERT), tiny_bert(texts, num_labels=0)[1]
    else:
        model, tokenizer = load_model(ckpt), load_tokenizer(ckpt)
    save_model(model, tokenizer, folder)
    first, last = tokenizer.encode("").tokens  # [CLS] and [SEP], whatever this tokenizer calls them
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context, "cls_token": first,
             "sep_token": last, "pad_token": tokenizer.id_to_token(model.raw_config.get("pad_token_id") or 0)}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")


def choose_texts(table, rows):
    """2 x rows different responses, spread over the table -> candidates, references."""
    responses = list(dict.fromkeys(pair.response for pair in tables.read_pairs(table, needed=("complaint", "response"))))
    rows = min(rows, len(responses) // 2)
    chosen = [responses[i * len(responses) // (2 * rows)] for i in range(2 * rows)]
    return chosen[::2], chosen[1::2]


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="an encoder; default: random weights")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--rows", type=int, default=64, help="pairs to score")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    check_positive(args, "rows", "repeat")
    need("bert_score", "transformers")
    from bert_score import BERTScorer
    candidates, references = choose_texts(args.data, args.rows)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.ckpt, candidates + references, folder)
        ours = {dtype: Scorer.load(folder, args.layer, compute=device.choose("cpu", dtype)) for dtype in {"fp32", DTYPE}}
        package = BERTScorer(model_type=folder, num_layers=args.layer, device="cpu")
    scorers = {"package": package, **ours}
    seconds, scores = take_turns({name: lambda scorer=scorer: scorer.score(candidates, references)[2] for name, scorer in scorers.items()},
                                 args.repeat)
    print(f"{len(candidates):,} pairs, {args.ckpt or 'random weights'}, block {args.layer}, {machine()}, freed memory kept; "
          f"median (min to max) of {args.repeat} rounds")
    differences = {dtype: scores[dtype] - scores["package"] for dtype in ours}
    if (worst := differences["fp32"].abs().max()) > 1e-6:
        sys.exit(f"fp32 differs by {worst:.1e}")
    for dtype, d in differences.items():
        print(f"{dtype}: F differs by {d.abs().max():.1e} at most, {d.abs().mean():.1e} on average, the mean F by {d.mean():+.1e}")
        print_row(f"BERTScore, mBERT shape, {dtype}", "`bert-score`, fp32",
                  f"{ratio(seconds['package'], seconds[dtype])} times as fast; F differs by at most {d.abs().max():.0e}")


if __name__ == "__main__":
    main()
