"""Scores of a language model on reference responses."""

import math

import torch
import torch.nn.functional as F

from sevloss import data


@torch.inference_mode()
def response_nll(model, examples, compute, *, most_tokens=4096, progress=None):
    """(n,) fp64: summed negative log-likelihood, in nats, of each example's targets."""
    model.eval()
    total = torch.zeros(len(examples), dtype=torch.float64)
    for part in data.micro_batches(examples.inputs, range(len(examples)), most_tokens):
        batch = data.make_batch(examples, part, compute.device)
        with compute.autocast():
            hidden = model(batch.tokens, batch.lengths)[batch.supervised]  # (S, D)
            nll = torch.cat([F.cross_entropy((h @ model.head_weight.T).float(), t, reduction="none")
                             for h, t in zip(hidden.split(512), batch.targets.split(512))])
        total[part] = torch.zeros(len(part), dtype=torch.float64).index_add_(0, batch.example.cpu(), nll.double().cpu())
        if progress is not None:
            progress.update(len(part))
    return total


def per_token(nll, tokens):
    """Sums over sums: {nll, perplexity} of the examples together; never a mean of means."""
    mean = float(nll.sum() / tokens.sum()) if len(tokens) else math.nan
    return {"nll": mean, "perplexity": math.exp(min(mean, 700.0))}
