"""The severity-weighted loss in a plain PyTorch loop, with gradient accumulation.

    PYTHONPATH=. python examples/plain_loop.py

To paste it elsewhere, copy sevloss/loss.py beside it and import from `loss`.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from sevloss.loss import severity_weights, weighted_token_ce

EOS = 0
ROWS = [  # complaint, response, probabilities of (non-critical, neutral, critical)
    ("عندي زكام خفيف", "اشرب سوائل دافئة.", (0.90, 0.08, 0.02)),
    ("صداع منذ يومين", "خذ مسكنا وراجع الطبيب إن استمر.", (0.30, 0.60, 0.10)),
    ("ألم شديد في الصدر وضيق نفس", "اذهب إلى الطوارئ الآن.", (0.01, 0.04, 0.95)),
    ("حكة بعد لدغة بعوضة", "ضع كمادة باردة.", (0.85, 0.13, 0.02)),
]


class ToyModel(nn.Module):
    """(B, T) ids -> (B, T, V) logits. Any module that does this will do."""
    def __init__(self, vocabulary=256, width=64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.gru(self.embedding(ids))[0])


def encode(complaint, response, probabilities):
    """-> ids (T,), labels (T,) with -100 over the prompt, weight (). The tokens are bytes here."""
    prompt = list(f"{complaint}\n".encode())
    answer = [*response.encode(), EOS]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return torch.tensor(ids), torch.tensor(labels), severity_weights(probabilities)


def collate(examples):
    """-> ids (B, T), labels (B, T), weights (B,), padded on the right."""
    ids, labels, weights = zip(*examples)
    ids = pad_sequence(ids, batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return ids, labels, torch.stack(weights)


def train_step(model, optimizer, micro_batches):
    """One optimizer step on a list of collated micro-batches -> its loss, however they were cut."""
    examples = sum(len(labels) for _, labels, _ in micro_batches)  # of the whole step
    total = 0.0
    for ids, labels, weights in micro_batches:
        targets = labels[:, 1:]  # position t is scored on token t + 1
        lengths = (targets != -100).sum(1).clamp(min=1)  # the paper's L
        # For a mean over tokens: `weights` alone, and as denominator the sum of (labels[:, 1:] != -100).sum()
        # over micro_batches.
        loss = weighted_token_ce(model(ids)[:, :-1], targets, weights / lengths, denominator=examples)
        loss.backward()  # gradients add up
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def main(steps=40):
    torch.manual_seed(0)
    model = ToyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    examples = [encode(*row) for row in ROWS]
    micro_batches = [collate(examples[i:i + 2]) for i in range(0, len(examples), 2)]
    losses = []
    for step in range(steps):
        losses.append(train_step(model, optimizer, micro_batches))
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
