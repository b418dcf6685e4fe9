"""Which device, which numbers: decided here once, printed with the reason."""

import contextlib
import ctypes
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch

from sevloss import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass
class Compute:
    device: torch.device
    dtype: torch.dtype  # of the matrix products; what learns, softmax and loss stay fp32
    reason: str

    def autocast(self):
        """Context for forward passes and the loss: matrix products in `dtype`."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self):
        """fp16 gradients underflow: scale the loss up, unscale before clipping, skip overflows."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def peak_memory(self):
        """"peak memory 1.23 GiB": CUDA's peak allocation, or the process's largest resident size."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif sys.platform == "win32":
            return "peak memory unknown"
        else:
            import resource  # not on Windows
            unit = 1 if sys.platform == "darwin" else 1024
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"peak memory {peak / 2 ** 30:.2f} GiB"

    @property
    def dtype_name(self):
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def __str__(self):
        tf32 = "; products that stay fp32 run in TF32" if self.device.type == "cuda" else ""
        return f"device {self.device}, {self.dtype_name}: {self.reason}{tf32}"


def cpu_has_bf16():
    """Whether this processor multiplies bf16 in hardware; else bf16 is several times slower than fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def choose(device="auto", dtype="auto", *, small=False, deterministic=False):
    """-> Compute. dtype: auto|fp32|bf16|fp16. small: a model that would not gain from 16 bits. deterministic:
    the same machine gives the same bits, on CUDA too; an operation that cannot is an error."""
    device = choose_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # products that stay fp32 run as TF32 on tensor cores
    else:
        keep_freed_memory()
    if dtype != "auto":
        return Compute(device, DTYPES[dtype], "as asked")
    if small:
        return Compute(device, torch.float32, "the model is too small to gain from 16 bits")
    if device.type == "cpu":
        if cpu_has_bf16():
            return Compute(device, torch.bfloat16, "this processor multiplies bf16 in hardware")
        return Compute(device, torch.float32, "this processor has no bf16 instructions")
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return Compute(device, torch.bfloat16, "this GPU multiplies bf16 in hardware")
    return Compute(device, torch.float16, "this GPU has no bf16; a GradScaler keeps gradients in range")


def choose_device(name):
    """auto|cpu|cuda|cuda:N -> torch.device; InputError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu|cuda(:[0-9]|:[1-9][0-9])?", str(name)):
        raise InputError(f"--device is auto, cpu, cuda or cuda:N, not {str(name)!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there_are = torch.cuda.device_count() or "no"
        raise InputError(f"--device {device}: PyTorch sees {there_are} CUDA devices here; use --device cpu")
    return device


def keep_freed_memory():
    """Tells glibc not to give large freed blocks back to the system: a training step asks for the same again,
    and each of their pages would be mapped and cleared anew, up to a third of the step. PyTorch does this
    with a GPU's memory."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)  # never


def to_device(tensor, device):
    """On CUDA from pinned memory, copied while the device works; a plain copy would wait for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def seed_everything(seed, *others):
    """torch's generators on all devices; nothing here draws from Python's or numpy's global ones. others:
    step and rank, say; each combination has random numbers of its own."""
    if others:
        seed = np.random.SeedSequence((seed, *others)).generate_state(1)[0]
    torch.manual_seed(int(seed))
