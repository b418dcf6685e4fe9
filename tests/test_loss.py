"""The loss against a fp64 oracle, against F.cross_entropy, and in the places where others go wrong."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sevloss import loss as module
from sevloss.loss import linear_weighted_token_ce, severity_weights, weighted_token_ce


def oracle(hidden, head, targets, weights, bias=None, denominator=None):
    """sum(w * nll) / denominator in fp64, term by term."""
    logits = hidden.double() @ head.double().T + (0 if bias is None else bias.double())
    rows = [row for row in zip(logits, targets, weights) if row[1] != -100]
    total = sum(w.double() * (torch.logsumexp(z, -1) - z[t]) for z, t, w in rows)
    return total / (denominator if denominator is not None else max(1, int((targets != -100).sum())))


def problem(n=37, d=12, v=53, dtype=torch.float32, seed=0, scale=1.0, zeros=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    head = (torch.randn(v, d, generator=g) * scale).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    weights = torch.rand(n, generator=g) + 0.5
    if zeros and n > 4:
        targets[::5], weights[1::7] = -100, 0.0
    return hidden, head, targets, weights


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Small problems fit into one chunk; small ones make them take the path of large problems."""
    if request.param == "many chunks":
        monkeypatch.setattr(module, "_chunk_sizes", lambda *_: (32, 5))
        monkeypatch.setattr(module, "SLICE", 10)


# ------------------------------------------------------------------ severity_weights

def test_severity_weights_are_the_papers():
    p = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(severity_weights(p), torch.tensor([0.5, 1.0, 1.5, 1.15]))
    torch.testing.assert_close(severity_weights(p, (0.25, 1, 1.75)), torch.tensor([0.25, 1.0, 1.75, 1.225]))
    assert severity_weights(torch.rand(4, 5, 3)).shape == (4, 5)
    assert severity_weights([0, 0, 1]).item() == 1.5
    with pytest.raises(ValueError, match="shape"):
        severity_weights(torch.rand(3, 2))


def test_one_token():
    """The shapes (V,) and () are a case of (..., V) and (...)."""
    logits = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(weighted_token_ce(logits, torch.tensor(1), torch.tensor(2.0)),
                               -2 * logits.log_softmax(0)[1])


