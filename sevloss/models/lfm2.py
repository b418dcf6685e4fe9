"""LFM2: some blocks attend, the others mix neighbouring tokens by a gated short convolution.

Names are those of the checkpoints. Source: Liquid AI 2025 (LFM2), and its class in `transformers` for what the report leaves out.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.models.attention import PackedSequences, check_context
from sevloss.models.llama import RMSNorm, rotary_angles, rotate


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
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    @property
    def context(self):
        return self.max_position_embeddings

    @property
    def inner(self):
        """Width of the feed-forward: two thirds of intermediate_size, times the multiplier, up to a multiple of block_multiple_of."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        inner = int(2 * self.intermediate_size / 3)
        inner = int((self.block_ffn_dim_multiplier or 1.0) * inner)
        return -(-inner // self.block_multiple_of) * self.block_multiple_of


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_layernorm, self.k_layernorm = (RMSNorm(self.head_dim, config.norm_eps) for _ in range(2))  # on each head

    def forward(self, x, sequences, angles):
        q, k, v = (project(x).unflatten(1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))  # (N, heads, d)
        q, k = rotate(self.q_layernorm(q), *angles), rotate(self.k_layernorm(k), *angles)
        return self.out_proj(sequences.attention(q, k, v, self.layer).flatten(1))  # (N, D)


class ShortConvolution(nn.Module):
    """out_proj(C * conv(B * x)), with B, C and x all from in_proj."""

    def __init__(self, config, layer):
        super().__init__()
        width = config.conv_L_cache
        self.layer = layer
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.conv_bias)
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, width, groups=config.hidden_size, bias=config.conv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.conv_bias)

    def forward(self, x, sequences, angles):
        b, c, x = self.in_proj(x).chunk(3, dim=-1)  # each (N, D)
        mixed = sequences.convolve(b * x, self.conv.weight[:, 0].to(x.dtype), self.layer)
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
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        attends = config.layer_types[layer] == "full_attention"
        self.operator = "self_attn" if attends else "conv"  # the checkpoint has a name for each
        self.register_module(self.operator, (Attention if attends else ShortConvolution)(config, layer))
        self.feed_forward = FeedForward(config)
        self.operator_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, h, sequences, angles):
        h = h + getattr(self, self.operator)(self.operator_norm(h), sequences, angles)
        return h + self.feed_forward(self.ffn_norm(h))


class Lfm2(nn.Module):
    """tokens (N,), lengths -> hidden states (N, D) after the last norm; logits are hidden @ head_weight.T."""

    architecture, prefix, optional_keys = "Lfm2ForCausalLM", "model.", ()
    ignored_keys = r"\0"  # nothing
    lora_targets = ("q_proj", "v_proj")
    Config = Lfm2Config

    def __init__(self, config):
        super().__init__()
        if len(config.layer_types or ()) != config.num_hidden_layers or set(config.layer_types) - {"full_attention", "conv"}:
            raise InputError(f"layer_types in config.json must say full_attention or conv for each of {config.num_hidden_layers} blocks; "
                             f"it is {config.layer_types}")
        if config.num_attention_heads % config.num_key_value_heads:
            raise InputError(f"num_attention_heads {config.num_attention_heads} in config.json is not a multiple of num_key_value_heads "
                             f"{config.num_key_value_heads}")
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)]),
            "embedding_norm": RMSNorm(config.hidden_size, config.norm_eps),  # in spite of its name the last norm
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def normalize_config(raw, names):
        """Old files: block_ff_dim, full_attn_idxs and tie_embedding, which go before the new names."""
        raw = dict(raw)
        if "block_ff_dim" in raw:
            raw["intermediate_size"] = raw["block_ff_dim"]
        if raw.get("full_attn_idxs") is not None:
            attending = raw["full_attn_idxs"]
            raw["layer_types"] = ["full_attention" if i in attending else "conv" for i in range(raw.get("num_hidden_layers", 0))]
        if "tie_embedding" in raw:
            raw["tie_word_embeddings"] = raw["tie_embedding"]
        return raw

    @property
    def blocks(self):
        return self.model["layers"]

    @property
    def head_weight(self):
        """(V, D)"""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens, lengths):
        return self.stream(tokens, PackedSequences(lengths, tokens.device, causal=True))

    def stream(self, tokens, sequences):
        """The same for any sequences: a `KVCache` decodes."""
        check_context(sequences, self.config.context)
        angles = rotary_angles(self.config, sequences.positions, self.config.hidden_size // self.config.num_attention_heads)
        h = self.model["embed_tokens"](tokens)  # (N, D)
        for block in self.blocks:
            h = block(h, sequences, angles)
        return self.model["embedding_norm"](h)
