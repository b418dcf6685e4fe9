"""The severity-weighted loss in TRL's SFTTrainer: columns prompt, completion and weight.

    PYTHONPATH=. python examples/trl_sft.py [CHECKPOINT]

CHECKPOINT: a name on the hub, a folder, or a run of finetune.py (with --lora: its merged/). A row whose
prompt alone fills max_length has nothing to learn, but counts as an example: leave such rows out. To paste it
elsewhere, copy sevloss/loss.py beside it and import from `loss`. Made for trl 1.16 and transformers 5.19 or
newer.
"""

import json
import sys

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sevloss.loss import severity_weights, weighted_token_ce


class WithWeights:
    """Any collator, and the column `weight` as weights (B,)."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        return {**self.collator(rows), "weights": torch.tensor([row["weight"] for row in rows])}


class SeveritySFTTrainer(SFTTrainer):
    """Leave packing and padding_free off: one weight belongs to one row. TRL's own metrics are not logged."""

    loss_is_scaled_for_ga = True  # else Trainer might divide by the accumulation steps again

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = WithWeights(self.data_collator)

    def get_batch_samples(self, *args):
        """Trainer counts tokens for num_items_in_batch; the paper's mean is over the examples of the step."""
        batches, _ = super().get_batch_samples(*args)
        examples = sum(len(batch["labels"]) for batch in batches)
        examples = torch.tensor(float(examples), device=self.args.device)
        return batches, self.accelerator.reduce(examples, "mean")  # as gradients are averaged over devices

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        targets = inputs["labels"][:, 1:]  # position t is scored on token t + 1
        lengths = (targets != -100).sum(1).clamp(min=1)  # the paper's L
        if model.training:
            # For a mean over tokens: inputs["weights"] alone here, and in get_batch_samples the sum of
            # (batch["labels"][:, 1:] != -100).sum().item().
            weights, denominator = inputs["weights"] / lengths, num_items_in_batch
        else:  # unweighted; Trainer itself weighs each batch by its number of examples
            weights, denominator = 1 / lengths, len(targets)
        loss = weighted_token_ce(outputs.logits[:, :-1], targets, weights, denominator=denominator)
        return (loss, outputs) if return_outputs else loss


def read(path):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    probabilities = torch.tensor([(row["Non-Critical"], row["Neutral"], row["Critical"]) for row in rows])
    return Dataset.from_dict({"prompt": [f"\n{row['Question']}\n\nالاجابة:\n" for row in rows],
                              "completion": [row["Answer"] for row in rows],
                              "weight": severity_weights(probabilities).tolist()})


def main(ckpt="aubmindlab/aragpt2-base", out="runs/trl_sft", max_steps=-1, trainer_class=SeveritySFTTrainer):
    sides = read("data/sample.jsonl").train_test_split(test_size=24, seed=0)
    args = SFTConfig(
        out, per_device_train_batch_size=2, gradient_accumulation_steps=8, learning_rate=5e-5,
        num_train_epochs=3, max_steps=max_steps, max_length=512, completion_only_loss=True, report_to="none",
        bf16=False,  # True on Ampere and newer
        remove_unused_columns=False)  # else `weight` is dropped before the collator sees it
    trainer = trainer_class(ckpt, args, train_dataset=sides["train"], eval_dataset=sides["test"])
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    print(f"unweighted loss on the held-out rows: {loss:.4f}")
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:2])
