"""The severity-weighted loss in transformers.Trainer, right under accumulation and on several devices.

    PYTHONPATH=. python examples/hf_trainer.py [CHECKPOINT] [--fused]

CHECKPOINT: a name on the hub, a folder, or a run of finetune.py (with --lora: its merged/). --fused: a
batch's logits are never held. To paste it elsewhere, copy sevloss/loss.py beside it and import from `loss`.
Needs accelerate and transformers 5.19 or newer.
"""

import argparse
import json

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sevloss.loss import linear_weighted_token_ce, severity_weights, weighted_token_ce


class SeverityTrainer(Trainer):
    """Batches hold input_ids, attention_mask, labels (B, T), -100 where nothing is learned, weights (B,)."""

    loss_is_scaled_for_ga = True  # else Trainer might divide by the accumulation steps again

    def get_batch_samples(self, *args):
        """Trainer counts tokens for num_items_in_batch; the paper's mean is over the examples of the step."""
        batches, _ = super().get_batch_samples(*args)
        examples = sum(len(batch["labels"]) for batch in batches)
        examples = torch.tensor(float(examples), device=self.args.device)
        return batches, self.accelerator.reduce(examples, "mean")  # as gradients are averaged over devices

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        targets, weights, denominator = self.targets_and_weights(model, inputs, num_items_in_batch)
        loss = weighted_token_ce(outputs.logits[:, :-1], targets, weights, denominator=denominator)
        return (loss, outputs) if return_outputs else loss

    def targets_and_weights(self, model, inputs, num_items_in_batch):
        """-> targets (B, T - 1), what a token of each row weighs (B,), and the denominator of the sum."""
        targets = inputs["labels"][:, 1:]  # position t is scored on token t + 1
        lengths = (targets != -100).sum(1).clamp(min=1)  # the paper's L
        if not model.training:  # unweighted; Trainer itself weighs each batch by its number of examples
            return targets, 1 / lengths, len(targets)
        # For a mean over tokens: inputs["weights"] alone here, and in get_batch_samples the sum of
        # (batch["labels"][:, 1:] != -100).sum().item().
        return targets, inputs["weights"] / lengths, num_items_in_batch


class FusedSeverityTrainer(SeverityTrainer):
    """The same step from the hidden states and the head's weight: the logits of a whole batch are never held.

    For models whose logits are lm_head(hidden) and nothing more: GPT-2, BLOOM, Llama, Qwen, LFM2 and others,
    but not Gemma 2, Cohere or Granite. The head must be whole on each device: DDP is fine, FSDP is not.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The whole model is called, not its base: DDP averages gradients only after a call of its forward.
        # It makes the logits of one position a row, which are not used.
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True,
                        logits_to_keep=1)
        hidden = outputs.hidden_states[-1][:, :-1].flatten(0, 1)  # (B * (T - 1), D), after the final norm
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        targets, weights, denominator = self.targets_and_weights(model, inputs, num_items_in_batch)
        weights = weights[:, None].expand_as(targets).flatten()  # (B * (T - 1),)
        with self.accelerator.autocast():  # accelerate gives hidden states back in fp32
            loss = linear_weighted_token_ce(hidden, head.weight, targets.flatten(), weights, bias=head.bias,
                                            denominator=denominator)
        return (loss, outputs) if return_outputs else loss


def collate(rows):
    """Dicts of input_ids, labels, weight -> a batch, padded on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {"input_ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "weights": torch.tensor([row["weight"] for row in rows])}


def read(path, tokenizer, max_length=512):
    start = [i for i in tokenizer("ا").input_ids[:1] if i == tokenizer.bos_token_id]  # where it puts a BOS
    rows = []
    for row in map(json.loads, open(path, encoding="utf-8")):
        prompt = start + tokenizer(f"\n{row['Question']}\n\nالاجابة:\n", add_special_tokens=False).input_ids
        answer = tokenizer(row["Answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        weight = severity_weights([row[name] for name in ("Non-Critical", "Neutral", "Critical")]).item()
        if len(prompt) < max_length:  # else nothing is left to learn, but it would count as an example
            rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length], "weight": weight})
    return rows


def main(ckpt="aubmindlab/aragpt2-base", out="runs/hf_trainer", max_steps=-1, trainer_class=SeverityTrainer):
    rows = read("data/sample.jsonl", AutoTokenizer.from_pretrained(ckpt))
    args = TrainingArguments(
        out, per_device_train_batch_size=2, gradient_accumulation_steps=8, learning_rate=5e-5,
        num_train_epochs=3, max_steps=max_steps, report_to="none",
        remove_unused_columns=False)  # else `weight` is dropped before the collator sees it
    model = AutoModelForCausalLM.from_pretrained(ckpt, dtype=torch.float32)  # 16 bits lose small updates
    trainer = trainer_class(model, args, collate, train_dataset=rows[24:], eval_dataset=rows[:24])
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    print(f"unweighted loss on the held-out rows: {loss:.4f}")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt", nargs="?", default="aubmindlab/aragpt2-base")
    parser.add_argument("--fused", action="store_true", help="never hold the logits of a batch")
    args = parser.parse_args()
    main(args.ckpt, trainer_class=FusedSeverityTrainer if args.fused else SeverityTrainer)
