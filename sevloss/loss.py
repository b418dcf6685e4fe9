"""The method: a severity weight per example, and token cross-entropy scaled by it.

    w    = a p_nc + b p_n + c p_c                                (severity_weights)
    loss = sum_i w_i * (-log softmax(logits_i)[target_i]) / denominator

The file imports torch alone and is made to be pasted into any code base. MIT licence, see LICENSE. It needs
torch 2.4; the second half, in 16 bits on CUDA, 2.9.

`weighted_token_ce` takes logits. `linear_weighted_token_ce` takes the hidden states and the output embedding,
and never holds the (tokens x vocabulary) matrix: same value, same gradients, a fraction of the memory and
less time.

Weights and denominator together express every normalisation:
    mean over examples of the paper's (1/L) sum   weights w_i / L_i, denominator = examples in the step
    mean over tokens                              weights w_i,       denominator = supervised tokens in it
With gradient accumulation, count the denominator over all micro-batches first and pass it to each call;
gradients then add up.
"""

import torch
import torch.nn.functional as F

SLICE = 2048  # rows of the head's gradient that a CPU handles at a time


def severity_weights(probabilities, coefficients=(0.5, 1.0, 1.5)):
    """(..., 3) probabilities of (non-critical, neutral, critical) -> (...) weights w = a p_nc + b p_n + c
    p_c.

    The coefficients (a, b, c) default to the paper's "balanced" configuration; w is not normalised, as in the
    paper.
    """
    probabilities = torch.as_tensor(probabilities)
    if not probabilities.is_floating_point():
        probabilities = probabilities.float()
    if probabilities.ndim == 0 or probabilities.shape[-1] != 3:
        raise ValueError(f"probabilities must have shape (..., 3), got {tuple(probabilities.shape)}")
    return probabilities @ probabilities.new_tensor(coefficients)


