"""The models against golden/ (made by golden/make_models.py): after every block, to 1e-5 of the largest value, in fp32."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sevloss import InputError
from sevloss.models import load_model
from sevloss.models.layout import Cache, Documents

CAUSAL = ["gpt2", "gpt2_scaled", "aragpt2"]
ALL = [*CAUSAL, "bert"]
KINDS = {"causal": True, "bidirectional": False}


@pytest.fixture
def load(golden):
    """name -> model, tokens (N,), lengths, what the reference makes of them"""
    def load(name):
        expected = load_file(golden / name / "expected.safetensors")
        return load_model(golden / name), expected["tokens"], expected["lengths"].tolist(), expected
    return load


def assert_same(ours, reference):
    __tracebackhide__ = True
    assert ours.shape == reference.shape
    difference = (ours - reference).abs().max() / reference.abs().max()
    assert difference < 1e-5, f"differs by {difference:.1e} of the largest value"


def hidden_states(model, tokens, lengths):
    """[what goes into the first block, what comes out of each]"""
    blocks = model.transformer["h"] if hasattr(model, "transformer") else model.bert["encoder"]["layer"]
    states = []
    hooks = [blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: states.append(output)) for block in blocks]
    model(tokens, lengths)
    for hook in hooks:
        hook.remove()
    return states


# ------------------------------------------------------------------ the same as the reference

@pytest.mark.parametrize("name", ALL)
def test_hidden_states_after_every_block(load, name):
    model, tokens, lengths, expected = load(name)
    states = hidden_states(model, tokens, lengths)
    assert len(states) == sum(key.startswith("hidden.") for key in expected)
    for i, state in enumerate(states):
        assert_same(state, expected[f"hidden.{i}"])
    assert_same(model(tokens, lengths), expected["final"])


@pytest.mark.parametrize("name", CAUSAL)
def test_logits(load, name):
    model, tokens, lengths, expected = load(name)
    assert_same(model(tokens, lengths) @ model.head_weight.T, expected["logits"])


def test_class_logits(load):
    model, tokens, lengths, expected = load("bert")
    assert_same(model.classify(tokens, lengths), expected["class_logits"])


@pytest.mark.parametrize("name", ALL)
def test_gradient(load, name):
    """Through every block, into the first one's attention."""
    model, tokens, lengths, expected = load(name)
    if name == "bert":
        loss = model.classify(tokens, lengths).square().sum()
    else:
        targets = torch.cat([F.pad(document[1:], (0, 1), value=-100) for document in tokens.split(lengths)])
        loss = F.cross_entropy(model(tokens, lengths) @ model.head_weight.T, targets)
    loss.backward()
    watched, = (key for key in expected if key.startswith("gradient."))
    assert_same(model.get_parameter(watched.removeprefix("gradient.")).grad, expected[watched])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_greedy_continuation(load, name):
    model, tokens, lengths, expected = load(name)
    for document, continuation in zip(tokens.split(lengths), expected["greedy"]):
        for token in continuation:
            assert (model(document, [len(document)])[-1] @ model.head_weight.T).argmax() == token
            document = torch.cat([document, token[None]])


@torch.no_grad()
def test_blocks_output(load):
    """BERTScore reads a middle block; 0 is the embeddings."""
    model, tokens, lengths, expected = load("bert")
    for layer in range(4):
        assert_same(model.blocks_output(tokens, lengths, layer), expected[f"hidden.{layer}"])
    with pytest.raises(InputError, match="block 4 does not exist: the encoder has 3"):
        model.blocks_output(tokens, lengths, 4)


@pytest.mark.parametrize("name, rates", [("gpt2", ["embd_pdrop", "attn_pdrop", "resid_pdrop"]),
                                         ("bert", ["hidden_dropout_prob", "attention_probs_dropout_prob"])])
@torch.no_grad()
def test_dropout_rates(edited, golden, name, rates):
    """Each rate of config.json acts while training, alone; with all at 0 (and in eval mode) nothing is dropped."""
    model, document = load_model(edited(name, **dict.fromkeys(rates, 0.0))).train(), torch.arange(9)
    plain = load_model(golden / name)(document, [9])
    assert torch.equal(model(document, [9]), plain)
    for rate in rates:
        dropping = type(model)(replace(model.config, **{rate: 0.5})).train()
        dropping.load_state_dict(model.state_dict())
        assert not torch.allclose(dropping(document, [9]), plain, atol=0.1), rate


@pytest.mark.parametrize("name, context", [("gpt2", 29), ("aragpt2", 29), ("bert", 29)])
@torch.no_grad()
def test_longest_text(load, name, context):
    model = load(name)[0]
    assert model(torch.ones(context, dtype=torch.long), [context]).isfinite().all()
    with pytest.raises(InputError, match=f"a text has {context + 1} tokens, the model reads {context}"):
        model(torch.ones(context + 3, dtype=torch.long), [2, context + 1])


