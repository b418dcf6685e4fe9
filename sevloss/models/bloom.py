"""BLOOM: attention by ALiBi, which has no position embeddings but a penalty that grows with the distance.

Names are those of the checkpoints. Sources: BigScience 2022 (BLOOM), Press et al. 2022 (ALiBi).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sevloss.models.attention import PackedSequences, embedding


@dataclass
class BloomConfig:
    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    seq_length: int = 2048  # read in training; ALiBi itself sets no limit
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0  # attention_dropout is not read: attention.py says why
    tie_word_embeddings: bool = True
    model_type: str = "bloom"
    eos_token_id: int | list | None = None
    context = property(lambda config: config.seq_length)


def alibi_slopes(heads, device):
    """(H,) 2^(-8/n), 2^(-16/n), ... for n heads; where n is no power of two, those of the next smaller power,
    then every other one of the next larger. Made on the device: a copy would make the host wait."""
    n = 2 ** math.floor(math.log2(heads))
    exponents = 8 / n * (torch.arange(n, device=device) + 1)
    between = 4 / n * (2 * torch.arange(heads - n, device=device) + 1)
    return 2.0 ** -torch.cat([exponents, between])


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.heads = config.n_head
        self.layer = layer
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, sequences, slopes):
        qkv = self.query_key_value(x).unflatten(1, (self.heads, 3, -1))  # (N, H, 3, d): stored head by head
        q, k, v = qkv.unbind(2)  # each (N, H, d)
        out = sequences.attention(q, k, v, self.layer, slopes=slopes)  # (N, H, d)
        return self.dense(out.flatten(1))  # (N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x):
        inner = F.gelu(self.dense_h_to_4h(x), approximate="tanh")  # (N, 4 D)
        return self.dense_4h_to_h(inner)  # (N, D)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.residual_after_norm = config.apply_residual_connection_post_layernorm

    def forward(self, h, sequences, slopes):
        x = self.input_layernorm(h)
        residual = x if self.residual_after_norm else h
        h = residual + self.dropout(self.self_attention(x, sequences, slopes))
        x = self.post_attention_layernorm(h)
        residual = x if self.residual_after_norm else h
        return residual + self.dropout(self.mlp(x))


class Bloom(nn.Module):
    """tokens (N,), lengths or KVCache -> hidden (N, D) after the last norm; logits: hidden @ head_weight.T"""

    Config = BloomConfig
    architecture = "BloomForCausalLM"
    prefix = "transformer."
    lora_targets = ("query_key_value",)
    blocks = property(lambda model: model.transformer["h"])

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "word_embeddings": embedding(config.vocab_size, config.hidden_size),
            "word_embeddings_layernorm": nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon),
            "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def normalize(raw, stored):
        """Old files say n_embed or num_attention_heads and num_hidden_layers."""
        old = {"hidden_size": "n_embed", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
        return {**{new: raw[name] for new, name in old.items() if name in raw}, **raw}

    @property
    def head_weight(self):  # (V, D)
        embedding = self.transformer["word_embeddings"]
        return embedding.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens, lengths=None, cache=None):
        sequences = cache or PackedSequences(lengths, tokens.device, causal=True)
        slopes = alibi_slopes(self.config.n_head, tokens.device)
        h = self.transformer["word_embeddings"](tokens)  # (N, D)
        h = self.transformer["word_embeddings_layernorm"](h)
        for block in self.blocks:
            h = block(h, sequences, slopes)
        return self.transformer["ln_f"](h)