def test_severity_weights_stay_fp32():
    """Under autocast, and of probabilities in 16 bits: 16 bits tell only some 200 weights below 1 apart."""
    p = torch.tensor([[0.2, 0.3, 0.5], [0.1234, 0.2345, 0.6421]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(severity_weights(p), torch.tensor([1.15, 1.25935]))
    assert severity_weights(p.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------ weighted_token_ce

def test_weight_one_is_cross_entropy():
    logits, targets = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
    targets[0, 3:] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(weighted_token_ce(logits, targets), expected)
    linear = linear_weighted_token_ce(logits.flatten(0, 1), torch.eye(11), targets.flatten())
    torch.testing.assert_close(linear, expected)


def test_weights_per_row_reach_their_row_only():
    """The published code multiplies (B,1,1) weights with (B,T) losses: (B,B,T), whose mean forgets which row
    is severe."""
    logits, targets = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    w = torch.tensor([0.5, 1.0, 1.5])
    nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T)
    right = (nll * w[:, None]).mean()
    published = (nll * w[:, None, None]).mean()
    torch.testing.assert_close(published, w.mean() * nll.mean())
    assert (published - right).abs() > 1e-3
    for weights in (w, w[:, None], w[:, None].expand(3, 5)):
        torch.testing.assert_close(weighted_token_ce(logits, targets, weights), right)
    for shape in [(3, 1, 1), (5,), (1, 5), (1, 3), (), (3, 5, 1)]:
        with pytest.raises(ValueError, match="do not fit"):
            weighted_token_ce(logits, targets, torch.ones(shape))


def test_square_batch_is_not_ambiguous():
    """B = T: weights (B,) belong to rows, never to positions."""
    logits, targets, w = torch.randn(4, 4, 7), torch.randint(7, (4, 4)), torch.rand(4)
    expected = weighted_token_ce(logits, targets, w[:, None].expand(4, 4))
    torch.testing.assert_close(weighted_token_ce(logits, targets, w), expected)


def test_denominator_is_the_count_never_the_sum_of_weights():
    logits, targets = torch.randn(6, 9), torch.tensor([1, 2, -100, 3, -100, 4])
    w = torch.full((6,), 2.0)
    torch.testing.assert_close(weighted_token_ce(logits, targets, w), 2 * F.cross_entropy(logits, targets))
    hidden, head = torch.randn(6, 5), torch.randn(9, 5)
    expected = 2 * F.cross_entropy(hidden @ head.T, targets)
    torch.testing.assert_close(linear_weighted_token_ce(hidden, head, targets, w), expected)


def test_micro_batches_add_up_to_the_whole_batch():
    """Ragged micro-batches against one denominator give the gradient of the whole batch; means of means do
    not."""
    hidden, head, targets, weights = problem(n=40)

    def loss(rows, denominator=None):
        return linear_weighted_token_ce(hidden[rows], head, targets[rows], weights[rows],
                                        denominator=denominator)
    whole = gradients(loss(slice(40), 40), hidden, head)
    bounds = [0, 3, 20, 39, 40]
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    summed = gradients(sum(loss(part, 40) for part in parts), hidden, head)
    of_means = gradients(sum(loss(part) for part in parts) / 4, hidden, head)
    for a, b, c in zip(whole, summed, of_means):
        torch.testing.assert_close(a, b)
        assert relative(c, a) > 0.2


# ------------------------------------------------------------------ linear_weighted_token_ce

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_fp64_oracle(seed, with_bias, chunks):
    n, d, v = [(1, 3, 2), (5, 1, 7), (16, 8, 100), (17, 9, 31), (64, 4, 257), (130, 20, 11)][seed]
    hidden, head, targets, weights = problem(n, d, v, seed=seed)
    bias = torch.randn(v).requires_grad_() if with_bias else None
    inputs = [hidden, head] + ([bias] if with_bias else [])
    denominator = [None, 3.5, torch.tensor(7)][seed % 3]
    actual = linear_weighted_token_ce(hidden, head, targets, weights, bias=bias, denominator=denominator)
    expected = oracle(hidden, head, targets, weights, bias, denominator)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(actual, *inputs), gradients(expected, *inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradcheck(chunks):
    hidden, head, targets, weights = problem(9, 4, 6, torch.float64)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def loss(hidden, head, bias):
        return linear_weighted_token_ce(hidden, head, targets, weights.double(), bias=bias, denominator=4.0)
    assert torch.autograd.gradcheck(loss, (hidden, head, bias))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_sixteen_bits(dtype, tolerance, chunks):
    hidden, head, targets, weights = problem(100, 32, 300, dtype, scale=0.3)
    bias = torch.randn(300).to(dtype).requires_grad_()
    actual = linear_weighted_token_ce(hidden, head, targets, weights, bias=bias)
    expected = oracle(hidden, head, targets, weights, bias)
    assert actual.dtype == torch.float32
    assert relative(actual, expected) < 1e-3
    for a, b in zip(gradients(actual, hidden, head, bias), gradients(expected, hidden, head, bias)):
        assert a.dtype == dtype
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast_keeps_fp32_gradients_of_fp32_parameters(dtype, tolerance):
    hidden, head, targets, weights = problem(100, 32, 300, scale=0.3)
    with torch.autocast("cpu", dtype=dtype):
        actual = linear_weighted_token_ce(hidden, head, targets, weights)
    expected = oracle(hidden, head, targets, weights)
    assert actual.dtype == torch.float32
    for a, b in zip(gradients(actual, hidden, head), gradients(expected, hidden, head)):
        assert a.dtype == torch.float32
        assert 0 < relative(a, b) < tolerance


def test_head_gradient_is_summed_in_fp32(monkeypatch):
    """One token in every row: summing its gradient over many chunks in bf16 would stop growing after 256
    equal terms."""
    monkeypatch.setattr(module, "_chunk_sizes", lambda *_: (16, 16))
    hidden = torch.ones(16 * 1000, 4, dtype=torch.bfloat16)
    head = torch.zeros(8, 4, dtype=torch.bfloat16).requires_grad_()
    loss = linear_weighted_token_ce(hidden, head, torch.zeros(len(hidden), dtype=torch.long), denominator=1)
    assert gradients(loss, head)[0][0, 0].item() == pytest.approx(-16_000 * 7 / 8, rel=0.01)


def test_fp16_under_a_grad_scaler():
    """1 / denominator must meet the scaler's factor before anything is rounded to fp16: 1/100,000 alone would
    underflow."""
    hidden, head, targets, weights = problem(64, 16, 1000, scale=0.1)
    expected = gradients(oracle(hidden, head, targets, weights, denominator=100_000), hidden, head)
    half, half_head = hidden.detach().half().requires_grad_(), head.detach().half().requires_grad_()
    loss = linear_weighted_token_ce(half, half_head, targets, weights, denominator=100_000)
    for a, b in zip(gradients(loss * 65_536, half, half_head), expected):
        assert a.isfinite().all()
        assert relative(a.double() / 65_536, b) < 5e-3


def test_fp16_small_entries_survive_at_a_real_vocabulary():
    """Most softmax entries here are near 1e-8, and a weight of 1 / 300 joins them: fp16 ends at 6e-8."""
    hidden, head, targets, _ = problem(2, 16, 64_000, scale=1.0, zeros=False)
    weights = torch.tensor([1 / 300, 1 / 20])
    expected = gradients(oracle(hidden, head, targets, weights, denominator=16), hidden, head)
    half, half_head = hidden.detach().half().requires_grad_(), head.detach().half().requires_grad_()
    loss = linear_weighted_token_ce(half, half_head, targets, weights, denominator=16)
    d_hidden, d_head = (g.double() / 65_536 for g in gradients(loss * 65_536, half, half_head))
    assert relative(d_hidden, expected[0]) < 5e-3
    assert relative(d_head, expected[1]) < 5e-3
    errors = (d_head - expected[1]).norm(dim=1) / expected[1].norm(dim=1)  # word by word
    assert errors.median() < 0.05  # small entries are all that most words get


def test_fp16_sums_stay_in_range():
    """The same target in 500 rows: sums of lifted entries must not pass fp16's 65,504."""
    hidden, head = torch.full((500, 4), 8.0).half(), torch.zeros(10, 4).half().requires_grad_()
    loss = linear_weighted_token_ce(hidden, head, torch.zeros(500, dtype=torch.long))
    d_head, = gradients(loss, head)
    torch.testing.assert_close(d_head[0].float(), torch.full((4,), -0.9 * 8), rtol=2e-3, atol=0)


def test_fp16_weights_that_carry_the_denominator():
    hidden, head, targets, weights = problem(64, 16, 1000, scale=0.1)
    weights = weights / 10_000_000
    expected = gradients(oracle(hidden, head, targets, weights, denominator=1), hidden, head)
    half, half_head = hidden.detach().half().requires_grad_(), head.detach().half().requires_grad_()
    loss = linear_weighted_token_ce(half, half_head, targets, weights, denominator=1)
    for a, b in zip(gradients(loss * 65_536, half, half_head), expected):
        assert relative(a.double() / 65_536, b) < 5e-3


def test_extreme_logits():
    """A target whose probability underflows still has its exact loss."""
    hidden, head = torch.tensor([[1.0]]).requires_grad_(), torch.tensor([[500.0], [-500.0]])
    loss = linear_weighted_token_ce(hidden, head, torch.tensor([1]))
    assert loss.item() == 1000.0
    assert gradients(loss, hidden)[0].item() == 1000.0


def test_tied_embedding_gets_both_gradients():
    table, tokens = torch.randn(20, 6, requires_grad=True), torch.randint(20, (9,))
    tied = gradients(linear_weighted_token_ce(table[tokens].tanh(), table, tokens.roll(-1)), table)[0]
    expected = gradients(F.cross_entropy(table[tokens].tanh() @ table.T, tokens.roll(-1)), table)[0]
    torch.testing.assert_close(tied, expected)


def test_linear_in_the_weights():
    hidden, head, targets, weights = problem(zeros=False)
    other = torch.rand_like(weights)

    def f(w):
        loss = linear_weighted_token_ce(hidden, head, targets, w)
        return [loss.detach(), *gradients(loss, hidden, head)]
    for a, b, c in zip(f(2 * weights + 3 * other), f(weights), f(other)):
        torch.testing.assert_close(a, 2 * b + 3 * c)


def test_upstream_gradient_and_repeated_backward():
    hidden, head, targets, weights = problem()
    loss = linear_weighted_token_ce(hidden, head, targets, weights)
    once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    scaled = torch.autograd.grad(loss, (hidden, head), torch.tensor(-3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, head))
    for a, b, c in zip(once, scaled, again):
        torch.testing.assert_close(b, -3 * a)
        assert torch.equal(a, c)


def test_rows_of_weight_zero_cost_nothing_and_harm_nothing():
    hidden, head, targets, weights = problem(zeros=False)
    weights[3], targets[5] = 0, -100
    with torch.no_grad():
        hidden[3], hidden[5] = float("inf"), float("nan")
    assert weighted_token_ce(hidden @ head.T, targets, weights).isfinite()
    loss = linear_weighted_token_ce(hidden, head, targets, weights)
    d_hidden, d_head = gradients(loss, hidden, head)
    assert loss.isfinite() and d_head.isfinite().all() and d_hidden.isfinite().all()
    assert not d_hidden[3].any() and not d_hidden[5].any()


def test_without_ignore_index_every_row_counts():
    """Weight 0 too, and a target of -100 is an error. The default denominator is the number of rows."""
    hidden, head, targets, weights = problem(zeros=False)
    weights[3] = 0
    loss = linear_weighted_token_ce(hidden, head, targets, weights, ignore_index=None)
    expected = oracle(hidden, head, targets, weights)
    torch.testing.assert_close(loss.double(), expected)
    for a, b in zip(gradients(loss, hidden, head), gradients(expected, hidden, head)):
        torch.testing.assert_close(a, b)
    targets[3] = -100
    with pytest.raises(ValueError, match="-100 is outside"):
        linear_weighted_token_ce(hidden, head, targets, weights, ignore_index=None)


def test_nothing_is_read_back_from_the_device(monkeypatch):
    """Fake tensors have no values, so whatever needs one fails: on a GPU it would wait for the device."""
    monkeypatch.setattr(module, "_check_range", lambda *_: None)  # on a GPU the kernel asserts
    with FakeTensorMode() as mode:
        hidden, head, targets, weights = (mode.from_tensor(t) for t in problem())
        linear_weighted_token_ce(hidden, head, targets, weights, ignore_index=None).backward()
        assert hidden.grad.shape == hidden.shape and head.grad.shape == head.shape
        with pytest.raises(DynamicOutputShapeException):  # how many rows count
            linear_weighted_token_ce(hidden, head, targets, weights)


class Kernels(TorchDispatchMode):
    """Counts what would be launched on a GPU, and the most bytes that were alive at once."""

    NONE = {"slice", "split", "permute", "unsqueeze", "detach", "alias", "empty_like", "new_empty",
            "promote_types"}

    def __init__(self):
        super().__init__()
        self.launches, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.launches += function.__name__.split(".")[0] not in self.NONE
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_and_memory_on_a_gpu(dtype):
    """On the meta device, with the sizes of any device that is no CPU. A launch takes 5 us on a GPU."""
    n, d, v = 8192, 896, 151_936
    hidden = torch.empty(n, d, device="meta", dtype=torch.bfloat16, requires_grad=True)
    head = torch.empty(v, d, device="meta", dtype=dtype, requires_grad=True)
    targets, weights = torch.empty(n, device="meta", dtype=torch.long), torch.empty(n, device="meta")
    with Kernels() as kernels:
        loss = module._LinearWeightedTokenCE.apply(hidden, head, None, targets, weights, 16, torch.bfloat16)
    with Kernels() as backward:
        loss.backward()
    assert kernels.launches + backward.launches <= 260
    given = hidden.nbytes + (head.nbytes if dtype == torch.bfloat16 else 0)  # views of it count as alive
    gradients_made = hidden.nbytes + 4 * v * d
    assert kernels.peak - given - gradients_made < 1.5 * 2 ** 30


@pytest.mark.parametrize("ignore_index", [None, -100])
def test_compiled(ignore_index):
    """torch.compile of a function that calls it. Traced, not turned into machine code, which would take half
    a minute and a compiler."""
    def loss(hidden, head):
        return 2 * linear_weighted_token_ce(hidden.tanh(), head, targets, weights, ignore_index=ignore_index)
    hidden, head, targets, weights = problem(zeros=ignore_index is not None)
    compiled = torch.compile(loss, backend="aot_eager")(hidden, head)
    expected = loss(hidden, head)
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(gradients(compiled, hidden, head), gradients(expected, hidden, head)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("all_zero", ["ignored", "weight 0", "no rows"])
def test_nothing_supervised_gives_zero_with_a_graph(all_zero):
    hidden, head, targets, weights = problem(n=0 if all_zero == "no rows" else 6, zeros=False)
    if all_zero == "ignored":
        targets[:] = -100
    else:
        weights[:] = 0
    losses = [linear_weighted_token_ce(hidden, head, targets, weights),
              weighted_token_ce(hidden @ head.T, targets, weights)]
    if all_zero != "ignored":
        losses.append(linear_weighted_token_ce(hidden, head, targets, weights, ignore_index=None))
    for loss in losses:
        assert loss.item() == 0
        d_hidden, d_head = gradients(loss, hidden, head)
        assert not d_hidden.any() and not d_head.any()


def test_frozen_head_makes_no_head_gradient(monkeypatch):
    hidden, head, targets, weights = problem()
    head.requires_grad_(False)
    shapes, strides = [], []
    original = torch.mm

    def mm(a, b, **options):
        shapes.append((a.shape[0], b.shape[1]))
        strides.append(options["out"].stride(0))
        return original(a, b, **options)
    monkeypatch.setattr(torch, "mm", mm)
    loss = linear_weighted_token_ce(hidden, head, targets, weights)
    expected = gradients(oracle(hidden, head, targets, weights), hidden)
    torch.testing.assert_close(gradients(loss, hidden), expected, rtol=1e-4, atol=1e-6)
    kept = int(((targets != -100) & (weights != 0)).sum())
    assert shapes == [(kept, 53), (kept, 12)]  # logits, d hidden; ignored rows and dW are absent
    assert strides[0] == 56  # rows of logits are aligned, whatever the vocabulary


def test_clear_errors():
    hidden, head, targets, weights = problem(zeros=False)
    for bad in (53, -1):
        wrong = targets.clone()
        wrong[2] = bad
        with pytest.raises(ValueError, match=f"target {bad} is outside 0..52"):
            linear_weighted_token_ce(hidden, head, wrong)
        with pytest.raises(ValueError, match=f"target {bad} is outside 0..52"):
            weighted_token_ce(hidden @ head.T, wrong)
    for arguments in [(hidden, head[:, :3], targets), (hidden, head, targets[:3]),
                      (hidden, head, targets, weights[:, None])]:
        with pytest.raises(ValueError, match="fit|must be"):
            linear_weighted_token_ce(*arguments)
    with pytest.raises(ValueError, match="bias"):
        linear_weighted_token_ce(hidden, head, targets, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="detach"):
        linear_weighted_token_ce(hidden, head, targets, weights.requires_grad_())


def test_double_backward_is_refused():
    hidden, head, targets, weights = problem()
    loss = linear_weighted_token_ce(hidden, head, targets, weights)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_loss_imports_torch_alone():
    source = open(module.__file__, encoding="utf-8").read()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} == {"torch"}
