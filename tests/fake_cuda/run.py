# ruff: noqa: E402, the stub has to be loaded before torch
"""Runs the CUDA lines of sevloss on a fake device, and prints what it saw: one line of JSON a scenario.

    python tests/fake_cuda/run.py LIBRARY   # guard.cpp as a shared library, built by tests/test_fake_cuda.py

FakeTensorMode gives tensors with a shape, a dtype and the device cuda, but no values. The stub lets autograd
take them, so that forward pass, backward pass and optimizer run as on a GPU, on a PyTorch without CUDA.
`Observer` sees each operation. docs/cuda.md says what this cannot show.
"""

import ctypes
import sys

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import json
import re
import threading
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.attention.varlen  # registers the operation
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sevloss import data, device
from sevloss.classifier.annotate import class_logits
from sevloss.evaluation.bertscore import Scorer
from sevloss.evaluation.scores import response_nll
from sevloss.generate import generate
from sevloss.loss import linear_weighted_token_ce
from sevloss.models import FAMILIES, build, enable_gradient_checkpointing, lora
from sevloss.optimizer import adamw
from tests.test_cuda import CAUSAL, ENCODERS

ROOT = Path(__file__).parents[2]
FLASH = torch.ops.torch_attn._varlen_attn.default._schema
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
               "lift_fresh", "_unsafe_view", "record_stream")


# ------------------------------------------------------------------ what the fake device answers

CAPABILITY = [(9, 0)]  # of the GPU in the scenario that runs
torch.cuda.get_device_capability = lambda device=None: CAPABILITY[0]
torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def pin_memory(tensor):
    pinned = tensor.clone()
    pinned.is_pinned_here = True
    return pinned


def tolist(tensor):
    """One copy to the host, of made-up values."""
    if tensor.is_cuda:
        OBSERVER[0].waits.append(f"tolist {calling_line()}")
    return OBSERVER[0].values(tensor)


def scaled_dot_product_attention(q, k, v, attn_mask=None, **options):
    OBSERVER[0].attention.append(dict(
        kernel="sdpa", dtypes=[str(t.dtype)[6:] for t in (q, k, v)],
        on_device=all(t.is_cuda for t in (q, k, v)),
        mask_dims=None if attn_mask is None else attn_mask.ndim,
        mask_dtype=None if attn_mask is None else str(attn_mask.dtype)[6:],
        mask_on_device=attn_mask is None or attn_mask.is_cuda))
    return real_sdpa(q, k, v, attn_mask=attn_mask, **options)


OBSERVER = [None]
real_sdpa = F.scaled_dot_product_attention
F.scaled_dot_product_attention = scaled_dot_product_attention
torch.Tensor.pin_memory = pin_memory
FakeTensor.tolist = tolist


# ------------------------------------------------------------------ what is seen

def on_cuda(value):
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


OBSERVING = ("tolist", "__torch_dispatch__", "_note_wait")