def weighted_token_ce(logits, targets, weights=None, *, denominator=None, ignore_index=-100):
    """sum(weights * nll) / denominator, a scalar in at least fp32.

    logits (..., V); targets (...), class indices or `ignore_index`; weights shaped like targets, or one per
    row: (B,) or (B, 1) for targets (B, T). Without weights every token counts 1. denominator: a number or 0-d
    tensor; by default the number of targets that are not `ignore_index`, never the sum of the weights. Where
    every target is ignored the loss is 0, with a graph. Raises ValueError for shapes that do not fit:
    broadcasting (B, 1, 1) weights over (B, T) losses would give (B, B, T).
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
    weights = _token_weights(weights, targets)
    _check_range(targets, logits.shape[-1], ignore_index)
    if denominator is None:
        denominator = (targets != ignore_index).sum().clamp(min=1)
    targets = targets.masked_fill(weights == 0, ignore_index)  # else 0 * inf would be NaN
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index,
                          reduction="none")
    return (nll * weights.flatten().to(nll.dtype)).sum() / denominator


def _token_weights(weights, targets):
    if weights is None:
        return torch.ones_like(targets, dtype=torch.float32)
    if weights.shape == targets.shape:
        return weights
    if targets.ndim == 2 and weights.shape in (targets.shape[:1], (targets.shape[0], 1)):
        return weights.reshape(-1, 1).expand_as(targets)
    raise ValueError(f"weights {tuple(weights.shape)} do not fit targets {tuple(targets.shape)}: give one a "
                     "token, or one a row as (B,) or (B, 1)")


def _check_range(targets, classes, ignore_index):
    if targets.device.type != "cpu":  # reading a value back would stall the device; its kernel itself asserts
        return
    wrong = (targets < 0) | (targets >= classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if wrong.any():
        raise ValueError(f"target {targets[wrong][0].item()} is outside 0..{classes - 1}"
                         + (f" and is not ignore_index {ignore_index}" if ignore_index is not None else ""))


# ------------------------------------------------------------------------------------------------------------
# The method ends here. What follows computes the same in less time and memory.
# ------------------------------------------------------------------------------------------------------------


def linear_weighted_token_ce(hidden, head_weight, targets, weights=None, *, bias=None, denominator=None,
                             ignore_index=-100):
    """weighted_token_ce(hidden @ head_weight.T + bias, ...) without ever holding all the logits.

    hidden (N, D), head_weight (V, D), targets (N,), weights (N,), bias (V,). Rows with weight 0 or an ignored
    target cost nothing. ignore_index=None: every row counts, and nothing is read back from the device, which
    otherwise has to say how many do. GEMMs run in the input dtype (autocast's, where it is active), all after
    the logits in at least fp32, and the head's gradient is accumulated in fp32. The gradient is made in the
    forward pass, so a second derivative, or one with respect to the weights, is refused.
    """
    # check
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError("hidden must be (N, D) and head_weight (V, D), "
                         f"got {tuple(hidden.shape)} and {tuple(head_weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}: "
                         "one target a row")
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit head_weight {tuple(head_weight.shape)}")
    weights = _token_weights(weights, targets)
    if weights.requires_grad:
        raise ValueError("weights must not require a gradient here: detach them, or use weighted_token_ce")
    _check_range(targets, head_weight.shape[0], ignore_index)

    # keep the rows that count
    if ignore_index is None:
        denominator = max(1, len(targets)) if denominator is None else denominator
    else:
        supervised = targets != ignore_index
        denominator = supervised.sum().clamp(min=1) if denominator is None else denominator
        rows = (supervised & (weights != 0)).nonzero().squeeze(1)
        hidden = hidden.index_select(0, rows)
        targets = targets.index_select(0, rows)
        weights = weights.index_select(0, rows)

    # the dtype of the GEMMs
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = torch.promote_types(hidden.dtype, head_weight.dtype)
    with torch.autocast(device_type, enabled=False):
        return _LinearWeightedTokenCE.apply(hidden, head_weight, bias, targets, weights, denominator, dtype)


def _chunk_sizes(device_type, vocabulary, dtype):
    """-> rows of a chunk, whose logits are held at once; rows of a block of it, which are worked on in
    fp32."""
    if device_type == "cpu":
        # small blocks stay in the cache
        chunk_bytes = 256 * 2 ** 20
        block = 16
    else:
        # few and large kernels: a launch costs as much time as a block of this size; 1.5 GiB in all
        chunk_bytes = 960 * 2 ** 20
        block = chunk_bytes // (16 * vocabulary * dtype.itemsize)
    chunk = chunk_bytes // (vocabulary * dtype.itemsize)
    return max(16, chunk // 16 * 16), max(16, block)


class _LinearWeightedTokenCE(torch.autograd.Function):
    """With G = softmax(logits) - onehot(targets):  d hidden = w G W / denominator,  d W = G^T (w X) /
    denominator.

    G of a chunk of rows replaces its logits in one buffer; a chunk needs three GEMMs (X W^T, G W, G^T X) and
    is then forgotten.

    Weights and denominator are kept away from what is stored in 16 bits: a weight of 1/300 over a denominator
    of 100,000 would push fp16 below its smallest number long before a GradScaler's factor, which arrives with
    the upstream gradient, could lift it. So G is stored without them; w joins the rows of X for dW (divided
    by a power of two near the largest w) and the rows of d hidden in the backward pass, in fp32, as 1 /
    denominator does.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, bias, targets, weights, denominator, dtype):
        need_hidden, need_head, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(dtype, torch.float32)  # of all but the GEMMs
        x = hidden.to(dtype)  # (N, D)
        head = head_weight.to(dtype)  # (V, D)
        w = weights.to(wide)  # (N,)
        y = targets[:, None]  # (N, 1)
        rows, vocabulary = len(x), len(head)

        # what is made
        losses = w.new_empty(rows)
        d_hidden = torch.empty_like(x) if need_hidden else None  # without w
        d_head = torch.zeros_like(head, dtype=wide) if need_head else None
        d_bias = w.new_zeros(vocabulary) if need_bias else None

        # scales of what is stored in 16 bits
        g_scale = 2.0 ** 8 if dtype == torch.float16 else 1.0  # fp16 would lose small entries of G
        largest = torch.cat([w.abs(), w.new_full((1,), torch.finfo(wide).tiny)]).amax()
        unit = largest.log2().floor().exp2()
        x_weighted = (x * (w / unit)[:, None]).to(dtype)  # (N, D)

        # buffers
        chunk, block = _chunk_sizes(hidden.device.type, vocabulary, dtype)
        width = -(-vocabulary // 8) * 8  # rows begin at multiples of 16 bytes, as fast GEMMs want
        buffer = x.new_empty(min(chunk, rows), width)[:, :vocabulary]
        z_buffer = w.new_empty(min(block, rows), vocabulary)
        p_buffer = torch.empty_like(z_buffer)

        for start in range(0, rows, chunk):
            c = slice(start, min(start + chunk, rows))
            logits = torch.mm(x[c], head.T, out=buffer[:c.stop - start])  # (C, V)

            # logits -> softmax, a block at a time in fp32
            z_max, z_target, p_max = w.new_empty(3, len(logits), 1)  # each (C, 1)
            for i in range(0, len(logits), block):
                b = slice(i, min(i + block, len(logits)))
                z = z_buffer[:b.stop - i]  # (b, V)
                p = p_buffer[:b.stop - i]
                z.copy_(logits[b])
                if bias is not None:
                    z += bias
                torch.softmax(z, -1, out=p)
                torch.amax(z, -1, keepdim=True, out=z_max[b])
                torch.amax(p, -1, keepdim=True, out=p_max[b])
                torch.gather(z, 1, y[c][b], out=z_target[b])
                if need_bias:
                    d_bias += w[c][b] @ p
                logits[b] = p.mul_(g_scale) if g_scale != 1 else p

            # the loss: log-sum-exp is max z - log max p, exact where p of the target has underflowed
            nll = z_max - p_max.log() - z_target  # (C, 1)
            losses[c] = (nll * w[c, None]).squeeze(1)

            # softmax -> G: p - 1 at the targets
            logits.scatter_(1, y[c], ((-nll).expm1() * g_scale).to(dtype))
            if need_hidden:
                torch.mm(logits, head, out=d_hidden[c])  # (C, D)
            if need_head:
                _add_product(d_head, logits.T, x_weighted[c])  # (V, D)
        if need_bias:
            d_bias.index_add_(0, targets, w, alpha=-1)

        ctx.save_for_backward(w, d_hidden, d_head, d_bias)
        ctx.dtypes = hidden.dtype, head_weight.dtype, None if bias is None else bias.dtype
        ctx.hidden_scale = 1 / g_scale
        ctx.head_scale = unit / g_scale
        ctx.denominator = denominator
        return losses.sum() / denominator

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("linear_weighted_token_ce has no second derivative: use weighted_token_ce")
        w, d_hidden, d_head, d_bias = ctx.saved_tensors
        scale = upstream.to(w.dtype) / ctx.denominator
        if d_hidden is not None:
            d_hidden = (d_hidden * (w * scale * ctx.hidden_scale)[:, None]).to(ctx.dtypes[0])
        if d_head is not None:
            d_head = torch.mul(d_head, scale * ctx.head_scale,
                               out=torch.empty_like(d_head, dtype=ctx.dtypes[1]))
        if d_bias is not None:
            d_bias = (d_bias * scale).to(ctx.dtypes[2])
        return d_hidden, d_head, d_bias, None, None, None, None


def _add_product(out, a, b):
    """out += a @ b, where out (V, D) has at least fp32, and a (V, C) and b (C, D) may have 16 bits."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # a CPU has no such kernel: products of slices that stay in the cache, added in fp32
        for out_rows, a_rows in zip(out.split(SLICE), a.split(SLICE)):
            if a.dtype == torch.float16:  # the product need not fit into fp16
                out_rows.addmm_(a_rows.float(), b.float())
            else:
                out_rows += a_rows @ b
