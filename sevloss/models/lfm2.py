"""LFM2: some blocks attend, the others mix neighbouring tokens by a gated short convolution.

Names are those of the checkpoints. Source: Liquid AI 2025 (LFM2), and for what it leaves out `transformers`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.models.attention import PackedSequences, check_context, embedding
from sevloss.models.llama import RMSNorm, rope_settings, rotary_angles, rotate


@dataclass
class Lfm2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_types: list | None = None  # "full_attention" or "conv", block by block
    max_position_embeddings: int = 128_000
    norm_eps: float = 1e-5
    rope_parameters: dict | None = None  # of new files; old ones have the next two
    rope_theta: float = 1_000_000.0
    rope_scaling: dict | None = None
    conv_L_cache: int = 3  # width of the convolution
    conv_bias: bool = False
    block_auto_adjust_ff_dim: bool = True
    block_ffn_dim_multiplier: float | None = 1.0
    block_multiple_of: int = 256
    tie_word_embeddings: bool = True
    model_type: str = "lfm2"
    eos_token_id: int | list | None = None
    context = property(lambda config: config.max_position_embeddings)
    head_dim = property(lambda config: config.hidden_size // config.num_attention_heads)

    @property
    def inner(self):
        """Width of the feed-forward: 2/3 of intermediate_size, times the multiplier, rounded up."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        inner = int(2 * self.intermediate_size / 3)
        inner = int((self.block_ffn_dim_multiplier or 1.0) * inner)
        return -(-inner // self.block_multiple_of) * self.block_multiple_of


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_layernorm = RMSNorm(self.head_dim, config.norm_eps)  # on each head
        self.k_layernorm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x, sequences, angles):
        q = self.q_proj(x).unflatten(1, (-1, self.head_dim))  # (N, H, d)
        k = self.k_proj(x).unflatten(1, (-1, self.head_dim))  # (N, K, d)
        v = self.v_proj(x).unflatten(1, (-1, self.head_dim))  # (N, K, d)
        q = rotate(self.q_layernorm(q), *angles).to(v.dtype)
        k = rotate(self.k_layernorm(k), *angles).to(v.dtype)
        out = sequences.attention(q, k, v, self.layer)  # (N, H, d)
        return self.out_proj(out.flatten(1))  # (N, D)


class ShortConvolution(nn.Module):
    """out_proj(C * conv(B * x)), with B, C and x all from in_proj."""

    def __init__(self, config, layer):
        super().__init__()
        size = config.hidden_size
        self.layer = layer
        self.in_proj = nn.Linear(size, 3 * size, bias=config.conv_bias)
        self.conv = nn.Conv1d(size, size, config.conv_L_cache, groups=size, bias=config.conv_bias)
        self.out_proj = nn.Linear(size, size, bias=config.conv_bias)

    def forward(self, x, sequences, angles):
        b, c, x = self.in_proj(x).chunk(3, dim=-1)  # each (N, D)
        weight = self.conv.weight[:, 0].to(x.dtype)  # (D, width): one filter a channel
        history = sequences.history(b * x, weight.shape[1], self.layer)  # (N, width, D)
        mixed = (history * weight.T).sum(1)  # (N, D)
        if self.conv.bias is not None:
            mixed = mixed + self.conv.bias.to(x.dtype)
        return self.out_proj(c * mixed)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.w2 = nn.Linear(config.inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (N, D) -> (N, inner) -> (N, D)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attends = config.layer_types[layer] == "full_attention"
        if self.attends:
            self.self_attn = Attention(config, layer)
        else:
            self.conv = ShortConvolution(config, layer)
        self.feed_forward = FeedForward(config)
        self.operator_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, h, sequences, angles):
        operator = self.self_attn if self.attends else self.conv
        h = h + operator(self.operator_norm(h), sequences, angles)
        return h + self.feed_forward(self.ffn_norm(h))


class Lfm2(nn.Module):
    """tokens (N,), lengths or KVCache -> hidden (N, D) after the last norm; logits: hidden @ head_weight.T"""

    Config = Lfm2Config
    architecture = "Lfm2ForCausalLM"
    prefix = "model."
    lora_targets = ("q_proj", "v_proj")
    blocks = property(lambda model: model.model["layers"])

    def __init__(self, config):
        super().__init__()
        types = config.layer_types or ()
        if len(types) != config.num_hidden_layers or not set(types) <= {"full_attention", "conv"}:
            raise InputError("layer_types in config.json must say full_attention or conv for each of "
                             f"{config.num_hidden_layers} blocks; it is {config.layer_types}")
        self.config = config
        self.rope = rope_settings(config)
        self.model = nn.ModuleDict({
            "embed_tokens": embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)]),
            "embedding_norm": RMSNorm(config.hidden_size, config.norm_eps),  # in spite of its name the last
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def normalize(raw, stored):
        """Old files: block_ff_dim, full_attn_idxs and tie_embedding, which go before the new names."""
        new_names = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
        raw = raw | {new: raw[old] for old, new in new_names.items() if old in raw}
        if raw.get("full_attn_idxs") is not None:
            layers = range(raw.get("num_hidden_layers", 0))
            raw["layer_types"] = ["full_attention" if i in raw["full_attn_idxs"] else "conv" for i in layers]
        return raw

    @property
    def head_weight(self):  # (V, D)
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens, lengths=None, cache=None):
        sequences = cache or PackedSequences(lengths, tokens.device, causal=True)
        check_context(sequences, self.config.context)
        angles = rotary_angles(self.rope, sequences.positions, self.config.head_dim)
        h = self.model["embed_tokens"](tokens)  # (N, D)
        for block in self.blocks:
            h = block(h, sequences, angles)
        return self.model["embedding_norm"](h)
