"""The severity-weighted loss in transformers.Trainer, normalised right under gradient accumulation and on several devices.

    PYTHONPATH=. python examples/hf_trainer.py [CHECKPOINT]       # a name on the hub, a folder, or a run of finetune.py

To paste it elsewhere, copy sevloss/loss.py beside it and import from `loss`. Needs transformers 5.19 or newer, and accelerate.
"""

import json
import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sevloss.loss import severity_weights, weighted_token_ce


class SeverityTrainer(Trainer):
    """Batches hold input_ids, attention_mask, labels (B, T) with -100 where there is nothing to learn, and weights (B,)."""

    loss_is_scaled_for_ga = True  # else Trainer might divide by the accumulation steps again

    def get_batch_samples(self, *args):
        """Trainer counts tokens for num_items_in_batch; the paper's mean is over the examples of the optimizer step."""
        batches, _ = super().get_batch_samples(*args)
        examples = torch.tensor(float(sum(len(batch["labels"]) for batch in batches)), device=self.args.device)
        return batches, self.accelerator.reduce(examples, "mean")  # gradients are averaged over devices, so the count is too

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        targets = inputs["labels"][:, 1:]  # position t is scored on token t + 1
        lengths = (targets != -100).sum(1).clamp(min=1)  # the paper's L
        # For a mean over tokens: `weights` alone here, and get_batch_samples sums (batch["labels"][:, 1:] != -100).sum().item().
        weights = inputs["weights"] / lengths
        if not model.training:  # evaluation treats all alike; Trainer weighs each batch by its number of examples
            weights, num_items_in_batch = 1 / lengths, len(targets)
        loss = weighted_token_ce(outputs.logits[:, :-1], targets, weights, denominator=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def collate(rows):
    """Dicts of input_ids, labels, weight -> a batch, padded on the right."""
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    return {"input_ids": pad_sequence(ids, batch_first=True), "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "weights": torch.tensor([row["weight"] for row in rows])}


def read(path, tokenizer, max_length=512):
    rows = []
    for row in map(json.loads, open(path, encoding="utf-8")):
        prompt = tokenizer(f"\n{row['Question']}\n\nالاجابة:\n", add_special_tokens=False).input_ids
        answer = tokenizer(row["Answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        weight = severity_weights([row[name] for name in ("Non-Critical", "Neutral", "Critical")])
        rows.append({"input_ids": (prompt + answer)[:max_length], "labels": ([-100] * len(prompt) + answer)[:max_length],
                     "weight": weight.item()})
    return rows


def main(ckpt="aubmindlab/aragpt2-base", out="runs/hf_trainer", max_steps=-1):
    rows = read("data/sample.jsonl", AutoTokenizer.from_pretrained(ckpt))
    args = TrainingArguments(out, per_device_train_batch_size=2, gradient_accumulation_steps=8, learning_rate=5e-5, num_train_epochs=3,
                             max_steps=max_steps, report_to="none",
                             remove_unused_columns=False)  # else `weight` is dropped before the collator sees it
    trainer = SeverityTrainer(AutoModelForCausalLM.from_pretrained(ckpt), args, collate, train_dataset=rows[24:], eval_dataset=rows[:24])
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    print(f"unweighted loss on the held-out rows: {loss:.4f}")
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:2])
