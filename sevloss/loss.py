"""The method: a severity weight per example, and token cross-entropy scaled by it.

    w    = a p_nc + b p_n + c p_c                                (severity_weights)
    loss = sum_i w_i * (-log softmax(logits_i)[target_i]) / denominator

The file imports torch alone and can be pasted into any code base.

`weighted_token_ce` takes logits. `linear_weighted_token_ce` takes the hidden states and the output embedding, and never
holds the (tokens x vocabulary) matrix: same value, same gradients, a fraction of the memory and less time.

Weights and denominator together express every normalisation:
    mean over examples of the paper's (1/L) sum     weights w_i / L_i, denominator = examples in the optimizer step
    mean over tokens                                weights w_i,       denominator = supervised tokens in the step
With gradient accumulation, count the denominator over all micro-batches first and pass it to each call; gradients then add up.
"""

import torch
import torch.nn.functional as F

LOGITS_BYTES = 256 * 2 ** 20  # size of the buffer that holds the logits of one chunk of rows
SLICE = 2048  # rows of the head's gradient that are handled at a time


def severity_weights(probabilities, coefficients=(0.5, 1.0, 1.5)):
    """(..., 3) probabilities of (non-critical, neutral, critical) -> (...) weights w = a p_nc + b p_n + c p_c.

    The coefficients (a, b, c) default to the paper's "balanced" configuration; w is not normalised, as in the paper.
    """
    probabilities = torch.as_tensor(probabilities)
    if not probabilities.is_floating_point():
        probabilities = probabilities.float()
    if probabilities.ndim == 0 or probabilities.shape[-1] != 3:
        raise ValueError(f"probabilities must have shape (..., 3), got {tuple(probabilities.shape)}")
    return probabilities @ probabilities.new_tensor(coefficients)


