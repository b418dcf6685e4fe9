"""Device, numbers and memory: what is chosen, and that it is said."""

import platform
import resource

import pytest
import torch

from sevloss import InputError, device


@pytest.mark.parametrize("name, message", [("tpu", "auto, cpu, cuda or cuda:N"),
                                           ("meta", "auto, cpu, cuda or cuda:N"),
                                           ("cuda:01", "auto, cpu, cuda or cuda:N"),
                                           ("cuda:99", "PyTorch sees .* CUDA devices here")])
def test_devices_that_are_none(name, message):
    with pytest.raises(InputError, match=message):
        device.choose(name)


@pytest.mark.parametrize("dtype", device.DTYPES)
def test_matrix_products_run_in_the_dtype_that_was_asked_for(dtype):
    compute = device.choose("cpu", dtype)
    with compute.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == device.DTYPES[dtype]
    assert compute.grad_scaler().is_enabled() == (dtype == "fp16")
    assert str(compute) == f"device cpu, {dtype}: as asked"


def test_a_small_model_is_computed_in_fp32():
    assert device.choose("cpu", small=True).dtype == torch.float32


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_kept():
    """The second time, the pages of a large tensor are there already: none of its 16,384 has to be mapped
    again."""
    device.keep_freed_memory()
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2 ** 24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
