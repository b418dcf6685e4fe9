"""Batched decoding with a KV cache: the prompts as one stream, then a token per unfinished row and step."""

import hashlib

import torch

from sevloss import InputError
from sevloss.models.attention import KVCache


@torch.inference_mode()
def generate(model, prompts, *, max_new_tokens, eos_ids=(), temperature=0.0, top_p=1.0, seed=0):
    """prompts: list of id lists -> list of lists of the new ids, without the EOS that ended them.

    temperature 0 takes the likeliest token; else tokens are drawn from the smallest set of likeliest tokens whose probability
    reaches top_p (Holtzman et al. 2020). Each row draws from a generator of its own, seeded by `seed` and its prompt's ids, so
    its text does not depend on the batch it is in.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.context:
        raise InputError(f"prompt and answer need {longest} tokens, the model reads {model.config.context}: shorten one of them")
    device = model.head_weight.device
    answers = [[] for _ in prompts]
    generators = [_generator(seed, p) for p in prompts] if temperature else None
    rows = list(range(len(prompts)))  # row of the batch -> prompt
    cache = KVCache([len(p) for p in prompts], device)
    tokens = torch.tensor([i for p in prompts for i in p], device=device)
    last = torch.tensor([len(p) for p in prompts], device=device).cumsum(0) - 1
    for step in range(max_new_tokens):
        hidden = model.stream(tokens, cache)  # (N, D) for the prompts, then (B, D)
        hidden = hidden[last] if step == 0 else hidden
        logits = (hidden @ model.head_weight.to(hidden.dtype).T).float()  # (B, V)
        if temperature:
            tokens = _sample(logits, temperature, top_p, [generators[r] for r in rows])
        else:
            tokens = logits.argmax(-1)
        alive = []
        for b, token in enumerate(tokens.tolist()):
            if token not in eos_ids:
                answers[rows[b]].append(token)
                alive.append(b)
        if not alive or step + 1 == max_new_tokens:
            break
        cache.advance()
        if len(alive) < len(rows):
            behind = [b for b in alive if b >= len(alive)]  # these move to the places that became free
            kept = [b if b in alive else behind.pop() for b in range(len(alive))]
            cache.keep(kept)
            tokens, rows = tokens[torch.tensor(kept, device=device)], [rows[b] for b in kept]
    return answers


def _sample(logits, temperature, top_p, generators):
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    draws = torch.stack([torch.rand((), generator=g) for g in generators]).to(p.device)
    cumulative = p.cumsum(-1)
    chosen = (cumulative < draws[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)  # p.sum() may be larger, by its rounding
    return order.gather(-1, chosen).squeeze(-1)


def _generator(seed, ids):
    digest = hashlib.blake2b(repr((seed, list(ids))).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
