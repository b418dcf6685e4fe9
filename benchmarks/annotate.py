"""Severity probabilities for complaints: class_logits against `transformers` with padded batches; rows/s.

    python benchmarks/annotate.py [--data TABLE] [--rows 256] [--batch 32] [--dtype bf16|fp32] [--repeat 3]

BERT's base shape with random weights and 64,000 pieces, a 3-class head, the same weights and ids on both
sides. The peer pads each batch to its longest row, in the table's order. Tokenisation is not timed. Both
sides take turns in one process; their logits must agree to 0.02 (fp32: 1e-4).
"""

import argparse
import statistics
import sys
import tempfile

import torch
from turns import DTYPE, add_size_arguments, bert_config, machine, need, print_row, ratio, size_of, take_turns

from sevloss import data, device
from sevloss.classifier import annotate
from sevloss.inputs import tables
from sevloss.models import from_scratch, load_model, save_model
from sevloss.models.tiny import tiny_bert


@torch.no_grad()  # in inference mode autocast would cast the weights anew for every batch
def padded_logits(model, id_lists, compute, batch_size):
    logits = []
    with compute.autocast():
        for start in range(0, len(id_lists), batch_size):
            batch = id_lists[start:start + batch_size]
            longest = max(map(len, batch))
            tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
            logits.append(model(input_ids=tokens, attention_mask=mask).logits.float())
    return torch.cat(logits)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--repeat", type=int, default=3)
    add_size_arguments(parser)
    args = parser.parse_args()
    need("transformers")
    from transformers import BertForSequenceClassification

    pairs = tables.read_pairs(args.data, needed=("complaint",))[:args.rows]
    complaints = [pair.complaint for pair in pairs]
    config = bert_config(**size_of(args)) | {"num_labels": 3}
    _, tokenizer = tiny_bert(complaints, num_labels=3, vocab_size=min(20_000, config["vocab_size"]))
    ids, _ = data.encode_and_cut(tokenizer, complaints, 512)
    compute = device.choose("cpu", args.dtype)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(from_scratch(config), tokenizer, folder)
        ours = load_model(folder)
        theirs = BertForSequenceClassification.from_pretrained(folder).eval()

    seconds, logits = take_turns({
        "sevloss": lambda: annotate.class_logits(ours, ids, compute),
        "transformers": lambda: padded_logits(theirs, ids, compute, args.batch)}, args.repeat)
    difference = (logits["sevloss"] - logits["transformers"]).abs().max().item()
    if difference > (0.02 if args.dtype == "bf16" else 1e-4):
        sys.exit(f"the logits differ by up to {difference:.1e}")

    lengths = sorted(map(len, ids))
    print(f"{len(ids)} complaints of {lengths[0]} to {lengths[-1]} tokens, {args.dtype}, {machine()}, "
          f"freed memory kept; logits differ by at most {difference:.1e}")
    for name, values in seconds.items():
        print(f"{name:13} {len(ids) / statistics.median(values):7.1f} rows/s")
    print_row(f"severity of complaints, BERT base shape, {args.dtype}",
              "`transformers`, padded in the table's order",
              f"{ratio(seconds['transformers'], seconds['sevloss'])} times the rows/s")


if __name__ == "__main__":
    main()