@cache
def is_composite(func):
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def calling_line():
    """The line of sevloss, or of this file, that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and frame.f_code.co_name not in OBSERVING:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward pass"


class Observer(TorchDispatchMode):
    """waits: what makes the host wait for the device. attention: the arguments of each attention kernel.
    casts: how often each matrix was cast, in the forward pass and in the device thread of the backward pass.
    launches: kernels; an operation counts as one, what only makes a view or memory as none."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.attention = []
        self.casts = Counter()
        self.launches = Counter()
        self.matrices = {}  # storage -> name
        self.head = None
        self.tokens = iter(())  # what decoding reads back, one list a step

    def watch(self, model):
        matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
        self.matrices = {p.untyped_storage()._cdata: name for name, p in matrices.items()}
        if hasattr(model, "head_weight"):
            self.head = next(name for name, p in matrices.items() if p is model.head_weight)
        self.waits.clear()
        self.attention.clear()  # of the pass on the meta device
        self.casts.clear()

    def values(self, tensor):
        if tensor.dtype == torch.int64 and tensor.ndim == 1:
            row = next(self.tokens)
            assert len(row) == len(tensor), f"{len(tensor)} rows were read back, {len(row)} expected"
            return row
        if tensor.ndim == 1:
            return [1.0] * len(tensor)
        raise NotImplementedError(f"values of shape {tuple(tensor.shape)}, {tensor.dtype}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "prim":  # tensor.device
            return func(*args, **kwargs)
        if is_composite(func) and name != "scaled_dot_product_attention":
            with self:  # in inference mode to(), linear() and the like arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._note_wait(name, args, kwargs)
        self._note_cast(name, args, kwargs)
        if name == "_varlen_attn":
            self._note_flash(args, kwargs)
        if name == "_local_scalar_dense":
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if any(map(on_cuda, [*args, *outputs])) and not func.is_view and name not in ALLOCATIONS:
            self.launches[name] += 1
        return result

    def _note_wait(self, name, args, kwargs):
        what = None
        if name in ("_to_copy", "copy_", "copy"):
            what = self._waiting_copy(name, args, kwargs)
        elif name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            what = name if on_cuda(args[0]) else None
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and on_cuda(args[0]):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                what = "index by a mask"
            elif not all(map(on_cuda, indices)):
                what = "index from the host"
        if what:
            self.waits.append(f"{what} {calling_line()}")

    @staticmethod
    def _waiting_copy(name, args, kwargs):
        source = args[0] if name == "_to_copy" else args[1]
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or source.device).type
        else:
            target = args[0].device.type
        if not isinstance(source, torch.Tensor) or source.device.type == target:
            return None
        if target == "cpu":
            return "copy to the host"
        non_blocking = kwargs.get("non_blocking") or (name != "_to_copy" and args[2:] == (True,))
        if non_blocking and getattr(source, "is_pinned_here", False):
            return None
        return "copy from the host"

    def _note_cast(self, name, args, kwargs):
        if name != "_to_copy" or kwargs.get("dtype") in (None, args[0].dtype):
            return
        matrix = self.matrices.get(args[0].untyped_storage()._cdata)
        if matrix:
            backward = threading.current_thread() is not threading.main_thread()
            self.casts[f"{matrix}, backward" if backward else matrix] += 1

    def _note_flash(self, args, kwargs):
        q, k, v, cu_seqlens_q, cu_seqlens_k = args[:5]
        arguments = {argument.name: value for argument, value in zip(FLASH.arguments, args)} | kwargs
        self.attention.append(dict(
            kernel="flash", dtypes=[str(t.dtype)[6:] for t in (q, k, v)],
            on_device=all(map(on_cuda, args[:5])), head_dim=q.shape[-1],
            last_stride=[t.stride(-1) for t in (q, k, v)],
            cu_seqlens=[str(t.dtype)[6:] for t in (cu_seqlens_q, cu_seqlens_k)],
            cu_seqlens_contiguous=cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous(),
            window=list(arguments["window_size"] or (-1, -1))))



# ------------------------------------------------------------------ scenarios

def examples(lengths=(9, 9, 14, 20, 20, 31)):
    ids = np.arange(sum(lengths), dtype=np.int32) % 500
    return data.Examples(ids, np.array(lengths, dtype=np.int32), np.full(len(lengths), 3, dtype=np.int32),
                         np.ones((len(lengths), 3), dtype=np.float32) / 3)


def wrong_gradients(model):
    wrong = []
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is None:
            wrong.append(f"{name} has none")
        elif p.requires_grad and (not p.grad.is_cuda or p.grad.dtype != p.dtype):
            wrong.append(f"{name}, {p.dtype}: {p.grad.dtype} on {p.grad.device}")
    return wrong


def training_step(model, compute, observer, micro_tokens=1000):
    """A step of finetune.py's loop; casts are those of its last micro-batch."""
    rows = examples()
    optimizer = adamw(model, 1e-3, 0.01)
    scaler = compute.grad_scaler()
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.train()
    parts = data.micro_batches(rows.input_lengths, range(len(rows)), micro_tokens)
    micro_batches = [data.make_batch(rows, part, compute.device, np.ones(len(rows))) for part in parts]

    step_loss = torch.zeros((), device=compute.device)
    for batch in micro_batches:
        observer.casts.clear()
        with compute.autocast():
            hidden = model(batch.tokens, batch.lengths)
            hidden = hidden.index_select(0, batch.supervised_index)
            loss = linear_weighted_token_ce(hidden, model.head_weight, batch.targets, batch.weights,
                                            denominator=len(rows), ignore_index=None)
        scaler.scale(loss).backward()
        step_loss += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    before = len(observer.waits)
    torch.stack([step_loss, grad_norm]).tolist()
    after = len(observer.waits)
    scaler.step(optimizer)
    scaler.update()
    seen = dict(micro_batches=len(parts), waits_before_step=before, waits_for_metrics=after - before,
                wrong_gradients=wrong_gradients(model))
    optimizer.zero_grad(set_to_none=True)
    return seen


