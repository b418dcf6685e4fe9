"""The CUDA lines of sevloss, run without a GPU: which kernels they call, with what, and where the host waits.

tests/fake_cuda/run.py runs every scenario once, in a process of its own; each test here reads what it saw.
docs/cuda.md says what a fake device cannot show.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).with_name("fake_cuda")
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs g++, to build a stub of a CUDA device"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA: -m cuda tests it"),
    pytest.mark.skipif(sys.platform != "linux", reason="the stub is built for Linux"),
]
MAX_LOSS_LAUNCHES = 260  # 2,055 when chunks were as small as suits a CPU


def build(folder):
    """guard.cpp as a shared library for this PyTorch; kept, as the compiler takes seconds."""
    source = FOLDER / "guard.cpp"
    made_from = f"{source.read_text()} {torch.__version__} {torch.__file__}"
    library = folder / f"guard-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        torch_folder = Path(torch.__file__).parent
        include = torch_folder / "include"
        lib = torch_folder / "lib"
        temporary = library.with_suffix(f".{os.getpid()}")
        abi = int(torch.compiled_with_cxx11_abi())
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
                        f"-I{include}", f"-I{include}/torch/csrc/api/include", source, "-o", temporary,
                        f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"], check=True)
        os.replace(temporary, library)
    return library


@pytest.fixture(scope="module")
def scenarios(request):
    """What run.py saw, a dict a scenario."""
    library = build(request.config.cache.mkdir("fake_cuda"))
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), str(library)], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def runs(scenarios):
    """{"training qwen3 bf16 sm90 lora": what was seen}, of the scenarios that run a model."""
    named = {}
    for seen in scenarios:
        if "model" in seen:
            name = f"{seen['job']} {seen['model']} {seen['dtype']} sm{seen['sm']} {seen['option']}".strip()
            named[name] = seen
    assert len(named) > 90
    return named


def of(runs, *jobs):
    """Those that ran through: of the others `test_every_cuda_line_runs` tells."""
    return {name: seen for name, seen in runs.items() if seen["job"] in jobs and not seen["error"]}


def takes_flash(seen):
    """What attention.py is to do: flash wherever PyTorch's kernel for packed sequences can be had."""
    return (seen["sm"] >= 80 and seen["dtype"] != "fp32" and seen["model"] != "bloom"
            and seen["model"] != "gpt2 with heads of 12")


# ------------------------------------------------------------------ the observer itself

def test_the_observer_sees_what_waits(scenarios):
    seen = next(seen for seen in scenarios if seen["job"] == "known waits")
    expected = {name: int(name in seen["waiting"]) for name in seen["waits"]}
    assert seen["waits"] == expected
    assert set(expected.values()) == {0, 1}


# ------------------------------------------------------------------ sevloss

def test_every_cuda_line_runs(runs):
    assert {name: seen["error"] for name, seen in runs.items() if seen["error"]} == {}


def test_gradients_are_on_the_device_in_the_dtype_of_their_parameters(runs):
    steps = of(runs, "training", "classifier training")
    assert {name: seen["wrong_gradients"] for name, seen in steps.items() if seen["wrong_gradients"]} == {}


def test_attention_takes_flash_wherever_it_can(runs):
    taken = {name: {call["kernel"] for call in seen["attention"]} for name, seen in runs.items()}
    expected = {name: {"flash" if takes_flash(seen) else "sdpa"} for name, seen in runs.items()}
    assert taken == expected


def test_attention_gets_what_its_kernels_take(runs):
    """Equal dtypes: fp32 beside 16 bits would be refused, or computed in fp32."""
    for name, seen in runs.items():
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[seen["dtype"]]
        for call in seen["attention"]:
            assert call["dtypes"] == [dtype] * 3, name
            assert call["on_device"], name
            if call["kernel"] == "flash":
                assert dtype != "float32", name
                assert call["head_dim"] % 8 == 0 and call["head_dim"] <= 256, name
                assert call["last_stride"] == [1, 1, 1], name
                assert call["cu_seqlens"] == ["int32", "int32"] and call["cu_seqlens_contiguous"], name
            else:
                assert call["mask_dims"] in (None, 2, 4), name  # the fused kernels of SDPA take no others
                assert call["mask_dtype"] in (None, "bool", dtype), name
                assert call["mask_on_device"], name


def test_flash_gets_the_window_of_each_layer(runs):
    """Tokens seen before and after; -1: all."""
    def windows(name):
        return {tuple(call["window"]) for call in runs[name]["attention"] if call["kernel"] == "flash"}
    assert windows("training qwen2 bf16 sm90") == {(-1, 0)}
    assert windows("training qwen2 with a window bf16 sm90") == {(-1, 0), (7, 0)}
    assert windows("classification bert bf16 sm90") == {(-1, -1)}


def test_a_training_step_waits_once(runs):
    """Loss and gradient norm come together, between clipping and the step; nothing else is read back."""
    for name, seen in of(runs, "training", "classifier training").items():
        assert (seen["waits_before_step"], seen["waits_for_metrics"], len(seen["waits"])) == (0, 1, 1), (
            name, seen["waits"])


def test_scoring_waits_once_for_all_batches(runs):
    for name, seen in of(runs, "evaluation", "classification", "bertscore").items():
        assert len(seen["waits"]) == 1, (name, seen["waits"])


def test_decoding_waits_once_a_token(runs):
    for name, seen in of(runs, "greedy decoding", "sampled decoding").items():
        assert len(seen["waits"]) == seen["steps"], (name, seen["waits"])
        assert seen["answer_lengths"] == [4, 4, 0, 1, 4], name


def test_weights_are_cast_once_a_forward_pass(runs):
    """And once more where checkpointed blocks are computed anew. A base in 16 bits needs no cast."""
    for name, seen in of(runs, "training", "classifier training").items():
        assert set(seen["casts"].values()) <= {1}, name
        in_backward = {matrix for matrix in seen["casts"] if matrix.endswith(", backward")}
        assert bool(in_backward) == (seen["option"] == "checkpointing"), name
        if seen["dtype"] == "fp32":
            assert not seen["casts"], name
        elif seen["option"] == "lora":
            assert seen["casts"] and all(".lora_" in matrix for matrix in seen["casts"]), name
        elif seen["head"]:
            assert seen["head"] in seen["casts"], name


def test_weights_are_cast_once_for_all_that_is_decoded_or_scored(runs):
    for name, seen in of(runs, "greedy decoding", "sampled decoding", "evaluation", "classification",
                         "bertscore").items():
        expected = set() if seen["dtype"] == "fp32" else {1}
        assert set(seen["casts"].values()) == expected, (name, seen["casts"])
        if seen["head"] and seen["dtype"] != "fp32":
            assert seen["head"] in seen["casts"], name


def test_several_micro_batches_were_seen(runs):
    steps = of(runs, "training").values()
    assert {seen["micro_batches"] for seen in steps if seen["option"] == "accumulation"} == {2}


def test_the_loss_launches_few_kernels(scenarios):
    """8,192 tokens, 896 wide, a vocabulary of 151,936: forward and backward pass of one call."""
    seen = next(seen for seen in scenarios if seen["job"] == "loss")
    assert 0 < seen["launches"] <= MAX_LOSS_LAUNCHES, seen["operations"]
    assert not seen["waits"]