def weighted_token_ce(logits, targets, weights=None, *, denominator=None, ignore_index=-100):
    """sum(weights * nll) / denominator, a scalar in at least fp32.

    logits (..., V); targets (...), class indices or `ignore_index`; weights shaped like targets, or one per row:
    (B,) or (B, 1) for targets (B, T). Without weights every token counts 1.
    denominator: a number or 0-d tensor; by default the number of targets that are not `ignore_index`, never the sum of
    the weights. Where every target is ignored the loss is 0, with a graph.
    Raises ValueError for shapes that do not fit; broadcasting (B, 1, 1) weights over (B, T) losses would give (B, B, T).
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
    weights = _token_weights(weights, targets)
    _check_range(targets, logits.shape[-1], ignore_index)
    if denominator is None:
        denominator = (targets != ignore_index).sum().clamp(min=1)
    targets = targets.masked_fill(weights == 0, ignore_index)  # else 0 * inf would be NaN
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=ignore_index)
    return (nll * weights.flatten().to(nll.dtype)).sum() / denominator


def linear_weighted_token_ce(hidden, head_weight, targets, weights=None, *, bias=None, denominator=None, ignore_index=-100):
    """weighted_token_ce(hidden @ head_weight.T + bias, ...) without ever holding all the logits.

    hidden (N, D), head_weight (V, D), targets (N,), weights (N,), bias (V,). Rows with weight 0 or an ignored target cost
    nothing. ignore_index=None: every row counts, and nothing is read back from the device, which otherwise has to say how
    many do. GEMMs run in the input dtype (autocast's, where it is active), all after the logits in at least fp32, and the
    head's gradient is accumulated in fp32. The gradient is made in the forward pass, so a second derivative, or one with
    respect to the weights, is refused.
    """
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"hidden must be (N, D) and head_weight (V, D), got {tuple(hidden.shape)} and {tuple(head_weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}: one target a row")
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit head_weight {tuple(head_weight.shape)}")
    weights = _token_weights(weights, targets)
    if weights.requires_grad:
        raise ValueError("weights must not require a gradient here: detach them, or use weighted_token_ce")
    _check_range(targets, head_weight.shape[0], ignore_index)
    if ignore_index is not None:
        counts = targets != ignore_index
        denominator = counts.sum().clamp(min=1) if denominator is None else denominator
        rows = (counts & (weights != 0)).nonzero().squeeze(1)
        hidden, targets, weights = hidden.index_select(0, rows), targets[rows], weights[rows]
    elif denominator is None:
        denominator = max(1, len(targets))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(hidden.dtype, head_weight.dtype)
    return _LinearWeightedTokenCE.apply(hidden, head_weight, bias, targets, weights, denominator, dtype)


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
    if targets.device.type != "cpu":  # reading a value back from the device would stall it; there the kernel itself asserts
        return
    wrong = (targets < 0) | (targets >= classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if wrong.any():
        raise ValueError(f"target {targets[wrong][0].item()} is outside 0..{classes - 1}"
                         + (f" and is not ignore_index {ignore_index}" if ignore_index is not None else ""))


def _add_product(out, a, b, buffers, *, first):
    """out += a @ b, or out = a @ b the first time. out has at least fp32; a and b may have 16 bits."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=0 if first else 1)
        return
    narrow, wide = (buffer[:len(a)] for buffer in buffers)
    if a.is_cuda:
        product = torch.mm(a, b, out_dtype=torch.float32)
    elif a.dtype == torch.float16:  # a CPU has no such kernel, and the result does not fit into fp16
        product = a.float() @ b.float()
    else:
        product = torch.mm(a, b, out=narrow)
    if first:
        out.copy_(product)
    else:
        out += product if product.dtype == out.dtype else wide.copy_(product)  # while it is in the cache


class _LinearWeightedTokenCE(torch.autograd.Function):
    """With G = softmax(logits) - onehot(targets):  d hidden = w G W / denominator,  d W = G^T (w X) / denominator.

    G of a chunk of rows replaces its logits in one buffer; a chunk needs three GEMMs (X W^T, G W, G^T X) and is forgotten.

    Weights and denominator are kept away from what is stored in 16 bits: a weight of 1/300 over a denominator of 100,000
    would push fp16 below its smallest number long before a GradScaler's factor, which arrives with the upstream gradient,
    could lift it. So G is stored without them; w joins the rows of X for dW (divided by a power of two near the largest w)
    and the rows of d hidden in the backward pass, in fp32, as 1 / denominator does.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, bias, targets, weights, denominator, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        need_hidden, need_head, need_bias = ctx.needs_input_grad[:3]
        vocabulary, on_cpu = len(head_weight), hidden.device.type == "cpu"
        x, y, w = hidden.to(dtype), targets[:, None], weights.to(wide)
        head = head_weight.to(dtype)
        unit = w.abs().max().clamp(min=torch.finfo(wide).tiny).log2().floor().exp2() if len(x) else w.new_ones(())
        g_scale = 2.0 ** 8 if dtype == torch.float16 else 1.0  # small entries of the softmax would vanish in fp16: hold 2^8 G

        loss = w.new_zeros(())
        d_hidden = torch.empty_like(x) if need_hidden else None
        d_head = (torch.empty_like if len(x) else torch.zeros_like)(head, dtype=wide) if need_head else None
        d_bias = w.new_zeros(vocabulary) if need_bias else None
        chunk = max(16, LOGITS_BYTES // (vocabulary * dtype.itemsize) // 16 * 16)
        block = 16 if on_cpu else 256  # rows of a chunk in fp32 at a time: on a CPU so few that they stay in its cache
        buffer = x.new_empty(min(chunk, len(x)), vocabulary)
        z_buffer, p_buffer = w.new_empty(2, min(block, len(x)), vocabulary)
        slice_buffers = head.new_empty(SLICE, head.shape[1]), w.new_empty(SLICE, head.shape[1])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(x), chunk):
                xc, yc, wc = x[start:start + chunk], y[start:start + chunk], w[start:start + chunk]
                logits = torch.mm(xc, head.T, out=buffer[:len(xc)])  # (C, V)
                for i in range(0, len(xc), block):
                    yb, wb = yc[i:i + block], wc[i:i + block]
                    z, p = z_buffer[:len(yb)], p_buffer[:len(yb)]  # (b, V)
                    z.copy_(logits[i:i + block])
                    if bias is not None:
                        z += bias
                    torch.softmax(z, -1, out=p)
                    # log-sum-exp = max z - log max p: exact where p of the target itself has underflowed
                    nll = z.amax(-1) - p.amax(-1).log() - z.gather(1, yb).squeeze(1)  # (b,)
                    loss += wb @ nll
                    if need_hidden or need_head or need_bias:
                        g = p.scatter_add_(1, yb, p.new_full(yb.shape, -1.0))
                        if need_bias:
                            d_bias += wb @ g
                        logits[i:i + block] = g.mul_(g_scale) if g_scale != 1 else g
                if need_hidden:
                    torch.mm(logits, head, out=d_hidden[start:start + chunk])
                if need_head:
                    weighted = (xc * (wc / unit)[:, None]).to(dtype)  # (C, D)
                    for d, g in zip(d_head.split(SLICE), logits.split(SLICE, dim=1)):
                        _add_product(d, g.T, weighted, slice_buffers, first=start == 0)
        ctx.save_for_backward(w, d_hidden, d_head, d_bias)
        ctx.dtypes = hidden.dtype, head_weight.dtype, bias.dtype if bias is not None else None
        ctx.g_scale, ctx.head_scale, ctx.denominator = g_scale, unit / g_scale, denominator
        return loss / denominator

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("linear_weighted_token_ce has no second derivative: use weighted_token_ce")
        w, d_hidden, d_head, d_bias = ctx.saved_tensors
        scale = upstream.to(w.dtype) / ctx.denominator
        grads = [None] * 7
        if d_hidden is not None:
            grads[0] = (d_hidden * (w * scale / ctx.g_scale)[:, None]).to(ctx.dtypes[0])
        if d_head is not None:
            grads[1] = torch.empty_like(d_head, dtype=ctx.dtypes[1])
            torch.mul(d_head, scale * ctx.head_scale, out=grads[1])
        if d_bias is not None:
            grads[2] = (d_bias * scale).to(ctx.dtypes[2])
        return tuple(grads)
