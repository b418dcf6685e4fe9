"""Likelihood of responses against a loop over examples."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sevloss import data, device, metrics

CPU = device.choose("cpu", "fp32")


@pytest.fixture
def examples(rows, tiny):
    pairs = [data.Pair(i, row["Question"], row["Answer"], None, None, "", {}) for i, row in enumerate(rows[:20])]
    return data.encode_pairs(pairs, tiny[1], max_length=512, eos_id=0, preprocess="none")


@pytest.mark.parametrize("most_tokens", [1, 200, 4096])
@torch.no_grad()
def test_response_nll_is_a_sum_over_targets(examples, tiny, most_tokens):
    """In the order of the examples, whatever the batches; the prompt does not count, EOS does."""
    model, expected = tiny[0], []
    for i in range(len(examples)):
        ids = torch.tensor(examples.ids[examples.starts[i]:examples.starts[i + 1]], dtype=torch.long)
        logits = model(ids, [len(ids)]) @ model.head_weight.T
        first = examples.first_target[i]
        expected.append(sum(F.cross_entropy(logits[t - 1], ids[t]).item() for t in range(first, len(ids))))
    nll = metrics.response_nll(model, examples, CPU, most_tokens=most_tokens)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert len(set(expected)) == len(expected)  # or a wrong order would not show


def test_response_nll_switches_dropout_off(examples, tiny):
    model = tiny[0]
    model.train()
    metrics.response_nll(model, examples, CPU)
    assert not model.training


def test_perplexity_is_of_all_tokens_together():
    """A short response counts less than a long one: sums over sums."""
    score = metrics.per_token(torch.tensor([2.0, 30.0]), np.array([1, 9]))
    assert score["nll"] == pytest.approx(3.2)
    assert score["perplexity"] == pytest.approx(math.exp(3.2))
    assert metrics.per_token(torch.tensor([1e6]), np.array([1]))["perplexity"] < math.inf
    assert math.isnan(metrics.per_token(torch.tensor([]), np.array([]))["nll"])
