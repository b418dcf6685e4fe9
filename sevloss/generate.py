"""Batched decoding with a KV cache: the prompts, packed, then a token of each unfinished one a step."""

import hashlib

import torch
import torch.nn.functional as F

from sevloss import InputError
from sevloss.data import pack
from sevloss.device import to_device
from sevloss.models.attention import KVCache


@torch.no_grad()  # not inference_mode, in which autocast would cast every weight at every step
def generate(model, prompts, *, max_new_tokens, eos_ids=(), temperature=0.0, top_p=1.0, seed=0):
    """prompts: list of id lists -> list of lists of the new ids, without the EOS that ended them.

    temperature 0 takes the likeliest token; else tokens are drawn from the smallest set of likeliest tokens
    whose probability reaches top_p (Holtzman et al. 2020). Each prompt has a random generator of its own,
    seeded by `seed` and its ids, so its text does not depend on the batch it is in.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.context:
        raise InputError(f"prompt and answer need {longest} tokens, the model reads {model.config.context}: "
                         "shorten one of them")
    device = model.head_weight.device

    # the prompts
    answers = [[] for _ in prompts]
    prompt_of_row = list(range(len(prompts)))  # unfinished ones have a row in the batch
    tokens, lengths = pack(prompts, device)
    draws = torch.stack([_uniform(seed, prompt, max_new_tokens) for prompt in prompts])
    draws = to_device(draws, device)  # (B, max_new_tokens): all at once, as each copy makes the host wait
    cache = KVCache(lengths, device)
    hidden = model(tokens, cache=cache)  # (N, D)
    hidden = hidden.index_select(0, cache.prompts.cu_seqlens[1:] - 1)  # (B, D), of each last token

    for step in range(max_new_tokens):
        # the next tokens
        logits = F.linear(hidden, model.head_weight).float()  # (B, V); of a view, such as .T, no cast is kept
        if temperature:
            tokens = _sample(logits, temperature, top_p, draws[:, step])
        else:
            tokens = logits.argmax(-1)  # (B,)

        # which rows go on
        unfinished = []
        for row, token in enumerate(tokens.tolist()):
            if token not in eos_ids:
                answers[prompt_of_row[row]].append(token)
                unfinished.append(row)
        if not unfinished or step + 1 == max_new_tokens:
            break
        cache.advance()
        if len(unfinished) < len(tokens):
            rows = _close_up(unfinished)
            cache.select(rows)
            prompt_of_row = [prompt_of_row[row] for row in rows]
            index = to_device(torch.tensor(rows), device)
            tokens = tokens.index_select(0, index)
            draws = draws.index_select(0, index)
        hidden = model(tokens, cache=cache)  # (B, D)
    return answers


def _close_up(rows):
    """[0, 2, 3, 5] -> [0, 5, 2, 3]: rows behind the new end move into the gaps, the others stay."""
    from_behind = [row for row in rows if row >= len(rows)]
    return [place if place in rows else from_behind.pop() for place in range(len(rows))]


def _sample(logits, temperature, top_p, draws):
    """logits (B, V), draws (B,) uniform in [0, 1) -> (B,) ids."""
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]  # not p.sum(), which may be larger by its rounding
    place = (cumulative < draws[:, None] * total).sum(-1, keepdim=True)  # (B, 1)
    return order.gather(-1, place).squeeze(-1)


def _uniform(seed, ids, count):
    """(count,) uniform in [0, 1), the same for the same seed and ids."""
    digest = hashlib.blake2b(repr((seed, list(ids))).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.rand(count, generator=generator)