# ------------------------------------------------------------------ documents in one stream

@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_documents_do_not_see_each_other(load, name):
    """Hidden states of a document stay when its neighbours change; without the boundary they would not."""
    model, tokens, lengths, _ = load(name)
    first, middle, last = tokens.split(lengths)
    alone = model(middle, [len(middle)])
    for before, after in ((first, last), (last, first), (middle.flip(0), middle.flip(0)), (first[:1], middle)):
        stream, where = torch.cat([before, middle, after]), slice(len(before), len(before) + len(middle))
        assert_same(model(stream, [len(before), len(middle), len(after)])[where], alone)
        joint = model(stream, [len(stream)])[where]
        assert (joint - alone).abs().max() > 0.01 * alone.abs().max()


def heads(lengths, q_heads=4, kv_heads=2, d=8, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(sum(lengths), count, d, dtype=dtype, requires_grad=True) for count in (q_heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("causal", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 7, 7, 3, 1]], ids=str)
def test_attention_in_runs_and_padded_are_the_same(lengths, causal):
    """The CPU's path, the CUDA path without flash, and attention spelled out with a mask over the whole stream: outputs and gradients."""
    layout = Documents(lengths, "cpu", causal=causal)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = document[:, None] == document
    visible = visible.tril() if causal else visible

    def spelled_out(q, k, v, dropout, scale):
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))  # each kv head serves two query heads
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    results = []
    for attend in (spelled_out, layout._attend_in_runs, layout._attend_padded):
        qkv = heads(lengths)
        out = attend(*qkv, 0.0, 0.3)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in qkv)])
    for result in results[1:]:
        for ours, reference in zip(result, results[0]):
            assert_same(ours, reference)


@pytest.mark.parametrize("causal", KINDS.values(), ids=KINDS)
def test_flash_path_is_called_as_it_wants(causal):
    """Shapes and arguments only: on the meta device nothing is computed."""
    qkv = [t.to("meta", torch.bfloat16) for t in heads([3, 4])]
    assert Documents([3, 4], "meta", causal=causal)._attend_varlen(*qkv, 0.3).shape == (7, 4, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", KINDS.values(), ids=KINDS)
def test_attention_on_a_gpu(causal, dtype):
    lengths, results = [1, 7, 7, 3, 1], []
    for device in ("cpu", "cuda"):
        qkv = heads(lengths, dtype=dtype)
        out = Documents(lengths, device, causal=causal).attend(*(t.to(device) for t in qkv), 0)
        out.float().square().sum().backward()
        results.append([out.cpu(), *(t.grad for t in qkv)])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


def test_positions_start_anew_in_each_document():
    assert Documents([2, 1, 3], "cpu", causal=True).positions.tolist() == [0, 1, 0, 0, 1, 2]
    for lengths in ([], [2, 0]):
        with pytest.raises(ValueError, match="lengths must be positive"):
            Documents(lengths, "cpu", causal=True)


# ------------------------------------------------------------------ decoding with a cache

@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_cache_is_the_same_as_none(load, name):
    """Token by token, with documents of several lengths of which one after the other ends."""
    model, tokens, lengths, expected = load(name)
    written, alive, ends = list(tokens.split(lengths)), [0, 1, 2], {4: [0, 1], 9: [1]}
    cache = Cache(lengths, max(lengths) + 16, "cpu")
    assert_same(model.stream(tokens, cache), expected["final"])
    for step in range(16):
        cache.advance()
        if step in ends:
            cache.keep(torch.tensor([alive.index(document) for document in ends[step]]))
            alive = ends[step]
        new = expected["greedy"][alive, step]
        for document, token in zip(alive, new):
            written[document] = torch.cat([written[document], token[None]])
        texts = [written[document] for document in alive]
        uncached = model(torch.cat(texts), [len(text) for text in texts])
        lasts = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
        assert_same(model.stream(new, cache), uncached[lasts])


@torch.no_grad()
def test_cache_stops_at_the_context(load):
    """One clear line rather than an index error when a text outgrows the model while it is written."""
    model = load("gpt2")[0]
    cache = Cache([28, 3], 40, "cpu")
    model.stream(torch.ones(31, dtype=torch.long), cache)
    cache.advance()
    model.stream(torch.ones(2, dtype=torch.long), cache)
    cache.advance()
    with pytest.raises(InputError, match="a text has 30 tokens, the model reads 29"):
        model.stream(torch.ones(2, dtype=torch.long), cache)
