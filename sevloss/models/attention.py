"""How the tokens of several documents lie in one stream, and what attention may see.

A batch is one stream of N tokens: the documents one after the other, nothing between them, no padding. Whatever works on
single tokens (embeddings, norms, MLPs, head, loss) does not notice. Attention does, and LFM2's short convolution; both go through a
sequences object: `PackedSequences` for training and encoding, `KVCache` for decoding. A model's code is the same for both.

Two things change what attention sees. `slopes` (H,), ALiBi: a key `distance` tokens back gets -slope * distance added to its score
(Press et al. 2022). `window`: a token sees the `window` tokens that end with itself.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from sevloss import InputError
from sevloss.device import to_device

# Up to this length a CPU computes attention in 16 bits, or with dropout, by plain products when it is to learn: the backward pass of SDPA
# takes two to six times as long there. Longer texts would keep too many scores.
MANUAL_MAX_LENGTH = 256


class PackedSequences:
    """Whole documents of the given lengths; each token sees its own document alone, and with causal=True only what precedes it.

    positions (N,): 0, 1, ... within each document.
    """

    def __init__(self, lengths, device, *, causal):
        self.lengths, self.device, self.causal = [int(n) for n in lengths], torch.device(device), causal
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths[:8]}")
        self.max_seqlen = max(self.lengths)
        self.positions = to_device(torch.cat([torch.arange(n) for n in self.lengths]), self.device)
        self.runs = [(n, len(list(same))) for n, same in groupby(self.lengths)]  # neighbours of equal length share a call
        self._rows, self._masks = None, {}

    def attention(self, q, k, v, layer, *, dropout=0.0, scale=None, slopes=None, window=None):
        """q (N, H, d), k and v (N, H or a divisor of H, d) -> (N, H, d)."""
        if not q.is_cuda:
            return self._cpu_attention(q, k, v, dropout, scale, slopes, window)
        flash = q.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(q.device) >= (8, 0)
        if flash and dropout == 0 and slopes is None:
            return self._flash_attention(q, k, v, scale, window)
        return self._padded_attention(q, k, v, dropout, scale, slopes, window)

    def convolve(self, x, weight, layer):
        """Causal depth-wise convolution: x (N, D), weight (D, K) -> (N, D); weight[:, -1] meets the token itself."""
        out = x * weight[:, -1]
        for back in range(1, weight.shape[1]):
            earlier = F.pad(x, (0, 0, back, 0))[:len(x)]  # row n is token n - back, which may belong to the document before
            out = out + earlier * (self.positions >= back)[:, None] * weight[:, -1 - back]
        return out

    def _cpu_attention(self, q, k, v, dropout, scale, slopes=None, window=None):
        # On a CPU a call per document costs little and nothing is computed across documents.
        learns = torch.is_grad_enabled() and q.requires_grad
        parts = []
        sizes = [length * count for length, count in self.runs]  # split, not slices: the backward of each slice would be as long as q
        for (length, count), *run in zip(self.runs, q.split(sizes), k.split(sizes), v.split(sizes)):
            qi, ki, vi = (t.unflatten(0, (count, length)).transpose(1, 2) for t in run)  # (G, H, L, d)
            if learns and length <= MANUAL_MAX_LENGTH and (dropout or q.dtype != torch.float32):
                mask = self._mask(length, slopes, window, q.dtype) if self.causal else None
                part = manual_attention(qi, ki, vi, mask, dropout, scale)
            else:
                part = _sdpa(qi, ki, vi, dropout_p=dropout, scale=scale, **self._visible(length, slopes, window, q.dtype))
            parts.append(part.transpose(1, 2).flatten(0, 1))  # (G L, H, d)
        return torch.cat(parts)

    def _flash_attention(self, q, k, v, scale, window=None):
        # The flash kernel for ragged batches; it exists on CUDA (Ampere or newer) in 16 bits, without dropout.
        from torch.nn.attention.varlen import varlen_attn  # here, as it takes a second to import
        starts = self._cuda_rows()[2]
        around = (window - 1 if window else -1, 0) if self.causal else (-1, -1)  # tokens before and after; -1: all
        return varlen_attn(q, k, v, starts, starts, self.max_seqlen, self.max_seqlen, scale=scale, window_size=around,
                           enable_gqa=q.shape[1] != k.shape[1])

    def _padded_attention(self, q, k, v, dropout, scale, slopes=None, window=None):
        # Right padding inside attention only. With is_causal no real token sees padding, so no mask is needed and the
        # flash and memory-efficient kernels stay eligible.
        rows, real, _, real_keys = self._cuda_rows()
        qp, kp, vp = (t[rows].transpose(1, 2) for t in (q, k, v))  # (B, H, T, d)
        seen = self._visible(self.max_seqlen, slopes, window, q.dtype)
        if not self.causal:
            seen = {"attn_mask": real_keys[:, None, None]}
        padded = _sdpa(qp, kp, vp, dropout_p=dropout, scale=scale, **seen)
        return padded.transpose(1, 2).flatten(0, 1)[real]  # (N, H, d)

    def _visible(self, length, slopes, window, dtype):
        """What SDPA is told for documents of `length` tokens: is_causal where that says it all, else a mask, the same in every layer."""
        if slopes is None and not (window and window < length):
            return {"is_causal": self.causal}
        return {"attn_mask": self._mask(length, slopes, window, dtype)}

    def _mask(self, length, slopes, window, dtype):
        key = length, window, dtype
        if key not in self._masks:
            t = torch.arange(length, device=self.device)
            self._masks[key] = _added_mask(t[:, None] - t, slopes, window).to(dtype)
        return self._masks[key]

    def _cuda_rows(self):
        """rows (B, T): where padded position (b, t) lies in the stream; real (N,): where token n lies in the padded batch;
        starts (B + 1,): where documents begin; real_keys (B, T)."""
        if self._rows is None:
            lengths = torch.tensor(self.lengths)
            starts = F.pad(lengths.cumsum(0), (1, 0))
            t = torch.arange(self.max_seqlen)
            rows = (starts[:-1, None] + t).clamp(max=int(starts[-1]) - 1)
            real_keys = t < lengths[:, None]
            real = real_keys.flatten().nonzero().squeeze(1)
            self._rows = tuple(to_device(t, self.device) for t in (rows, real, starts.to(torch.int32), real_keys))
        return self._rows


class KVCache:
    """Decoding: the first stream holds the prompts, every later one holds one new token per document still being written.

    Keys and values lie in one buffer a layer, (B, K, room, d) for K key heads, documents left-aligned, so positions need no
    correction; it grows by ROOM tokens. Of what a convolution has read, (B, width - 1, D) is kept a layer.
    """

    ROOM = 64

    def __init__(self, prompt_lengths, device):
        self.prompts = PackedSequences(prompt_lengths, device, causal=True)
        self.lengths = torch.tensor(self.prompts.lengths, device=device)  # tokens of each document that are stored
        self.max_seqlen, self.room = self.prompts.max_seqlen, self.prompts.max_seqlen + self.ROOM
        self.positions, self.filled, self.buffers, self.inputs = self.prompts.positions, False, {}, {}

    def advance(self):
        """After each stream: the next one holds a single token a document, at position `lengths`."""
        if self.filled:
            self.lengths += 1
        self.max_seqlen += 1  # that token included
        self.filled = True
        self.positions = self.lengths
        self._masks = {}
        if self.max_seqlen > self.room:
            self.room += self.ROOM
            self.buffers = {layer: tuple(F.pad(t, (0, 0, 0, self.ROOM)) for t in pair) for layer, pair in self.buffers.items()}

    def keep(self, rows):
        """After `advance`: only the documents `rows` go on, in this order. A row stays in its place or comes from behind the new end
        (3, 1 of 0..3, not 1, 3), so that what moves is a row for each that ended, not the whole cache."""
        n = len(rows)
        places, moved = [i for i, row in enumerate(rows) if row != i], [row for i, row in enumerate(rows) if row != i]
        if any(row < n for row in moved):
            raise ValueError(f"rows {list(rows)} would overwrite one another")

        def kept(t):
            t[places] = t[moved]
            return t[:n]
        self.lengths = kept(self.lengths)
        self.max_seqlen = int(self.lengths.max()) + 1
        self.positions = self.lengths
        self._masks = {}
        self.buffers = {layer: (kept(k), kept(v)) for layer, (k, v) in self.buffers.items()}
        self.inputs = {layer: kept(x) for layer, x in self.inputs.items()}

    def attention(self, q, k, v, layer, *, dropout=0.0, scale=None, slopes=None, window=None):
        if not self.filled:
            starts, lengths = 0, self.prompts.lengths
            buffers = [t.new_zeros(len(lengths), t.shape[1], self.room, t.shape[2]) for t in (k, v)]
            for b, n in enumerate(lengths):
                for buffer, t in zip(buffers, (k, v)):
                    buffer[b, :, :n] = t[starts:starts + n].transpose(0, 1)
                starts += n
            self.buffers[layer] = tuple(buffers)
            return self.prompts.attention(q, k, v, layer, scale=scale, slopes=slopes, window=window)
        b = torch.arange(len(q), device=q.device)
        keys, values = self.buffers[layer]
        keys[b, :, self.lengths], values[b, :, self.lengths] = k, v
        # All of the buffer is read, what is not yet written under the mask: a slice of it would be copied before each product.
        if window not in self._masks:  # a token is stored at `lengths` and sees everything up to itself
            distance = self.lengths[:, None] - torch.arange(self.room, device=q.device)  # (B, room)
            self._masks[window] = _added_mask(distance[:, None], slopes, window)
        # Spelled out: with one query a row SDPA takes two to three times as long on a CPU.
        q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, G, d): the G query heads that share a key head
        scores = (q @ keys.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale) + self._masks[window]
        return (scores.softmax(-1).to(q.dtype) @ values).flatten(1, 2)  # (B, H, d)

    def convolve(self, x, weight, layer):
        if not self.filled:
            pad = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
            ends = torch.tensor(self.prompts.lengths, device=x.device).cumsum(0)
            back = torch.arange(weight.shape[1] - 1, device=x.device)
            rows = ends[:, None] + back  # (B, K - 1) in `pad`: the last inputs of each document
            own = back >= weight.shape[1] - 1 - self.lengths[:, None]  # the others belong to the document before
            self.inputs[layer] = pad[rows] * own[..., None]
            return self.prompts.convolve(x, weight, layer)
        seen = torch.cat([self.inputs[layer], x[:, None]], dim=1)  # (B, K, D)
        self.inputs[layer] = seen[:, 1:]
        return (seen * weight.T).sum(1)


def check_context(sequences, context):
    """InputError where a text is longer than the model reads."""
    if sequences.max_seqlen > context:
        raise InputError(f"a text has {sequences.max_seqlen} tokens, the model reads {context}: lower --max-length")


def _added_mask(distance, slopes, window):
    """distance (..., Q, T) from a query back to a key -> (..., 1 or H, Q, T), added to the scores: -inf where nothing may be seen."""
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    hidden, distance = hidden.unsqueeze(-3), distance.unsqueeze(-3)
    slopes = torch.zeros(1, device=distance.device) if slopes is None else slopes
    return (-slopes[:, None, None] * distance).masked_fill(hidden, -torch.inf)


def manual_attention(q, k, v, mask, dropout, scale):
    """softmax(q k^T scale + mask) v; q (G, H, L, d), k and v (G, K, L, d) -> (G, H, L, d). Keeps L^2 numbers a head for the gradient."""
    heads, length, head_dim = q.shape[1:]
    keys = k.shape[1]
    q = q.reshape(-1, keys, heads // keys * length, head_dim)  # the query heads that share a key head, one after the other
    scores = q @ k.transpose(-1, -2) * (head_dim ** -0.5 if scale is None else scale)  # (G, K, H / K L, L)
    if mask is not None:  # (1 or H, L, L)
        scores = scores + (mask.repeat(1, heads // keys, 1) if len(mask) == 1 else mask.reshape(keys, -1, length))
    out = F.dropout(scores.softmax(-1), dropout) @ v  # inside, softmax is in fp32 whatever the dtype
    return out.reshape(-1, heads, length, head_dim)


def _sdpa(q, k, v, **arguments):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **arguments)
