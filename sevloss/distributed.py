"""What torchrun needs, and nothing without it: with one process each function here does next to nothing.

    torchrun --nproc_per_node 2 finetune.py ...

Every rank runs the whole script. What is shared is the work on rows: each rank takes micro-batches of its
own, and what came out is added up, so that all ranks know all of it. Rank 0 alone prints and writes; the
others print their errors. With `shard`, each rank also holds only its part of the model.
"""

import os
import sys
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from tqdm import tqdm

from sevloss import InputError, data
from sevloss.device import choose_device


def start(device):
    """Joins the other ranks where torchrun started this process. device: as for `--device`; returns this
    rank's own."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(choose_device(device))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # the others wait while rank 0 encodes a table; torchrun itself notices a rank that died
    timeout = timedelta(hours=4)
    store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    # after a restart torchrun's store still has the addresses of the ranks that were killed
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def end():
    """What NCCL wants before a process ends. Not after an error: other ranks may never come to this."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(lengths, indices):
    """Those of `indices` that each rank takes, a list a rank: the longest first, each to the rank with the
    fewest tokens. Every rank computes the same, so nothing is sent."""
    shares = [[] for _ in range(ranks())]
    tokens = [0] * ranks()
    for i in sorted(indices, key=lambda i: -lengths[i]):
        lightest = tokens.index(min(tokens))
        shares[lightest].append(i)
        tokens[lightest] += int(lengths[i])
    return shares


def micro_batches(lengths, indices, max_tokens):
    """data.micro_batches of this rank's share of `indices`. All ranks get equally many, as the ranks of a
    sharded model compute together: where one has fewer, the last are empty."""
    parts = [data.micro_batches(lengths, own, max_tokens) for own in share(lengths, indices)]
    most = max(map(len, parts))
    return parts[rank()] + [[]] * (most - len(parts[rank()]))


def add_up(tensor):
    """The sum of each rank's `tensor`, in place; returns it."""
    _together(dist.all_reduce, tensor)
    return tensor


def add_up_gradients(parameters):
    """Each gradient becomes the sum over the ranks, by one all-reduce."""
    if ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if is_sharded(gradients[0]):
        for gradient in gradients:
            gradient.mul_(ranks())  # FSDP2 has taken the mean
        return
    sums = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, sums.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def gather(value):
    """Each rank's `value`, which may be any object: a list, rank 0's first."""
    values = [value] * ranks()
    _together(dist.all_gather_object, values, value)
    return values


def wait_for_all():
    gather(None)


def _together(collective, *arguments):
    if ranks() == 1:
        return
    try:
        collective(*arguments)
    except RuntimeError as error:  # of gloo or NCCL: the connection to another rank is closed
        raise InputError("another rank has ended, its message says why; finetune.py --resume goes on "
                         "after the last save") from error


def shard(model, compute):
    """Each rank keeps its part of every parameter, gradient and moment of AdamW. A block's parameters are
    gathered for its computation, in compute.dtype; those outside the blocks (tied embedding and head in one
    group) from the forward pass to the end of the backward pass, so that the loss can read the head."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes a second to import
    policy = MixedPrecisionPolicy(param_dtype=compute.dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # torch's DTensor


def whole(tensor):
    """A sharded tensor gathered from all ranks; another as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_write(tensors):
    """{name: tensor} as rank 0 writes it: whole, on the CPU; {} on the other ranks, which hold none of it."""
    on_cpu = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if rank() == 0:
            on_cpu[name] = tensor.cpu().contiguous()
    return on_cpu


def part_like(parameter, tensor):
    """Of a whole tensor the part that this rank keeps, where `parameter` is sharded: `whole` backwards."""
    if not is_sharded(parameter) or tensor.shape != parameter.shape:  # AdamW's count of steps has no shape
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