def classifier_step(model, compute, observer):
    """A step of train_classifier.py's loop."""
    optimizer = adamw(model, 1e-3, 0.01)
    scaler = compute.grad_scaler()
    model.train()
    tokens, lengths = data.pack([[1, 2, 3], [1, 2, 3], [4, 5, 6, 7, 8]], compute.device)
    shares = device.to_device(torch.ones(3, 3) / 3, compute.device)
    with compute.autocast():
        logits = model.classify(tokens, lengths)
        loss = F.cross_entropy(logits.float(), shares, weight=torch.ones(3, device=compute.device))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = len(observer.waits)
    torch.stack([loss.detach(), grad_norm]).tolist()
    after = len(observer.waits)
    scaler.step(optimizer)
    scaler.update()
    return dict(waits_before_step=before, waits_for_metrics=after - before,
                wrong_gradients=wrong_gradients(model))


def classification(model, compute, observer):
    """As annotate.py classifies a table, in three batches."""
    logits = class_logits(model, [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [1] * 9], compute, max_tokens=10)
    return dict(shape=list(logits.shape))


def evaluation(model, compute, observer):
    """As evaluate.py scores references, in four batches."""
    nll = response_nll(model, examples(), compute, most_tokens=30)
    return dict(shape=list(nll.shape))


def decoding(temperature):
    """As evaluate.py writes answers. A row in the middle ends first, then the last one."""
    def run(model, compute, observer):
        steps = [[1, 1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1], [1, 1, 1]]
        observer.tokens = iter(steps)
        prompts = [[1, 2, 3], [1, 2, 3, 4], [5, 6], [7, 8, 9], [1]]
        with compute.autocast():
            answers = generate(model, prompts, max_new_tokens=4, eos_ids=(0,), temperature=temperature,
                               top_p=0.9)
        return dict(steps=len(steps), answer_lengths=[len(answer) for answer in answers])
    return run


def bertscore(model, compute, observer):
    texts = {"a": [1, 2, 3], "b": [1, 2, 3, 4], "c": [1, 5, 4, 6]}
    def encode(strings, add_special_tokens):
        return [SimpleNamespace(ids=texts[text]) for text in strings]
    scorer = Scorer(model, SimpleNamespace(encode_batch_fast=encode), 2, compute)
    f1 = scorer.score(["a", "b", "c"], ["b", "b", "a"])[2]
    return dict(shape=list(f1.shape))


def model_on_device(config, dtype):
    model = build(FAMILIES[config["model_type"]], config)
    tensors = model.state_dict()
    tensors = {name: torch.empty(t.shape, dtype=dtype, device="cuda") for name, t in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def run(job, function, name, dtype, sm, option=""):
    """One scenario: the model is made on the host, moved to the fake device, and `function` runs."""
    CAPABILITY[0] = divmod(sm, 10)
    compute = device.Compute(torch.device("cuda"), device.DTYPES[dtype], "")
    base_dtype = compute.dtype if option == "lora" else torch.float32
    observer = OBSERVER[0] = Observer()
    seen = dict(error=None)
    with FakeTensorMode(allow_non_fake_inputs=True), observer:
        try:
            model = model_on_device({**CAUSAL, **ENCODERS}[name], base_dtype)
            if option == "lora":
                lora.attach(model, 4, alpha=8)
            if option == "checkpointing":
                enable_gradient_checkpointing(model)
            observer.watch(model)
            seen |= function(model, compute, observer)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if str(ROOT) in f.filename]
            message = re.sub(r"\s+", " ", str(error))[:300]
            seen["error"] = f"{type(error).__name__}: {message} at {' '.join(lines)}"
    report(job=job, model=name, dtype=dtype, sm=sm, option=option, seen=seen, observer=observer)


