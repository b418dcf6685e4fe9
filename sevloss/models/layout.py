"""How the tokens of several documents lie in one stream, and what attention may see.

A batch is one stream of N tokens: the documents one after the other, nothing between them, no padding. Whatever works on
single tokens (embeddings, norms, MLPs, head, loss) does not notice. Attention does, and goes through a layout object:
`Documents` for training and encoding, `Cache` for decoding. A model's code is the same for both.
"""

from itertools import groupby

import torch
import torch.nn.functional as F


class Documents:
    """Whole documents of the given lengths; each token sees its own document alone, and with causal=True only what precedes it.

    positions (N,): 0, 1, ... within each document.
    """

    def __init__(self, lengths, device, *, causal):
        self.lengths, self.device, self.causal = [int(n) for n in lengths], torch.device(device), causal
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths[:8]}")
        self.longest = max(self.lengths)
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(self.device)
        self.runs = [(n, len(list(same))) for n, same in groupby(self.lengths)]  # neighbours of equal length share a call
        self._rows = None

    def attend(self, q, k, v, layer, *, dropout=0.0, scale=None):
        """q (N, H, d), k and v (N, H or a divisor of H, d) -> (N, H, d)."""
        if not q.is_cuda:
            return self._attend_in_runs(q, k, v, dropout, scale)
        if q.dtype in (torch.float16, torch.bfloat16) and dropout == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0):
            return self._attend_varlen(q, k, v, scale)
        return self._attend_padded(q, k, v, dropout, scale)

    def _attend_in_runs(self, q, k, v, dropout, scale):
        # On a CPU a call per document costs little and nothing is computed across documents.
        parts, start = [], 0
        for length, count in self.runs:
            stop = start + length * count
            qi, ki, vi = (t[start:stop].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v))  # (G, H, L, d)
            part = _sdpa(qi, ki, vi, dropout_p=dropout, scale=scale, is_causal=self.causal)
            parts.append(part.transpose(1, 2).flatten(0, 1))  # (G L, H, d)
            start = stop
        return torch.cat(parts)

    def _attend_varlen(self, q, k, v, scale):
        # The flash kernel for ragged batches; it exists on CUDA (Ampere or newer) in 16 bits, without dropout.
        from torch.nn.attention.varlen import varlen_attn  # here, as it takes a second to import
        starts = self._cuda_rows()[2]
        window = (-1, 0) if self.causal else (-1, -1)
        return varlen_attn(q, k, v, starts, starts, self.longest, self.longest, scale=scale, window_size=window,
                           enable_gqa=q.shape[1] != k.shape[1])

    def _attend_padded(self, q, k, v, dropout, scale):
        # Right padding inside attention only. With is_causal no real token sees padding, so no mask is needed and the
        # flash and memory-efficient kernels stay eligible.
        rows, real, _ = self._cuda_rows()
        qp, kp, vp = (t[rows].transpose(1, 2) for t in (q, k, v))  # (B, H, T, d)
        mask = None
        if not self.causal:
            mask = (torch.arange(self.longest, device=q.device) < torch.tensor(self.lengths, device=q.device)[:, None])[:, None, None]
        padded = _sdpa(qp, kp, vp, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=self.causal)
        return padded.transpose(1, 2).flatten(0, 1)[real]  # (N, H, d)

    def _cuda_rows(self):
        """rows (B, T): where padded position (b, t) lies in the stream; real (N,): where token n lies in the padded batch;
        starts (B + 1,): where documents begin."""
        if self._rows is None:
            lengths = torch.tensor(self.lengths)
            starts = F.pad(lengths.cumsum(0), (1, 0))
            t = torch.arange(self.longest)
            rows = (starts[:-1, None] + t).clamp(max=int(starts[-1]) - 1)
            real = (t < lengths[:, None]).flatten().nonzero().squeeze(1)
            self._rows = rows.to(self.device), real.to(self.device), starts.to(self.device, torch.int32)
        return self._rows


class Cache:
    """Decoding: the first stream holds the prompts, every later one holds one new token per document still being written.

    Keys and values lie in one buffer a layer, (B, H, capacity, d), documents left-aligned, so positions need no correction.
    """

    def __init__(self, prompt_lengths, capacity, device):
        self.prompts = Documents(prompt_lengths, device, causal=True)
        self.lengths = torch.tensor(self.prompts.lengths, device=device)  # tokens of each document that are stored
        self.longest, self.capacity = self.prompts.longest, capacity
        self.positions, self.filled, self.buffers = self.prompts.positions, False, {}

    def advance(self):
        """After each stream: the next one holds a single token a document, at position `lengths`."""
        if self.filled:
            self.lengths += 1
        self.longest += 1  # that token included
        self.filled = True
        self.positions = self.lengths
        # it is stored at `lengths` and sees everything up to itself
        self.visible = (torch.arange(self.longest, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]

    def keep(self, rows):
        """After `advance`: only the documents `rows` (an index tensor) go on."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) + 1
        self.positions = self.lengths
        self.visible = self.visible[rows][..., :self.longest]
        self.buffers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.buffers.items()}

    def attend(self, q, k, v, layer, *, dropout=0.0, scale=None):
        if not self.filled:
            starts, lengths = 0, self.prompts.lengths
            buffers = [t.new_zeros(len(lengths), t.shape[1], self.capacity, t.shape[2]) for t in (k, v)]
            for b, n in enumerate(lengths):
                for buffer, t in zip(buffers, (k, v)):
                    buffer[b, :, :n] = t[starts:starts + n].transpose(0, 1)
                starts += n
            self.buffers[layer] = tuple(buffers)
            return self.prompts.attend(q, k, v, layer, scale=scale)
        b = torch.arange(len(q), device=q.device)
        keys, values = self.buffers[layer]
        keys[b, :, self.lengths], values[b, :, self.lengths] = k, v
        seen = slice(0, self.longest)
        return _sdpa(q[:, :, None], keys[:, :, seen], values[:, :, seen], attn_mask=self.visible, scale=scale)[:, :, 0]  # (B, H, d)


def _sdpa(q, k, v, **arguments):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **arguments)
