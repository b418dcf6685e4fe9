"""The method: a severity weight per example, and token cross-entropy scaled by it.

    w    = a p_nc + b p_n + c p_c                                (severity_weights)
    loss = sum_t w_t * (-log softmax(logits_t)[target_t]) / denominator     over the tokens t of all examples

`weighted_token_ce` takes logits. `linear_weighted_token_ce` takes hidden states and the output embedding and
never holds the (tokens x vocabulary) matrix: same value and gradients, a fraction of the memory, less time on
a CPU.

Weights and denominator together express every normalisation:
    mean over examples of the paper's (1/L) sum   w_t = w / L, denominator = examples in the step
    mean over tokens                              w_t = w,     denominator = supervised tokens in the step
where w and L, the number of supervised tokens, are those of the example that t belongs to.
Under gradient accumulation, count the denominator over all micro-batches first and pass it to each call.

The file imports torch alone (2.4; the second half, in 16 bits on CUDA, 2.10) and is made to be pasted into
any code base. MIT licence, see LICENSE.
"""

import torch
import torch.nn.functional as F


def severity_weights(probabilities, coefficients=(0.5, 1.0, 1.5)):
    """Probabilities (..., 3) of (non-critical, neutral, critical) -> weights (...), a p_nc + b p_n + c p_c.

    The coefficients (a, b, c) default to the paper's "balanced" ones; as in the paper, w is not normalised.
    """
    probabilities = torch.as_tensor(probabilities)
    if probabilities.dtype != torch.float64:
        probabilities = probabilities.float()
    if probabilities.ndim == 0 or probabilities.shape[-1] != 3:
        raise ValueError(f"probabilities must have shape (..., 3), got {tuple(probabilities.shape)}")
    return (probabilities * probabilities.new_tensor(coefficients)).sum(-1)  # not @: autocast would round it