def report(*, seen, observer, **scenario):
    calls = {json.dumps(call): call for call in observer.attention}  # each kind once
    seen |= dict(attention=list(calls.values()), waits=observer.waits, casts=observer.casts,
                 head=observer.head, launches=observer.launches.total())
    print(json.dumps(scenario | seen), flush=True)


def loss_on_a_large_vocabulary(rows, width, vocabulary, dtype):
    """Forward and backward pass of one call of the loss."""
    observer = OBSERVER[0] = Observer()
    with FakeTensorMode(), observer:
        hidden = torch.empty(rows, width, device="cuda", dtype=dtype, requires_grad=True)
        head = torch.empty(vocabulary, width, device="cuda", requires_grad=True)
        targets = torch.empty(rows, device="cuda", dtype=torch.int64)
        weights = torch.empty(rows, device="cuda")
        observer.launches.clear()
        with torch.autocast("cuda", dtype=dtype):
            loss = linear_weighted_token_ce(hidden, head, targets, weights, denominator=rows,
                                            ignore_index=None)
        loss.backward()
    report(job="loss", seen=dict(operations=observer.launches), observer=observer)


def known_waits():
    """What makes the host wait, and what does not: the observer has to see the one and not the other."""
    numbers = torch.arange(4)
    waiting = {
        "item": lambda t: t[0].item(),
        "tolist": lambda t: t.float().tolist(),
        "if": lambda t: bool(t[0] > 0),
        "cpu": lambda t: t.cpu(),
        "nonzero": lambda t: t.nonzero(),
        "mask": lambda t: t[t > 1],
        "index from the host": lambda t: t[numbers],
        "list as index": lambda t: t[[0, 2]],
        "copy of pageable memory": lambda t: numbers.to("cuda", non_blocking=True),
        "plain copy": lambda t: numbers.pin_memory().to("cuda"),
        "new tensor of a list": lambda t: torch.tensor([1, 2], device="cuda"),
        "assignment from the host": lambda t: t.copy_(numbers),
    }
    free = {
        "pinned copy": lambda t: device.to_device(numbers, "cuda"),
        "new tensor of a size": lambda t: torch.zeros(3, device="cuda"),
        "index on the device": lambda t: t[t.argsort()],
        "slice": lambda t: t[1:].sum(),
    }
    waits = {}
    for name, function in {**waiting, **free}.items():
        observer = OBSERVER[0] = Observer()
        with FakeTensorMode(allow_non_fake_inputs=True), observer:
            t = torch.arange(4, device="cuda")
            try:
                function(t)
            except torch._subclasses.fake_tensor.DynamicOutputShapeException:
                pass  # its shape depends on values; the wait is noted by then
        waits[name] = len(observer.waits)
    print(json.dumps(dict(job="known waits", waiting=list(waiting), waits=waits)))


def main():
    known_waits()
    loss_on_a_large_vocabulary(8192, 896, 151_936, torch.bfloat16)
    accumulated = partial(training_step, micro_tokens=60)
    run("training", accumulated, "gpt2", "bf16", 90, option="accumulation")
    run("training", accumulated, "qwen3", "fp16", 75, option="accumulation")
    for name in CAUSAL:
        for sm, dtype in ((75, "fp16"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
            run("training", training_step, name, dtype, sm)
        if " with " not in name:  # nothing else happens in variants of a family
            run("training", training_step, name, "bf16", 90, option="lora")
            run("training", training_step, name, "bf16", 90, option="checkpointing")
        run("evaluation", evaluation, name, "bf16", 90)
        run("greedy decoding", decoding(0.0), name, "bf16", 90)
        run("sampled decoding", decoding(0.7), name, "fp16", 75)
    for name in ENCODERS:
        for sm, dtype in ((75, "fp32"), (75, "fp16"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
            run("classifier training", classifier_step, name, dtype, sm)
            run("classification", classification, name, dtype, sm)
        run("bertscore", bertscore, name, "fp32", 90)
        run("bertscore", bertscore, name, "bf16", 90)
        run("bertscore", bertscore, name, "fp16", 75)


if __name__ == "__main__":
    main()
