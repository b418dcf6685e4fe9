"""BERTScore to 1e-6 against golden/bertscore, which make_bertscore.py made with the package bert-score."""

import json

import pytest
import torch

from sevloss import InputError, device
from sevloss.evaluation import bertscore
from sevloss.evaluation.bertscore import Scorer, bert_score

LONG = "خذ الدواء بعد الأكل " * 20
EMPTY = ["", " ", "\n\t ", "\u200f"]  # a lone direction mark is no piece either


@pytest.fixture
def checkpoint(golden):
    return golden / "bertscore"


@pytest.fixture
def expected(checkpoint):
    return json.loads((checkpoint / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def pairs(expected):
    """candidates, references"""
    return [list(side) for side in zip(*expected["pairs"])]


@pytest.fixture
def fed(monkeypatch):
    """The documents of each forward pass, as id lists, filled as a Scorer works."""
    passes = []

    def watch(scorer):
        original = scorer.model.hidden_states

        def hidden_states(tokens, lengths, layer):
            passes.append([part.tolist() for part in tokens.split(lengths)])
            return original(tokens, lengths, layer)
        monkeypatch.setattr(scorer.model, "hidden_states", hidden_states)
        return passes
    return watch


def assert_scores(ours, rows):
    """rows: [precision, recall, f1] of each pair"""
    __tracebackhide__ = True
    assert [t.shape for t in ours] == [(len(rows),)] * 3
    difference = (torch.stack(ours, dim=1) - torch.tensor(rows)).abs()
    worst = int(difference.amax(1).argmax())
    assert difference.max() < 1e-6, f"pair {worst} differs by {difference.max():.1e}"


# ------------------------------------------------------------------ the same as the package

@pytest.mark.parametrize("block", range(4))
def test_every_block(checkpoint, expected, pairs, block):
    assert_scores(bert_score(*pairs, checkpoint, block), expected["scores"][str(block)])


# ------------------------------------------------------------------ texts of every kind

@pytest.mark.parametrize("empty", EMPTY)
def test_without_a_text_on_either_side_everything_is_zero_and_other_pairs_do_not_notice(checkpoint, empty):
    candidates, references = [empty, "نعم", empty, "خذ الدواء"], ["نعم", empty, empty, "الدواء"]
    scores = torch.stack(bert_score(candidates, references, checkpoint, 2))
    assert (scores[:, :3] == 0).all()
    alone = torch.stack(bert_score(["خذ الدواء"], ["الدواء"], checkpoint, 2))
    assert torch.allclose(scores[:, 3:], alone, atol=1e-6)


def test_no_pairs(checkpoint):
    assert [t.shape for t in bert_score([], [], checkpoint, 2)] == [(0,)] * 3


def test_names_of_special_tokens_in_a_text_are_text(checkpoint):
    """Else a "[SEP]" that a model writes would weigh nothing, and an answer of these alone would be empty."""
    precision, recall, f1 = bert_score(["[SEP]", "[CLS] [SEP]"], ["نعم", "نعم"], checkpoint, 2)
    assert (f1 > 0).all()


def test_cut_texts_are_counted_and_reported(checkpoint, capsys):
    scorer = Scorer.load(checkpoint, 2)
    long = scorer.score([LONG, "نعم", LONG + "."], ["نعم", LONG, "لا"])
    assert scorer.cut == 2
    assert "2 of 4 different texts were cut to 32 pieces" in capsys.readouterr().out
    end = scorer.tokenizer.encode(LONG).ids
    head = scorer.tokenizer.decode(end[1:31])
    of_head = torch.stack(scorer.score([head], ["نعم"])).squeeze(1)
    assert torch.allclose(of_head, torch.stack(long)[:, 0], atol=1e-6)
    assert scorer.cut == 0 and not capsys.readouterr().out  # 32 pieces are not too many


# ------------------------------------------------------------------ what is computed, and how often

def test_each_text_is_encoded_once_sorted_by_length(checkpoint, fed):
    scorer = Scorer.load(checkpoint, 2)
    passes = fed(scorer)
    scorer.score(["خذ الدواء بعد الأكل", " نعم", "لا ", "نعم"],
                 ["نعم", "نعم\n", "خذ الدواء بعد الأكل", "خذ الماء"])
    [documents] = passes
    assert len(documents) == len(set(map(tuple, documents))) == 4
    assert [len(d) for d in documents] == sorted(len(d) for d in documents)


def test_scores_do_not_depend_on_company_or_chunks(checkpoint, pairs, monkeypatch):
    scorer = Scorer.load(checkpoint, 3)
    together = torch.stack(scorer.score(*pairs))
    alone = torch.cat([torch.stack(scorer.score([c], [r])) for c, r in zip(*pairs)], dim=1)
    backwards = torch.stack(scorer.score(pairs[0][::-1], pairs[1][::-1])).flip(1)
    monkeypatch.setattr(bertscore, "MOST_HELD", 40)
    chunked = torch.stack(scorer.score(*pairs))
    for other in (alone, backwards, chunked):
        assert torch.allclose(other, together, atol=1e-6)


def test_memory_is_bounded(checkpoint, pairs, monkeypatch, fed):
    """With few vectors held at a time there are more passes, each below the bound."""
    scorer = Scorer.load(checkpoint, 3)
    passes = fed(scorer)
    monkeypatch.setattr(bertscore, "MOST_HELD", 70)
    scorer.score(*pairs)
    assert len(passes) > 3 and max(sum(map(len, documents)) for documents in passes) <= 70


def test_bf16_multiplies_in_bf16_is_near_and_comes_back_as_fp32(checkpoint, pairs):
    exact = torch.stack(bert_score(*pairs, checkpoint, 3))
    scorer, outputs = Scorer.load(checkpoint, 3, compute=device.choose("cpu", "bf16")), []
    linear = next(m for m in scorer.model.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: outputs.append(output.dtype))
    rough = torch.stack(scorer.score(*pairs))
    assert set(outputs) == {torch.bfloat16} and rough.dtype == torch.float32
    assert 1e-5 < (rough - exact).abs().max() < 0.02


def older_switch():
    torch.set_float32_matmul_precision("high")


def newer_switch():
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # from then on the older one cannot be asked


@pytest.mark.parametrize("allow_tf32", [older_switch, newer_switch])
def test_fp32_is_full_fp32_even_where_tf32_is_allowed(checkpoint, monkeypatch, allow_tf32):
    """Whichever switch the program around it used; all are as before in the end."""
    scorer, seen = Scorer.load(checkpoint, 2), []
    hidden_states = scorer.model.hidden_states
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    def watch(*arguments):
        seen.append([torch.get_float32_matmul_precision(), *(backend.fp32_precision for backend in backends)])
        return hidden_states(*arguments)
    monkeypatch.setattr(scorer.model, "hidden_states", watch)
    before = [backend.fp32_precision for backend in backends]
    allow_tf32()
    try:
        during = [backend.fp32_precision for backend in backends]
        scorer.score(["نعم"], ["لا"])
        assert seen == [["highest", "ieee", "ieee"]]
        assert [backend.fp32_precision for backend in backends] == during and "tf32" in during
        if allow_tf32 is older_switch:
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def test_a_classifier_is_an_encoder_too(checkpoint, edited, pairs):
    """A run of train_classifier.py has a head beside the encoder; the scores are the encoder's."""
    def with_head(tensors):
        return {f"bert.{name}": tensor for name, tensor in tensors.items()} | {
            "bert.pooler.dense.weight": torch.zeros(24, 24), "bert.pooler.dense.bias": torch.zeros(24),
            "classifier.weight": torch.zeros(3, 24), "classifier.bias": torch.zeros(3)}
    folder = edited("bertscore", with_head, id2label={"0": "a", "1": "b", "2": "c"})
    assert torch.equal(torch.stack(bert_score(*pairs, folder, 2)),
                       torch.stack(bert_score(*pairs, checkpoint, 2)))


# ------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("block", [-1, 4])
def test_block_that_does_not_exist(checkpoint, block):
    with pytest.raises(InputError, match=f"block {block}: .* has blocks 1 to 3"):
        bert_score(["نعم"], ["نعم"], checkpoint, block)


def test_causal_model(golden):
    with pytest.raises(InputError, match="is no encoder"):
        bert_score(["نعم"], ["نعم"], golden / "gpt2", 1)


def test_lists_of_different_length(checkpoint):
    with pytest.raises(ValueError, match="shorter"):
        bert_score(["نعم", "لا"], ["نعم"], checkpoint, 2)
