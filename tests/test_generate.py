"""Decoding: the same as without cache and batch, and drawing that does not depend on the batch."""

from collections import Counter
from itertools import takewhile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sevloss import InputError
from sevloss.generate import _sample, generate
from sevloss.models import from_scratch

PROMPTS = [[5, 9, 3], [7], [2, 2, 8, 30, 11, 4, 1, 6], [40, 17], [12, 5, 5, 9, 33]]
STEPS = 12


@pytest.fixture(scope="module")
def model():
    """Its weights are enlarged, so that different prompts get different answers."""
    torch.manual_seed(1)
    model = from_scratch(dict(model_type="gpt2", vocab_size=50, n_positions=40, n_embd=32, n_layer=2,
                              n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 12 if parameter.ndim == 2 else 1
    return model


@pytest.fixture(scope="module")
@torch.no_grad()
def greedy(model):
    """Answers of the model itself, one prompt at a time, without a cache, to STEPS tokens."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor(prompt)
        for _ in range(STEPS):
            ids = torch.cat([ids, (model(ids, [len(ids)])[-1] @ model.head_weight.T).argmax()[None]])
        answers.append(ids[len(prompt):].tolist())
    assert len(set(map(tuple, answers))) == len(PROMPTS)  # or the tests are blind
    assert all(len(set(answer)) > 4 for answer in answers)
    return answers


def test_greedy_is_the_same_as_the_uncached_model(model, greedy):
    assert generate(model, PROMPTS, max_new_tokens=STEPS) == greedy
    assert [generate(model, [prompt], max_new_tokens=STEPS)[0] for prompt in PROMPTS] == greedy


def test_autocast_casts_each_weight_once(model):
    """A call, not a step: in inference_mode, or through a view, autocast would keep no cast."""
    weights = {p.data_ptr(): name for name, p in model.named_parameters() if p.ndim == 2}
    casts = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts[weights.get(args[0].data_ptr())] += 1
            return function(*args, **(kwargs or {}))
    with torch.autocast("cpu", torch.bfloat16), Casts():
        generate(model, PROMPTS, max_new_tokens=STEPS)
    del casts[None]
    assert set(casts.values()) == {1}
    assert len(casts) == len(weights) - 1  # all but the position embedding


def test_rows_stop_at_their_own_eos(model, greedy):
    """At different steps, and the others go on as if nothing had happened; EOS is not part of the answer."""
    eos = {greedy[4][0], greedy[1][4], greedy[2][5]}
    expected = [list(takewhile(lambda token: token not in eos, answer)) for answer in greedy]
    assert [len(answer) for answer in expected] == [STEPS, 4, 5, 6, 0]
    assert generate(model, PROMPTS, max_new_tokens=STEPS, eos_ids=tuple(eos)) == expected


SAMPLING = dict(max_new_tokens=STEPS, temperature=1.5, top_p=0.95)


def test_a_drawn_text_does_not_depend_on_its_batch(model):
    together = generate(model, PROMPTS, **SAMPLING)
    assert generate(model, PROMPTS[::-1], **SAMPLING) == together[::-1]
    assert [generate(model, [prompt], **SAMPLING)[0] for prompt in PROMPTS] == together
    eos = together[0][2]  # rows that end take none of the others' random numbers
    expected = [list(takewhile(lambda token: token != eos, text)) for text in together]
    assert generate(model, PROMPTS, **SAMPLING, eos_ids=(eos,)) == expected


def test_drawing_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    generate(model, PROMPTS, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_seeds_draw_other_texts(model):
    texts = [generate(model, PROMPTS, **SAMPLING, seed=seed) for seed in (0, 1, 2)]
    for row in zip(*texts):
        assert len(set(map(tuple, row))) == 3


@pytest.mark.parametrize("near_greedy", [dict(temperature=1.0, top_p=1e-6), dict(temperature=1e-4)], ids=str)
def test_small_top_p_or_temperature_is_greedy(model, greedy, near_greedy):
    assert generate(model, PROMPTS, max_new_tokens=STEPS, **near_greedy) == greedy


def test_frequencies_of_draws():
    """temperature and top_p mean what they say: of 0.5, 0.3, 0.15, 0.05 the first three reach 0.9."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    n = 20000
    draws = torch.rand(n, generator=torch.Generator().manual_seed(7))
    drawn = _sample((p.log() * 2).expand(n, 4), 2.0, 0.9, draws)
    share = drawn.bincount(minlength=4) / n
    torch.testing.assert_close(share, torch.tensor([0.15, 0.5, 0, 0.3]) / 0.95, atol=0.015, rtol=0)


def test_the_largest_draw_is_still_inside_top_p():
    """Sums of many probabilities are rounded: a draw near 1 must not fall off the end into the least likely
    token."""
    torch.manual_seed(0)
    logits = torch.randn(50, 20000)
    drawn = _sample(logits, 1.0, 0.9, torch.full((50,), 1 - 2 ** -24))
    probabilities = logits.softmax(-1)
    likelier = (probabilities * (probabilities > probabilities.gather(1, drawn[:, None]))).sum(-1)
    assert (likelier < 0.901).all()


def test_nothing_to_do(model):
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, PROMPTS, max_new_tokens=0) == [[] for _ in PROMPTS]


def test_too_long(model):
    """Said before anything is computed; up to the context it works."""
    assert len(generate(model, [[1] * 30, [2]], max_new_tokens=10)[0]) == 10
    with pytest.raises(InputError, match="need 41 tokens, the model reads 40"):
        generate(model, [[2], [1] * 30], max_new_tokens=11)
