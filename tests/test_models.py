"""The models against golden/ (made by golden/make_models.py): after every block, to 1e-5 of the largest
value, in fp32."""

import json
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sevloss import InputError
from sevloss.models import attention, load_model
from sevloss.models.attention import KVCache, PackedSequences
from sevloss.models.llama import RMSNorm, rope_settings, rotary_angles

CAUSAL = ["gpt2", "gpt2_scaled", "aragpt2", "bloom", "bloom_post", "llama", "qwen2", "qwen2_window", "qwen3",
          "lfm2"]
ALL = [*CAUSAL, "bert"]


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
    states = []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda module, args, output: states.append(output)))
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
        targets = torch.cat([F.pad(text[1:], (0, 1), value=-100) for text in tokens.split(lengths)])
        loss = F.cross_entropy(model(tokens, lengths) @ model.head_weight.T, targets)
    loss.backward()
    watched, = (key for key in expected if key.startswith("gradient."))
    assert_same(model.get_parameter(watched.removeprefix("gradient.")).grad, expected[watched])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_greedy_continuation(load, name):
    model, tokens, lengths, expected = load(name)
    for text, continuation in zip(tokens.split(lengths), expected["greedy"]):
        for token in continuation:
            assert (model(text, [len(text)])[-1] @ model.head_weight.T).argmax() == token
            text = torch.cat([text, token[None]])


@torch.no_grad()
def test_states_after_a_middle_block(load):
    """BERTScore reads a middle block; 0 is the embeddings."""
    model, tokens, lengths, expected = load("bert")
    for layer in range(4):
        assert_same(model.hidden_states(tokens, lengths, layer), expected[f"hidden.{layer}"])
    with pytest.raises(InputError, match="block 4 does not exist: the encoder has 3"):
        model.hidden_states(tokens, lengths, 4)


@pytest.mark.parametrize("name, rates, of_attention", [
    ("gpt2", ["embd_pdrop", "resid_pdrop"], "attn_pdrop"), ("bloom", ["hidden_dropout"], "attention_dropout"),
    ("llama", [], "attention_dropout"), ("qwen2", [], "attention_dropout"),
    ("qwen3", [], "attention_dropout"), ("lfm2", [], "attention_dropout"),
    ("bert", ["hidden_dropout_prob"], "attention_probs_dropout_prob")],
    ids=lambda value: value if isinstance(value, str) else "")
@torch.no_grad()
def test_dropout_rates(edited, golden, name, rates, of_attention):
    """Each rate of config.json acts while training, alone; with all at 0 (and in eval mode) nothing is
    dropped. That of attention never acts: flash has none, and training is the same on every device."""
    settings = {**dict.fromkeys(rates, 0.0), of_attention: 0.9}
    model = load_model(edited(name, **settings)).train()
    text = torch.arange(9)
    plain = load_model(golden / name)(text, [9])
    assert torch.equal(model(text, [9]), plain)
    for rate in rates:
        dropping = type(model)(replace(model.config, **{rate: 0.5})).train()
        dropping.load_state_dict(model.state_dict())
        assert not torch.allclose(dropping(text, [9]), plain, atol=0.1), rate


@pytest.mark.parametrize("name, context", [("gpt2", 29), ("aragpt2", 29), ("llama", 256), ("qwen2", 29),
                                           ("qwen3", 29), ("lfm2", 29), ("bert", 29)])
@torch.no_grad()
def test_longest_text(load, name, context):
    model = load(name)[0]
    assert model(torch.ones(context, dtype=torch.long), [context]).isfinite().all()
    with pytest.raises(InputError, match=f"a text has {context + 1} tokens, the model reads {context}"):
        model(torch.ones(context + 3, dtype=torch.long), [2, context + 1])


@torch.no_grad()
def test_alibi_sets_no_limit(edited, load):
    """BLOOM reads texts longer than those of its training; the loss of a long text is no error."""
    _, tokens, lengths, expected = load("bloom")
    assert_same(load_model(edited("bloom", seq_length=5))(tokens, lengths), expected["final"])


