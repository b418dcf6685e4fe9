"""Packed sequences, the KV cache, and attention over both.

A batch is one tensor of N tokens: whole sequences one after the other, without padding. What works on single
tokens (embeddings, norms, MLPs, head, loss) does not notice. What looks at other tokens is a method of a
sequences object: `attention`, and `history` for LFM2's short convolution. `PackedSequences` is for training
and encoding, `KVCache` for decoding; a model's code is the same for both.

slopes (H,): ALiBi; a key `distance` tokens back gets -slope * distance added to its score (Press et al.
2022). window: a token sees the `window` tokens that end with itself.

Attention probabilities get no dropout, whatever a config.json says: the flash kernel for packed sequences has
none, and training is to be the same on every device. The other dropouts of config.json act.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from sevloss import InputError
from sevloss.device import to_device

# Up to this length a CPU computes attention in 16 bits by plain products when it is to learn: the backward
# pass of SDPA takes two to six times as long there. Longer texts would keep too many scores.
MANUAL_MAX_LENGTH = 256


class PackedSequences:
    """Sequences of the given lengths; a token sees its own sequence, with causal=True up to itself.

    On the device: seqlens (B,); cu_seqlens (B + 1,) int32, where sequences begin and end; positions (N,), 0,
    1, ... within each sequence; sequence_ids (N,), which sequence a token belongs to.
    """

    def __init__(self, lengths, device, *, causal):
        self.lengths = [int(length) for length in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths[:8]}")
        self.causal = causal
        self.max_seqlen = max(self.lengths)
        self.seqlens = to_device(torch.tensor(self.lengths), device)
        self.cu_seqlens = F.pad(self.seqlens.cumsum(0), (1, 0)).to(torch.int32)
        tokens = sum(self.lengths)
        self.sequence_ids = torch.repeat_interleave(self.seqlens, output_size=tokens)
        self.positions = torch.arange(tokens, device=device) - self.cu_seqlens[self.sequence_ids]
        self._masks = {}

    def attention(self, q, k, v, layer=None, *, scale=None, slopes=None, window=None):
        """q (N, H, d), k and v (N, K, d), where K divides H -> (N, H, d). scale: of the scores, d^-0.5 by
        default. layer: which one it is, for a cache."""
        if not q.is_cuda:
            return self._cpu_attention(q, k, v, scale, slopes, window)
        if slopes is None and flash_takes(q):
            return self._flash_attention(q, k, v, scale, window)
        return self._padded_attention(q, k, v, scale, slopes, window)

    def history(self, x, width, layer=None):
        """x (N, D) -> (N, width, D): of the `width` tokens that end with each; 0 before its sequence."""
        shifted = []
        for distance in reversed(range(width)):
            earlier = F.pad(x, (0, 0, distance, 0))[:len(x)]  # row n is token n - distance
            shifted.append(earlier * (self.positions >= distance)[:, None])
        return torch.stack(shifted, dim=1)

    # ------------------------------------------------------------------ the three routes of attention

    def _cpu_attention(self, q, k, v, scale, slopes, window):
        """On a CPU, always: a call for each group of neighbours of equal length. Calls cost little there, and
        nothing is computed across sequences or on padding."""
        groups = [(length, len(list(same))) for length, same in groupby(self.lengths)]
        sizes = [length * count for length, count in groups]
        training = torch.is_grad_enabled() and q.requires_grad
        outputs = []
        # split, not slices: the backward pass of each slice would be as long as q
        for (length, count), qi, ki, vi in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes)):
            # (count, H, length, d), twice (count, K, length, d)
            qi, ki, vi = (t.unflatten(0, (count, length)).transpose(1, 2) for t in (qi, ki, vi))
            if training and q.dtype != torch.float32 and length <= MANUAL_MAX_LENGTH:
                mask = self._mask(length, slopes, window, q.dtype) if self.causal else None
                out = manual_attention(qi, ki, vi, mask, scale)
            else:
                out = self._sdpa(qi, ki, vi, scale, slopes, window)
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # (count * length, H, d)
        return torch.cat(outputs)

    def _flash_attention(self, q, k, v, scale, window):
        """On CUDA, where `flash_takes` it, without ALiBi: PyTorch's flash kernel for packed sequences."""
        from torch.nn.attention.varlen import varlen_attn  # here, as it takes a second to import
        before = window - 1 if window else -1  # earlier tokens that are seen; -1: all
        after = 0 if self.causal else -1
        return varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen,
                           scale=scale, window_size=(before, after), enable_gqa=q.shape[1] != k.shape[1])

    def _padded_attention(self, q, k, v, scale, slopes, window):
        """On CUDA, otherwise (fp32, older GPUs, ALiBi, other head sizes): padded on the right. Where
        causality alone counts no token sees padding, so SDPA needs no mask and keeps its fast kernels."""
        batch, length = len(self.lengths), self.max_seqlen
        padded_index = self.sequence_ids * length + self.positions  # (N,)

        def pad(t):
            padded = t.new_zeros(batch * length, *t.shape[1:]).index_copy(0, padded_index, t)
            return padded.unflatten(0, (batch, length)).transpose(1, 2)  # (B, H, T, d)

        mask = None
        if not self.causal:  # (B, 1, 1, T): False where a key is padding
            mask = torch.arange(length, device=q.device) < self.seqlens[:, None, None, None]
        out = self._sdpa(pad(q), pad(k), pad(v), scale, slopes, window, mask)  # (B, H, T, d)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, padded_index)  # (N, H, d)

    # ------------------------------------------------------------------ what they share

    def _sdpa(self, q, k, v, scale, slopes, window, mask=None):
        """q (B, H, T, d), k and v (B, K, T, d) -> (B, H, T, d). A mask only where is_causal is not enough."""
        length = q.shape[2]
        if slopes is not None or (window is not None and window < length):
            mask = self._mask(length, slopes, window, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None,
                                              scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def _mask(self, length, slopes, window, dtype):
        """(1, 1 or H, length, length), added to the scores: made once a batch, as all layers have the same
        slopes."""
        key = length, window, dtype
        if key not in self._masks:
            t = torch.arange(length, device=self.positions.device)
            self._masks[key] = added_mask((t[:, None] - t)[None, None], slopes, window).to(dtype)
        return self._masks[key]


class KVCache:
    """Decoding: the model's first call reads the prompts, packed; every later one a new token of each
    sequence. Between two calls: `advance`, and `select` where sequences have ended.

    buffers: layer -> its keys and values (or a convolution's inputs), (B, K, room, d), each sequence from
    position 0 on; they grow by ROOM tokens. positions (N,), sequence_ids (N,): of the next call's tokens;
    lengths (B,): of the sequences, these tokens included.
    """

    ROOM = 64
    max_seqlen = property(lambda cache: max(cache.lengths))

    def __init__(self, prompt_lengths, device):
        self.prompts = PackedSequences(prompt_lengths, device, causal=True)  # None after the first call
        self.lengths = self.prompts.lengths
        self.positions = self.prompts.positions
        self.sequence_ids = self.prompts.sequence_ids
        self.room = self.max_seqlen + self.ROOM
        self.buffers = {}
        self._masks = {}  # window -> mask of the present call; all layers of a model have the same slopes

    def advance(self):
        """After each call of the model: the next one holds one token of each sequence."""
        if self.prompts is None:
            self.positions = self.positions + 1
        else:
            self.positions = self.prompts.seqlens
            self.sequence_ids = torch.arange(len(self.lengths), device=self.positions.device)
            self.prompts = None
        self.lengths = [length + 1 for length in self.lengths]
        self._masks = {}
        if self.max_seqlen > self.room:
            self.room += self.ROOM
            for layer, buffers in self.buffers.items():
                self.buffers[layer] = [F.pad(buffer, (0, 0, 0, self.ROOM)) for buffer in buffers]

    def select(self, rows):
        """After `advance`: only the sequences `rows`, a list, go on, in this order. A row that stays in
        place is not copied: where one ends, let the last one take its place."""
        moves = [(row, place) for place, row in enumerate(rows) if row != place]
        moves = to_device(torch.tensor(moves, dtype=torch.int64).reshape(-1, 2), self.positions.device)
        sources, places = moves.unbind(1)

        def selected(t):
            return t.index_copy_(0, places, t.index_select(0, sources))[:len(rows)]

        for layer, buffers in self.buffers.items():
            self.buffers[layer] = [selected(buffer) for buffer in buffers]
        self.positions = selected(self.positions)
        self.sequence_ids = self.sequence_ids[:len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def attention(self, q, k, v, layer, *, scale=None, slopes=None, window=None):
        """As `PackedSequences.attention`; keys and values of the tokens before come from the cache."""
        keys, values = self._store(layer, k, v)  # (B, K, room, d)
        if self.prompts is not None:
            return self.prompts.attention(q, k, v, scale=scale, slopes=slopes, window=window)
        # The whole buffers are read, the mask hides what is not written yet: a slice would be copied before
        # each product. By plain products, as SDPA with one query a row takes 2 to 3 times as long on a CPU.
        if window not in self._masks:
            distance = self.positions[:, None] - torch.arange(self.room, device=q.device)  # (B, room)
            self._masks[window] = added_mask(distance[:, None, None], slopes, window)
        out = manual_attention(q[:, :, None], keys, values, self._masks[window], scale)  # (B, H, 1, d)
        return out.squeeze(2)

    def history(self, x, width, layer):
        """As `PackedSequences.history`; what came before is in the cache."""
        inputs, = self._store(layer, x[:, None])  # (B, 1, room, D)
        if self.prompts is not None:
            return self.prompts.history(x, width)
        at = self.positions[:, None] + torch.arange(1 - width, 1, device=x.device)  # (B, width)
        history = inputs[self.sequence_ids[:, None], 0, at.clamp(min=0)]  # (B, width, D)
        return history * (at >= 0)[..., None]

    def _store(self, layer, *tensors):
        """tensors (N, K, d), of the tokens of this call -> the layer's buffers, which hold them now."""
        if layer not in self.buffers:
            batch = len(self.lengths)
            self.buffers[layer] = [t.new_zeros(batch, t.shape[1], self.room, t.shape[2]) for t in tensors]
        for buffer, t in zip(self.buffers[layer], tensors):
            buffer[self.sequence_ids, :, self.positions] = t
        return self.buffers[layer]


def flash_takes(q):
    """Whether flash attention takes q (N, H, d): 16 bits, Ampere or newer, d a multiple of 8 up to 256."""
    head_dim = q.shape[-1]
    return (q.dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
            and torch.cuda.get_device_capability(q.device) >= (8, 0))


def manual_attention(q, k, v, mask, scale):
    """softmax(q k^T scale + mask) v, by plain products; it keeps Q T numbers a head for the gradient.

    q (B, H, Q, d), k and v (B, K, T, d), mask None or broadcast to (B, H, Q, T) -> (B, H, Q, d).
    """
    shape = q.shape
    if scale is None:
        scale = shape[-1] ** -0.5
    q = q.reshape(shape[0], k.shape[1], -1, shape[-1])  # query heads that share a key head, in a row
    scores = (q @ k.transpose(-1, -2) * scale).view(*shape[:3], -1)  # (B, H, Q, T)
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1).to(v.dtype)  # inside, softmax is in fp32 whatever the dtype
    out = probabilities.view(*q.shape[:3], -1) @ v  # (B, K, H / K * Q, d)
    return out.view(shape)


def added_mask(distance, slopes, window):
    """distance (B, 1, Q, T) from a query back to a key -> (B, 1 or H, Q, T), added to the scores: -inf where
    nothing may be seen, else 0 or ALiBi's penalty."""
    if slopes is None:
        bias = torch.zeros_like(distance, dtype=torch.float32)
    else:
        bias = -slopes[:, None, None] * distance
    invisible = distance < 0
    if window is not None:
        invisible = invisible | (distance >= window)
    return bias.masked_fill(invisible, -torch.inf)


def check_context(sequences, context):
    """InputError where a text is longer than the model reads."""
    if sequences.max_seqlen > context:
        raise InputError(f"a text has {sequences.max_seqlen} tokens, the model reads {context}: "
                         "lower --max-length")


def embedding(rows, width):
    """nn.Embedding without values: drawing them on the meta device would import torch's compiler, 2 s."""
    return torch.nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
