"""Severity probabilities for complaints: class_logits against `transformers` with dynamic padding in the table's order; rows/s.

    python benchmarks/annotate.py [--data TABLE] [--rows 256] [--batch 32] [--dtype bf16|fp32] [--repeat 3]

BERT's base shape with random weights and 64,000 pieces, a 3-class head, the same weights and ids on both sides; tokenisation is not timed.
Both sides take turns in one process; their logits must agree to 0.02 (fp32: 1e-4).
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from turns import DTYPE, machine, need, print_row, ratio, take_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss import device  # noqa: E402
from sevloss.classifier import annotate  # noqa: E402
from sevloss.inputs import tables  # noqa: E402
from sevloss.models import from_scratch, load_model, save_model  # noqa: E402
from sevloss.models.tiny import tiny_bert  # noqa: E402


@torch.inference_mode()
def peer(model, ids, compute, batch):
    logits = []
    for start in range(0, len(ids), batch):
        part = ids[start:start + batch]
        longest = max(map(len, part))
        tokens = torch.tensor([i + [0] * (longest - len(i)) for i in part])
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in part])
        with compute.autocast():
            logits.append(model(input_ids=tokens, attention_mask=mask).logits.float())
    return torch.cat(logits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=tables.SAMPLE)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    need("transformers")
    from transformers import BertForSequenceClassification
    compute = device.choose("cpu", args.dtype)
    pairs = tables.read_pairs(args.data, needed=("complaint",))[:args.rows]
    _, tokenizer = tiny_bert([p.complaint for p in pairs], num_labels=3, vocab_size=20_000)
    ids, _ = annotate.encode_complaints(tokenizer, [p.complaint for p in pairs], preprocess="none", max_length=512)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(from_scratch(dict(model_type="bert", vocab_size=64_000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                                     intermediate_size=3072, num_labels=3)), tokenizer, folder)
        ours, theirs = load_model(folder), BertForSequenceClassification.from_pretrained(folder).eval()
    sides = {"sevloss": lambda: annotate.class_logits(ours, ids, compute), "transformers": lambda: peer(theirs, ids, compute, args.batch)}
    seconds, logits = take_turns(sides, args.repeat)
    difference = (logits["sevloss"] - logits["transformers"]).abs().max().item()
    if difference > (0.02 if args.dtype == "bf16" else 1e-4):
        sys.exit(f"the logits differ by up to {difference:.1e}")
    tokens = sorted(map(len, ids))
    print(f"{len(ids)} complaints of {tokens[0]} to {tokens[-1]} tokens (median {tokens[len(ids) // 2]}), {args.dtype}, "
          f"{machine()}, freed memory kept; logits differ by at most {difference:.1e}")
    for name, values in seconds.items():
        print(f"{name:13} {len(ids) / statistics.median(values):7.1f} rows/s")
    print_row(f"severity of complaints, BERT base shape, {args.dtype}", "`transformers`, padded in the table's order",
              f"{ratio(seconds['transformers'], seconds['sevloss'])} times the rows/s")


if __name__ == "__main__":
    main()
