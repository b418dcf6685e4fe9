"""Llama, Qwen2 and Qwen3: one architecture. What differs is said where it differs.

Names are those of the checkpoints. Sources: Touvron et al. 2023 (Llama), Grattafiori et al. 2024 (Llama 3's
rotary scaling), Yang et al. 2024 (Qwen2), Yang et al. 2025 (Qwen3), Su et al. 2021 (rotary positions).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.models.attention import PackedSequences, check_context, embedding


@dataclass
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # fewer than heads: several query heads share one key and value
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None  # of new files; old ones have the next two
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False  # attention_dropout is not read: attention.py says why
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: list | None = None
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    eos_token_id: int | list | None = None
    context = property(lambda config: config.max_position_embeddings)

    def window(self, layer):
        """How many tokens attention sees in this layer; None: all."""
        if self.model_type == "llama" or not self.use_sliding_window:
            return None
        if self.layer_types:
            slides = self.layer_types[layer] == "sliding_attention"
        else:
            slides = layer >= self.max_window_layers
        return self.sliding_window if slides else None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; inside, in fp32 whatever the dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        x = x.to(self.weight.dtype)  # not the weight to x's: under autocast that would round it to 16 bits
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_settings(config):
    """rope_theta, rope_type and what else new and old files say of rotary positions, as one dict."""
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {}), **(config.rope_parameters or {})}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise InputError(f"rotary positions of type {rope['rope_type']!r} in config.json are not known; "
                         "known: default, linear, llama3")
    return rope


def rotary_angles(rope, positions, head_dim):
    """positions (N,) -> cos, sin (N, 1, d / 2) in fp32: in 16 bits, large positions would become one."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequency = rope["rope_theta"] ** -exponents  # (d / 2,)
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    elif rope["rope_type"] == "llama3":
        # Short waves stay, long ones are stretched by `factor`, those between by something between.
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in that context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        stay = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (stay + (1 - stay) / rope["factor"])
    angles = positions[:, None, None] * frequency  # (N, 1, d / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (N, H, d) -> in fp32; the first half of d is turned with the second (not neighbours in pairs)."""
    a, b = x.float().chunk(2, dim=-1)  # each (N, H, d / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        self.head_dim = config.head_dim or config.hidden_size // heads
        self.layer = layer
        self.window = config.window(layer)
        qkv_bias = config.attention_bias or config.model_type == "qwen2"  # Qwen2: not on the output
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        if config.model_type == "qwen3":  # on each head, before the rotation
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, sequences, angles):
        q = self.q_proj(x).unflatten(1, (-1, self.head_dim))  # (N, H, d)
        k = self.k_proj(x).unflatten(1, (-1, self.head_dim))  # (N, K, d)
        v = self.v_proj(x).unflatten(1, (-1, self.head_dim))  # (N, K, d)
        q = rotate(self.q_norm(q), *angles).to(v.dtype)
        k = rotate(self.k_norm(k), *angles).to(v.dtype)
        out = sequences.attention(q, k, v, self.layer, window=self.window)  # (N, H, d)
        return self.o_proj(out.flatten(1))  # (N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (N, D) -> (N, inner) -> (N, D)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, sequences, angles):
        h = h + self.self_attn(self.input_layernorm(h), sequences, angles)
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(nn.Module):
    """tokens (N,), lengths or KVCache -> hidden (N, D) after the last norm; logits: hidden @ head_weight.T"""

    Config = LlamaConfig
    prefix = "model."
    ignored_keys = r"rotary_emb\.inv_freq$"  # old checkpoints carry the frequencies
    lora_targets = ("q_proj", "v_proj")
    blocks = property(lambda model: model.model["layers"])

    def __init__(self, config):
        super().__init__()
        if config.hidden_act != "silu":
            raise InputError(f"hidden_act {config.hidden_act!r} in config.json is not known; "
                             f"a {config.model_type} has silu")
        self.config = config
        self.architecture = config.model_type.capitalize() + "ForCausalLM"  # Qwen2ForCausalLM
        self.rope = rope_settings(config)
        self.model = nn.ModuleDict({
            "embed_tokens": embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)]),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def normalize(raw, stored):
        """What a config.json of `transformers` may leave out differs between the three."""
        defaults = {"llama": {}, "qwen2": {"max_position_embeddings": 32768},
                    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128}}
        return defaults[raw["model_type"]] | raw

    @property
    def head_weight(self):  # (V, D)
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens, lengths=None, cache=None):
        sequences = cache or PackedSequences(lengths, tokens.device, causal=True)
        check_context(sequences, self.config.context)
        angles = rotary_angles(self.rope, sequences.positions, self.blocks[0].self_attn.head_dim)
        h = self.model["embed_tokens"](tokens)  # (N, D)
        for block in self.blocks:
            h = block(h, sequences, angles)
        return self.model["norm"](h)
