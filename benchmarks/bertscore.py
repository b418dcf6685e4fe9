"""sevloss's BERTScore against the package bert-score: time, and how far the scores are apart.

    python benchmarks/bertscore.py [--ckpt CHECKPOINT] [--layer 9] [--data TABLE] [--rows 64] [--repeat 3]

Without --ckpt: a BERT with random weights in the shape of bert-base-multilingual-cased and a tokenizer
trained on the texts. Responses of the table are scored against other responses of it. All sides read the
same folder, hold their model loaded, and take turns in one process, on the CPU. Ratios are the package's
time over ours, round by round; differences are those of F between ours and the package's, which is fp32.
Ours in fp32 must agree to 1e-6.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from turns import DTYPE, add_size_arguments, bert_config, machine, need, print_row, ratio, size_of, take_turns

from sevloss import check_positive, device, report_errors
from sevloss.evaluation.bertscore import Scorer
from sevloss.inputs import tables
from sevloss.models import from_scratch, load_model, load_tokenizer, save_model
from sevloss.models.tiny import tiny_bert

MBERT_VOCABULARY = 119_547


def write_checkpoint(args, texts, folder):
    """Weights in fp32; a tokenizer_config.json with a longest length, without which the package overflows."""
    if args.ckpt is None:
        torch.manual_seed(0)
        model = from_scratch(bert_config(**{"vocabulary": MBERT_VOCABULARY} | size_of(args)))
        _, tokenizer = tiny_bert(texts, num_labels=0)
    else:
        model, tokenizer = load_model(args.ckpt), load_tokenizer(args.ckpt)
    save_model(model, tokenizer, folder)
    cls, sep = tokenizer.encode("").tokens  # [CLS] and [SEP], whatever this tokenizer calls them
    pad = tokenizer.id_to_token(model.raw_config.get("pad_token_id") or 0)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context,
                "cls_token": cls, "sep_token": sep, "pad_token": pad}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def choose_texts(table, rows):
    """2 x rows different responses, spread over the table -> candidates, references."""
    pairs = tables.read_pairs(table, needed=("complaint", "response"))
    responses = list(dict.fromkeys(pair.response for pair in pairs))
    rows = min(rows, len(responses) // 2)
    texts = [responses[i * len(responses) // (2 * rows)] for i in range(2 * rows)]
    return texts[::2], texts[1::2]


@report_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="an encoder; default: random weights")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--rows", type=int, default=64, help="pairs to score")
    parser.add_argument("--repeat", type=int, default=3)
    add_size_arguments(parser)
    args = parser.parse_args()
    check_positive(args, "rows", "repeat")
    need("bert_score", "transformers")
    from bert_score import BERTScorer

    candidates, references = choose_texts(args.data, args.rows)
    dtypes = sorted({"fp32", DTYPE})
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args, candidates + references, folder)
        scorers = {"package": BERTScorer(model_type=folder, num_layers=args.layer, device="cpu")}
        for dtype in dtypes:
            scorers[dtype] = Scorer.load(folder, args.layer, compute=device.choose("cpu", dtype))
    sides = {name: partial(scorer.score, candidates, references) for name, scorer in scorers.items()}
    seconds, scores = take_turns(sides, args.repeat)

    print(f"{len(candidates):,} pairs, {args.ckpt or 'random weights'}, block {args.layer}, {machine()}, "
          f"freed memory kept; median (min to max) of {args.repeat} rounds")
    for dtype in dtypes:
        difference = scores[dtype][2] - scores["package"][2]  # precision, recall, F
        most = difference.abs().max()
        if dtype == "fp32" and most > 1e-6:
            sys.exit(f"fp32 differs by {most:.1e}")
        print(f"{dtype}: F differs by {most:.1e} at most, {difference.abs().mean():.1e} on average, "
              f"the mean F by {difference.mean():+.1e}")
        speed = ratio(seconds["package"], seconds[dtype])
        print_row(f"BERTScore, mBERT shape, {dtype}", "`bert-score`, fp32",
                  f"{speed} times as fast; F differs by at most {most:.0e}")


if __name__ == "__main__":
    main()