# ------------------------------------------------------------------ rotary positions

def test_rotary_angles_far_from_the_start(load):
    """In fp32, against fp64; and type "linear" spreads positions out."""
    config, positions = load("qwen2")[0].config, torch.tensor([0, 1, 257, 2001, 3999])
    default = {"rope_type": "default", "rope_theta": 50.0}
    linear = default | {"rope_type": "linear", "factor": 4.0}
    angles = positions.double()[:, None] * 50 ** (-torch.arange(0, 8, 2) / 8).double()
    for factor, parameters in ((1, default), (4, linear)):
        rope = rope_settings(replace(config, rope_parameters=parameters))
        cos, sin = rotary_angles(rope, positions * factor, 8)
        for ours, exact in ((cos, angles.cos()), (sin, angles.sin())):
            assert ours.dtype == torch.float32
            assert (ours[:, 0] - exact).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
def test_unknown_rotary_positions_are_refused(edited, name):
    """When the model is built, before anything is computed."""
    with pytest.raises(InputError, match="rotary positions of type 'yarn' in config.json are not known"):
        load_model(edited(name, rope_parameters={"rope_type": "yarn", "factor": 4.0}))


class Recording(PackedSequences):
    """Keeps what attention is given in the first block that has any."""

    def attention(self, q, k, v, layer, **options):
        if not hasattr(self, "rotated"):
            self.rotated = torch.cat([q, k], dim=1).float()
        return super().attention(q, k, v, layer, **options)


@pytest.mark.parametrize("how", ["weights in bf16", "autocast"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
@torch.no_grad()
def test_rotary_angles_are_fp32(edited, golden, name, how):
    """Far from the start q and k are turned as in fp32. Frequencies, positions or angles in bf16 would move
    them by an eighth of their length or more; the rest of bf16 moves them by 0.03 at most."""
    raw = json.loads((golden / name / "config.json").read_text())
    rope = raw["rope_parameters"] | {"rope_theta": 50.0}
    folder = edited(name, max_position_embeddings=4096, rope_parameters=rope)
    torch.manual_seed(0)
    tokens, rotated = torch.randint(53, (2000,)), []
    for half in (False, True):
        dtype = torch.bfloat16 if half and how == "weights in bf16" else torch.float32
        model = load_model(folder, dtype=dtype)
        sequences = Recording([2000], "cpu", causal=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half and how == "autocast"):
            model(tokens, cache=sequences)
        rotated.append(sequences.rotated[-500:])
    assert (rotated[1] - rotated[0]).norm() < 0.05 * rotated[0].norm()


@pytest.mark.parametrize("name", ["qwen3", "lfm2"])
@torch.no_grad()
def test_q_and_k_get_the_dtype_of_v(golden, name, monkeypatch):
    """On CUDA rms_norm is on autocast's fp32 list: flash would refuse q and k then, and the cache would hold
    fp32."""
    model = load_model(golden / name)
    norm = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: norm(self, x.float()))
    dtypes = set()
    attend = PackedSequences.attention
    monkeypatch.setattr(PackedSequences, "attention", lambda self, q, k, v, *rest, **options: (
        dtypes.update((q.dtype, k.dtype, v.dtype)) or attend(self, q, k, v, *rest, **options)))
    cache = KVCache([9], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(9), cache=cache)
    assert dtypes == {torch.bfloat16}
    assert {t.dtype for pair in cache.buffers.values() for t in pair} == {torch.bfloat16}


@torch.no_grad()
def test_autocast_does_not_round_the_weight_of_a_norm():
    """Those of q and k get 16 bits from a linear layer; in them 1.001 is 1."""
    norm = RMSNorm(8, eps=1e-6)
    norm.weight.fill_(1.001)
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    exact = 1.001 * x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x).double(), exact, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ packed sequences

