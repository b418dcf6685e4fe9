"""CUDA against the CPU, for every family: outputs, gradients, one optimizer step, greedy answers.

    python -m pytest -m cuda

The CPU computes in fp32. On the GPU fp32 runs without TF32 and must agree to 1e-5; bf16 and fp16 run under autocast, as
finetune.py does, and must agree to BOUNDS. All differences are norms, relative to the norm on the CPU.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from sevloss import data, device
from sevloss.evaluation.bertscore import Scorer
from sevloss.generate import generate
from sevloss.loss import linear_weighted_token_ce, weighted_token_ce
from sevloss.models import enable_gradient_checkpointing, from_scratch, lora
from sevloss.optimizer import adamw

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda"
BOUNDS = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
LENGTHS = [3, 9, 9, 21, 40]
COMMON = dict(vocab_size=517, eos_token_id=0)  # no multiple of 8, as in GPT-2
GPT2 = dict(COMMON, n_positions=64, n_embd=64, n_layer=2, n_head=4, embd_pdrop=0.0, attn_pdrop=0.0,
            resid_pdrop=0.0)
LLAMA = dict(COMMON, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)
BERT = dict(vocab_size=517, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            hidden_dropout_prob=0.0, num_labels=3)
CAUSAL = {
    "gpt2": dict(GPT2, model_type="gpt2"),
    "gpt2 with heads of 12": dict(GPT2, model_type="gpt2", n_embd=48),  # flash takes multiples of 8 alone
    "aragpt2": dict(GPT2, model_type="aragpt2"),
    "bloom": dict(COMMON, model_type="bloom", hidden_size=64, n_layer=2, n_head=4),
    "llama": dict(LLAMA, model_type="llama"),
    "qwen2": dict(LLAMA, model_type="qwen2", tie_word_embeddings=True),
    "qwen2 with a window": dict(LLAMA, model_type="qwen2", use_sliding_window=True, sliding_window=8,
                                max_window_layers=1),
    "qwen3": dict(LLAMA, model_type="qwen3", head_dim=32),
    "lfm2": dict(LLAMA, model_type="lfm2", num_hidden_layers=3,
                 layer_types=["conv", "full_attention", "conv"]),
}
ENCODERS = {
    "bert": dict(BERT, model_type="bert", pooler=True, pooling="first"),
    "bert without pooler": dict(BERT, model_type="bert", pooler=False, pooling="mean"),
}


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=BOUNDS)
def compute(request):
    return device.Compute(torch.device(DEVICE), device.DTYPES[request.param], "")


def assert_near(cuda, cpu, compute):
    __tracebackhide__ = True
    difference = (cuda.detach().cpu().float() - cpu.detach()).norm() / cpu.detach().norm().clamp(min=1e-12)
    bound = next(BOUNDS[name] for name, dtype in device.DTYPES.items() if dtype == compute.dtype)
    assert difference < bound, f"differs by {difference:.1e}, bound {bound}"


def two_models(config):
    """The same model on the CPU and on the GPU; weights enlarged, so that attention is not uniform."""
    torch.manual_seed(0)
    model = from_scratch(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 3
    return model, copy.deepcopy(model).to(DEVICE)


def batch():
    """tokens (N,), supervised positions (S,), targets (S,), weights (S,)"""
    torch.manual_seed(1)
    tokens = torch.randint(1, 517, (sum(LENGTHS),))
    index = torch.arange(0, sum(LENGTHS), 2)
    return tokens, index, torch.randint(517, (len(index),)), torch.rand(len(index)) + 0.5


def step(model, compute, tokens, index, targets, weights):
    """Hidden states and loss of one optimizer step, as finetune.py makes it. The gradients stay."""
    optimizer = adamw(model, 1e-3, 0.01)
    scaler = compute.grad_scaler()
    with compute.autocast():
        hidden = model(tokens, LENGTHS)
        loss = linear_weighted_token_ce(hidden.index_select(0, index), model.head_weight, targets, weights,
                                        denominator=len(index), ignore_index=None)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    scaler.step(optimizer)
    return hidden, loss


def compare_steps(models, compute):
    on_cpu, on_cuda = models
    before = {name: p.detach().clone() for name, p in on_cpu.named_parameters()}
    arguments = batch()
    cpu_hidden, cpu_loss = step(on_cpu, device.Compute(torch.device("cpu"), torch.float32, ""), *arguments)
    hidden, loss = step(on_cuda, compute, *[tensor.to(DEVICE) for tensor in arguments])
    assert_near(hidden, cpu_hidden, compute)
    assert_near(loss, cpu_loss, compute)
    trained = {name: p for name, p in on_cpu.named_parameters() if p.requires_grad}
    parameters = dict(on_cuda.named_parameters())
    assert_near(torch.cat([parameters[name].grad.flatten() for name in trained]),
                torch.cat([p.grad.flatten() for p in trained.values()]), compute)
    for name, p in trained.items():
        assert parameters[name].grad.dtype == parameters[name].dtype
        if compute.dtype == torch.float32 and p.grad.norm() > 1e-4:  # AdamW makes the sign of a tiny gradient a step
            moved = (parameters[name].detach().cpu() - before[name])
            assert (moved - (p.detach() - before[name])).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("name", CAUSAL)
def test_training_step(name, compute):
    compare_steps(two_models(CAUSAL[name]), compute)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "lfm2"])
def test_training_step_with_checkpointing(name, compute):
    models = two_models(CAUSAL[name])
    for model in models:
        enable_gradient_checkpointing(model.train())
    compare_steps(models, compute)


@pytest.mark.parametrize("name, checkpointing", [("gpt2", True), ("bloom", False), ("qwen3", False), ("lfm2", False)])
def test_training_step_with_compiled_blocks(name, checkpointing, compute):
    """finetune.py --compile. Compiling takes some seconds each time."""
    on_cpu, on_cuda = two_models(CAUSAL[name])
    if checkpointing:
        enable_gradient_checkpointing(on_cuda)
    for block in on_cuda.blocks:
        block.compile(dynamic=True)
    compare_steps((on_cpu, on_cuda), compute)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bloom"])
def test_training_step_with_lora(name, compute):
    """The base is in the dtype it is computed in, as finetune.py holds it."""
    on_cpu, on_cuda = two_models(CAUSAL[name])
    for model in (on_cpu, on_cuda):
        torch.manual_seed(2)
        lora.attach(model, 4, alpha=8)
    on_cuda.load_state_dict(on_cpu.state_dict())
    for parameter in on_cuda.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute.dtype)
    compare_steps((on_cpu, on_cuda), compute)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_answers(name, compute):
    """fp32: the same tokens. In 16 bits near ties may fall otherwise: each token is nearly the likeliest on
    the CPU."""
    on_cpu, on_cuda = two_models(CAUSAL[name])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
    with compute.autocast():
        answers = generate(on_cuda, prompts, max_new_tokens=12, eos_ids=(7, 0))
    if compute.dtype == torch.float32:
        assert answers == generate(on_cpu, prompts, max_new_tokens=12, eos_ids=(7, 0))
    for prompt, answer in zip(prompts, answers):
        ids = prompt + answer
        with torch.no_grad():
            logits = F.linear(on_cpu(torch.tensor(ids), [len(ids)]), on_cpu.head_weight)[len(prompt) - 1:-1]
        behind = logits.max(-1).values - logits.gather(-1,
                                                       torch.tensor(answer, dtype=torch.long)[:,
                                                                                              None]).squeeze(-1)
        assert (behind < 0.1 * logits.std(-1)).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_classifier(name, compute):
    on_cpu, on_cuda = two_models(ENCODERS[name])
    tokens = batch()[0]
    labels = torch.tensor([0, 2, 1, 1, 0])
    logits = on_cpu.classify(tokens, LENGTHS)
    F.cross_entropy(logits, labels).backward()
    with compute.autocast():
        cuda_logits = on_cuda.classify(tokens.to(DEVICE), LENGTHS)
        loss = F.cross_entropy(cuda_logits.float(), labels.to(DEVICE))
    loss.backward()
    assert_near(cuda_logits, logits, compute)
    named = dict(on_cuda.named_parameters())
    learnt = [name for name, p in on_cpu.named_parameters() if p.grad is not None]
    assert_near(torch.cat([named[name].grad.flatten() for name in learnt]),
                torch.cat([on_cpu.get_parameter(name).grad.flatten() for name in learnt]), compute)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["", "frozen head"])
@pytest.mark.parametrize("vocabulary", [517, 50_257])
def test_fused_loss(vocabulary, frozen_head, compute):
    """Against logits in fp64, on several chunks."""
    torch.manual_seed(0)
    hidden = torch.randn(3000, 64)
    head = 0.3 * torch.randn(vocabulary, 64)
    targets = torch.randint(vocabulary, (3000,))
    weights = torch.rand(3000) + 0.5
    reference = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    expected = weighted_token_ce(reference[0] @ reference[1].T, targets, weights)
    expected.backward()
    on_cuda = [hidden.to(DEVICE).requires_grad_(), head.to(DEVICE).requires_grad_(not frozen_head)]
    scaler = compute.grad_scaler()
    with compute.autocast():
        loss = linear_weighted_token_ce(*on_cuda, targets.to(DEVICE), weights.to(DEVICE))
    scaler.scale(loss).backward()
    assert_near(loss, expected.float(), compute)
    for tensor, exact in zip(on_cuda, reference):
        if tensor.requires_grad:
            assert_near(tensor.grad / scaler.get_scale(), exact.grad.float(), compute)


def test_evaluation_and_batches(compute):
    """Likelihoods of a padded-free batch made on the host, and the vectors of BERTScore."""
    on_cpu, on_cuda = two_models(CAUSAL["qwen2"])
    ids = torch.randint(1, 517, (90,)).numpy().astype("int32")
    lengths = torch.tensor([10, 30, 50], dtype=torch.int32).numpy()
    examples = data.Examples(ids, lengths, lengths // 2, torch.ones(3, 3).numpy())
    from sevloss.evaluation.scores import response_nll
    on_the_cpu = response_nll(on_cpu, examples, device.Compute(torch.device("cpu"), torch.float32, ""))
    assert_near(response_nll(on_cuda, examples, compute), on_the_cpu.float(), compute)

    on_cpu, on_cuda = two_models(ENCODERS["bert"])
    texts = {"a": [1, 2, 3], "b": [4, 5, 6, 7]}
    on_the_cpu = device.Compute(torch.device("cpu"), torch.float32, "")
    with torch.no_grad():
        expected = Scorer(on_cpu, None, 2, on_the_cpu)._unit_vectors(texts)
        found = Scorer(on_cuda, None, 2, compute)._unit_vectors(texts)
    for text in texts:
        assert_near(found[text], expected[text], compute)