def weighted_token_ce(logits, targets, weights=None, *, denominator=None, ignore_index=-100):
    """sum(weights * nll) / denominator, a scalar in at least fp32.

    logits (..., V); targets (...), class indices or `ignore_index`; weights shaped like targets, or one per
    row, (B,) or (B, 1) for targets (B, T); without them every token counts 1. denominator: a number or 0-d
    tensor; by default the number of targets that are not `ignore_index`, never the sum of the weights. Where
    every target is ignored the loss is 0, with a graph. ValueError for shapes that do not fit: broadcasting
    (B, 1, 1) weights over (B, T) losses would give (B, B, T).
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
    weights = _token_weights(weights, targets)
    _check_range(targets, logits.shape[-1], ignore_index)
    if denominator is None:
        denominator = (targets != ignore_index).sum().clamp(min=1)
    targets = targets.masked_fill(weights == 0, ignore_index)  # else 0 * inf would be NaN
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits.reshape(-1, logits.shape[-1])
    nll = F.cross_entropy(logits, targets.reshape(-1), ignore_index=ignore_index, reduction="none")
    return (nll * weights.reshape(-1).to(nll.dtype)).sum() / denominator


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
        target = targets[wrong][0].item()
        raise ValueError(f"target {target} is outside 0..{classes - 1}; ignore_index is {ignore_index}")


# ------------------------------------------------------------------------------------------------------------
# The method ends here. What follows is optional: it computes the same in less time and memory.
# ------------------------------------------------------------------------------------------------------------

SLICE = 2048  # rows of the head's gradient that a CPU handles at a time


def linear_weighted_token_ce(hidden, head_weight, targets, weights=None, *, bias=None, denominator=None,
                             ignore_index=-100):
    """weighted_token_ce(hidden @ head_weight.T + bias, ...) without ever holding all the logits.

    hidden (N, D), head_weight (V, D), targets (N,), weights (N,), bias (V,). Rows with weight 0 or an ignored
    target cost nothing. ignore_index=None: every row counts, and the host need not wait for the device to say
    how many do. GEMMs run in the input dtype (autocast's, where it is active), all after
    the logits in at least fp32, and the head's gradient is accumulated in fp32. The gradient is made in the
    forward pass, so a second derivative, or one with respect to the weights, is refused.
    """
    # check
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError("hidden must be (N, D) and head_weight (V, D), "
                         f"got {tuple(hidden.shape)} and {tuple(head_weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}")
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
    """-> rows of a chunk, whose logits are held at once; rows of a block, whose softmax is made at once.

    A CPU keeps a block in its cache. Elsewhere each operation costs a launch, so blocks are large: a chunk of
    960 MiB and two blocks in fp32 take 1.2 GiB.
    """
    row_bytes = vocabulary * dtype.itemsize
    if device_type == "cpu":
        return max(16, 256 * 2 ** 20 // row_bytes), 16
    block = max(1, 60 * 2 ** 20 // row_bytes)
    return 16 * block, block


class _LinearWeightedTokenCE(torch.autograd.Function):
    """With G = softmax(logits) - onehot(targets):

        d hidden = w G W / denominator,  d W = G^T (w X) / denominator

    G of a chunk of rows takes the place of its logits; three GEMMs (X W^T, G W, G^T (w X)), and it is
    forgotten.

    Weights and denominator are kept away from what is stored in 16 bits: a weight of 1/300 over a denominator
    of 100,000 would push fp16 below its smallest number before a GradScaler's factor, which arrives with the
    upstream gradient, could lift it. So G is stored without them. For dW, the rows of X are multiplied by
    w / unit, where unit is a power of two near the largest w; unit comes back in the backward pass. There d
    hidden gets its w, in fp32, and both get 1 / denominator.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, bias, targets, weights, denominator, dtype):
        wide = torch.promote_types(dtype, torch.float32)  # of all but the GEMMs
        x = hidden.to(dtype)  # (N, D)
        head = head_weight.to(dtype)  # (V, D)
        w = weights.to(wide)  # (N,)
        rows, vocabulary = len(x), len(head)

        # scales of what is stored in 16 bits
        g_scale = 2.0 ** 8 if dtype == torch.float16 else 1.0  # fp16 would lose small entries of G
        # the padding is for no rows at all, and for weights that are all 0
        unit = F.pad(w.abs(), (0, 1), value=torch.finfo(wide).tiny).amax().log2().floor().exp2()
        w_scaled = (w / unit)[:, None]  # (N, 1)
        x_weighted = (x * w_scaled).to(dtype)  # (N, D)

        # what is made
        nll = torch.empty_like(w)  # (N,)
        d_hidden = d_head = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.empty_like(x)  # without w
        if ctx.needs_input_grad[1]:
            d_head = torch.zeros_like(head, dtype=wide)
        if ctx.needs_input_grad[2]:
            d_bias = w.new_zeros(vocabulary, 1)

        # buffers
        chunk, block = _chunk_sizes(hidden.device.type, vocabulary, dtype)
        width = -(-vocabulary // 8) * 8  # rows begin at multiples of 16 bytes, as fast GEMMs want
        buffer = x.new_empty(min(chunk, rows), width)[:, :vocabulary]
        z_buffer = w.new_empty(min(block, rows), vocabulary)
        p_buffer = torch.empty_like(z_buffer)

        for start in range(0, rows, chunk):
            c = slice(start, start + chunk)
            logits = buffer[:len(x[c])]  # (C, V)
            if bias is None:
                torch.mm(x[c], head.T, out=logits)
            else:
                torch.addmm(bias.to(dtype), x[c], head.T, out=logits)

            # softmax in the place of the logits
            at_target = targets[c][:, None]  # (C, 1)
            z_target = logits.gather(1, at_target).squeeze(1).to(wide)  # (C,); on CUDA it asserts the range
            z_max = logits.amax(1).to(wide)  # (C,)
            p_max = torch.empty_like(z_max)
            for z_block, p_max_block in zip(logits.split(block), p_max.split(block)):
                z, p = z_buffer[:len(z_block)], p_buffer[:len(z_block)]  # (b, V)
                z.copy_(z_block)
                torch.softmax(z, 1, out=p)
                torch.amax(p, 1, out=p_max_block)
                if g_scale != 1:
                    p *= g_scale
                z_block.copy_(p)

            # max p = exp(max z - lse), so lse = max z - log max p: exact even where p of the target is 0
            nll[c] = z_max - p_max.log() - z_target

            # softmax -> G: p - 1 at the targets
            g = logits  # (C, V)
            g.scatter_(1, at_target, (torch.expm1(-nll[c]) * g_scale).to(dtype)[:, None])
            if d_hidden is not None:
                torch.mm(g, head, out=d_hidden[c])
            if d_head is not None:
                _add_product(d_head, g.T, x_weighted[c])
            if d_bias is not None:
                _add_product(d_bias, g.T, w_scaled[c].to(dtype))

        ctx.save_for_backward(w, d_hidden, d_head, d_bias)
        ctx.dtypes = hidden.dtype, head_weight.dtype, None if bias is None else bias.dtype
        ctx.hidden_scale = 1 / g_scale
        ctx.head_scale = unit / g_scale
        ctx.denominator = denominator
        return (w * nll).sum() / denominator

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
            d_bias = (d_bias.squeeze(1) * scale * ctx.head_scale).to(ctx.dtypes[2])
        return d_hidden, d_head, d_bias, None, None, None, None


def _add_product(out, a, b):
    """out += a @ b, where out (V, D) has at least fp32, and a (V, C) and b (C, D) may have 16 bits."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type != "cpu":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # a CPU has no such kernel: products of slices that stay in the cache, added in fp32
        for out_slice, a_slice in zip(out.split(SLICE), a.split(SLICE)):
            if a.dtype == torch.float16:  # the product need not fit into fp16
                out_slice.addmm_(a_slice.float(), b.float())
            else:
                out_slice += a_slice @ b
