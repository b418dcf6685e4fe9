"""AdamW and its learning rate, the same for the language model and the classifier."""

import torch


def adamw(model, lr, weight_decay):
    """AdamW on the parameters that learn, with weight decay on matrices and embeddings alone, not on norms
    and biases.

    fused: one kernel for all parameters; it exists for CPU and CUDA.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_learning_rate(optimizer, peak, step, steps, warmup_steps):
    """Linear rise to `peak` over the first warmup_steps of `steps` steps, then linear decay towards 0.
    Returns the rate of step `step`, counted from 0; it is never 0, where a step would be wasted."""
    warmup_steps = max(1, warmup_steps)
    rise = (step + 1) / warmup_steps
    fall = (steps - step) / max(1, steps - warmup_steps)
    lr = peak * min(rise, fall)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