@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_sequences_do_not_see_each_other(load, name):
    """Hidden states of a text stay when its neighbours change; without the boundary they would not."""
    model, tokens, lengths, _ = load(name)
    texts = tokens.split(lengths)
    for text, other in permutations(texts, 2):
        alone = model(text, [len(text)])
        for before, after in ((other, text), (other[-1:], other), (text.flip(0), other[:2])):
            packed = torch.cat([before, text, after])
            own = slice(len(before), len(before) + len(text))
            assert_same(model(packed, [len(before), len(text), len(after)])[own], alone)
            joint = model(packed, [len(packed)])[own]
            assert (joint - alone).abs().max() > 0.01 * alone.abs().max()


def heads(lengths, q_heads=4, kv_heads=2, d=8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(sum(lengths), count, d) for count in (q_heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


# name -> causal, slopes, window
SLOPES = torch.tensor([0.5, 0.125, 0.03, 0.7])
KINDS = {"causal": (True, None, None), "bidirectional": (False, None, None), "alibi": (True, SLOPES, None),
         "window": (True, None, 3)}


def masked_attention(lengths, causal, slopes, window):
    """attention(q, k, v, scale) with a mask over all tokens of all sequences at once."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(sum(lengths))
    distance = at[:, None] - at
    visible = sequence[:, None] == sequence
    if causal:
        visible = visible & (distance >= 0) & (distance < (window or torch.inf))
    penalty = 0 if slopes is None else slopes[:, None, None] * distance

    def attend(q, k, v, scale):
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))  # each kv head serves two query heads
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale - penalty
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    return attend


@pytest.mark.parametrize("causal, slopes, window", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["SDPA", "products"])
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 7, 7, 3, 1]], ids=str)
def test_attention_in_runs_and_padded_are_the_same(lengths, causal, slopes, window, dtype):
    """The CPU's route (in all but fp32 it learns by plain products), the CUDA route without flash, and
    attention spelled out with a mask over all tokens: outputs and gradients."""
    sequences = PackedSequences(lengths, "cpu", causal=causal)
    results = []
    for route in (masked_attention(lengths, causal, slopes, window),
                  partial(sequences._cpu_attention, slopes=slopes, window=window),
                  partial(sequences._padded_attention, slopes=slopes, window=window)):
        qkv = heads(lengths, dtype=dtype)
        out = route(*qkv, scale=0.3)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in qkv)])
    for result in results[1:]:
        for ours, reference in zip(result, results[0]):
            assert_same(ours, reference)


def test_attention_by_products_is_for_learning_short_texts(monkeypatch):
    """It would keep too much of longer ones, and SDPA is the more exact where nothing is learnt."""
    called = []
    monkeypatch.setattr(attention, "manual_attention", lambda q, k, v, *rest: called.append(q.shape[2]) or q)
    lengths = [3, attention.MANUAL_MAX_LENGTH, attention.MANUAL_MAX_LENGTH + 1]
    q, k, v = heads(lengths, dtype=torch.bfloat16)
    sequences = PackedSequences(lengths, "cpu", causal=True)
    sequences.attention(q, k, v)
    assert called == [3, attention.MANUAL_MAX_LENGTH]
    with torch.no_grad():
        sequences.attention(q, k, v)
    sequences.attention(q.float(), k.float(), v.float())
    assert len(called) == 2


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "window"])
def test_flash_route_is_called_as_it_wants(kind):
    """Shapes and arguments only: on the meta device nothing is computed. ALiBi does not go through flash."""
    causal, _, window = KINDS[kind]
    qkv = [t.to("meta", torch.bfloat16) for t in heads([3, 4])]
    out = PackedSequences([3, 4], "meta", causal=causal)._flash_attention(*qkv, 0.3, window)
    assert out.shape == (7, 4, 8)


@pytest.mark.parametrize("dtype, head_dim, capability, takes", [
    (torch.bfloat16, 64, (8, 0), True), (torch.float16, 256, (9, 0), True),
    (torch.bfloat16, 64, (7, 5), False), (torch.float32, 64, (9, 0), False),
    (torch.bfloat16, 12, (9, 0), False), (torch.bfloat16, 264, (9, 0), False)])
def test_what_flash_takes(monkeypatch, dtype, head_dim, capability, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.flash_takes(torch.empty(3, 2, head_dim, dtype=dtype)) is takes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal, slopes, window", KINDS.values(), ids=KINDS)
def test_attention_on_a_gpu(causal, slopes, window, dtype):
    lengths, results = [1, 7, 7, 3, 1], []
    for device in ("cpu", "cuda"):
        qkv = heads(lengths, dtype=dtype)
        q, k, v = (t.to(device) for t in qkv)
        options = {"window": window, "slopes": None if slopes is None else slopes.to(device)}
        out = PackedSequences(lengths, device, causal=causal).attention(q, k, v, **options)
        out.float().square().sum().backward()
        results.append([out.cpu(), *(t.grad for t in qkv)])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


@pytest.mark.parametrize("lengths", [[5], [1, 7, 2, 2, 1, 4]], ids=str)
def test_convolution_of_the_history_against_torch(lengths):
    """Outputs and gradients, one text at a time through conv1d."""
    torch.manual_seed(0)
    x, weight = torch.randn(sum(lengths), 6), torch.randn(6, 3)
    results = []
    for whole in (True, False):
        xi, wi = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if whole:
            history = PackedSequences(lengths, "cpu", causal=True).history(xi, 3)  # (N, 3, D)
            out = (history * wi.T).sum(1)
        else:
            texts = [F.conv1d(F.pad(text.T, (2, 0)), wi[:, None], groups=6).T for text in xi.split(lengths)]
            out = torch.cat(texts)
        out.square().sum().backward()
        results.append([out, xi.grad, wi.grad])
    for ours, reference in zip(*results):
        assert_same(ours, reference)


def test_positions_start_anew_in_each_sequence():
    sequences = PackedSequences([2, 1, 3], "cpu", causal=True)
    assert sequences.positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert sequences.cu_seqlens.tolist() == [0, 2, 3, 6] and sequences.cu_seqlens.dtype == torch.int32
    for lengths in ([], [2, 0]):
        with pytest.raises(ValueError, match="lengths must be positive"):
            PackedSequences(lengths, "cpu", causal=True)


# ------------------------------------------------------------------ decoding with a cache

@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_cache_is_the_same_as_none(load, name, monkeypatch):
    """Token by token, with texts of several lengths of which one after the other ends, in a buffer that grows
    several times."""
    monkeypatch.setattr(KVCache, "ROOM", 3)
    model, tokens, lengths, expected = load(name)
    written, rows = list(tokens.split(lengths)), list(range(len(lengths)))
    go_on = {4: [row for row in rows if row != 2], 9: [1]}
    cache = KVCache(lengths, "cpu")
    assert_same(model(tokens, cache=cache), expected["final"])
    for step in range(16):
        cache.advance()
        if step in go_on:
            cache.select([rows.index(row) for row in go_on[step]])
            rows = go_on[step]
        new = expected["greedy"][rows, step]
        for row, token in zip(rows, new):
            written[row] = torch.cat([written[row], token[None]])
        texts = [written[row] for row in rows]
        uncached = model(torch.cat(texts), [len(text) for text in texts])
        lasts = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
        assert_same(model(new, cache=cache), uncached[lasts])


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "lfm2"])
@torch.no_grad()
def test_cache_stops_at_the_context(load, name):
    """One clear line rather than an index error when a text outgrows the model while it is written."""
    model = load(name)[0]
    cache = KVCache([28, 3], "cpu")
    model(torch.ones(31, dtype=torch.long), cache=cache)
    cache.advance()
    model(torch.ones(2, dtype=torch.long), cache=cache)
    cache.advance()
    with pytest.raises(InputError, match="a text has 30 tokens, the model reads 29"):
        model(torch.ones(2, dtype=torch.long), cache=cache)
