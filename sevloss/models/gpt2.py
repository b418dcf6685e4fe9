"""GPT-2, and the variant of AraGPT2-large and -mega (the norms placed as in GROVER).

Module and parameter names are those of the checkpoints. Linear weights are stored (in, out).
Sources: Radford et al. 2019; Zellers et al. 2019 (GROVER); Antoun et al. 2021 (AraGPT2).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.models.attention import PackedSequences, check_context

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,  # the erf one differs from the tanh one by up to 5e-4
    "relu": F.relu,
}


@dataclass
class GPT2Config:
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    model_type: str = "gpt2"
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    @property
    def context(self):
        return self.n_positions


class Conv1D(nn.Module):
    """y = x W + b with W (in, out), as OpenAI stored it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.heads, self.layer, self.dropout = config.n_head, layer, config.attn_pdrop
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x, sequences):
        q, k, v = self.c_attn(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # each (N, H, d)
        out = sequences.attention(q, k, v, self.layer, dropout=self.dropout if self.training else 0.0, scale=self.scale)
        return self.c_proj(out.flatten(1))  # (N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, inner)
        self.c_proj = Conv1D(inner, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, h, sequences):
        h = h + self.dropout(self.attn(self.ln_1(h), sequences))
        return h + self.dropout(self.mlp(self.ln_2(h)))


class GroverBlock(Block):
    """No norm before attention; the second norm comes after the MLP's residual."""

    def forward(self, h, sequences):
        h = h + self.dropout(self.attn(h, sequences))
        return self.ln_2(h + self.dropout(self.mlp(self.ln_1(h))))


class GPT2(nn.Module):
    """tokens (N,), lengths -> hidden states (N, D) after the last norm; logits are hidden @ head_weight.T."""

    architecture, prefix, optional_keys = "GPT2LMHeadModel", "transformer.", ()
    ignored_keys = r"(^|\.)attn\.(bias|masked_bias)$"  # old checkpoints carry the causal mask
    lora_targets = ("c_attn", "c_proj")
    Config = GPT2Config

    def __init__(self, config):
        super().__init__()
        if config.activation_function not in ACTIVATIONS:
            raise InputError(f"activation_function {config.activation_function!r} in config.json is not known; "
                             f"known: {', '.join(ACTIVATIONS)}")
        if config.n_embd % config.n_head:
            raise InputError(f"n_embd {config.n_embd} in config.json is not a multiple of n_head {config.n_head}")
        self.config = config
        grover = config.model_type == "aragpt2"
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd),
                                          "wpe": nn.Embedding(config.n_positions, config.n_embd)})
        if grover:
            self.transformer["emb_norm"] = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        block = GroverBlock if grover else Block
        self.transformer["h"] = nn.ModuleList([block(config, i) for i in range(config.n_layer)])
        if not grover:
            self.transformer["ln_f"] = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.embd_pdrop)

    @staticmethod
    def normalize_config(raw, names):
        """config.json as stored -> as meant: AraGPT2-large and -mega are known by their embedding norm."""
        return {**raw, "model_type": "aragpt2"} if any(name.endswith("emb_norm.weight") for name in names) else raw

    @property
    def blocks(self):
        return self.transformer["h"]

    @property
    def head_weight(self):
        """(V, D)"""
        return self.transformer["wte"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens, lengths):
        return self.stream(tokens, PackedSequences(lengths, tokens.device, causal=True))

    def stream(self, tokens, sequences):
        """The same for any sequences: a `KVCache` decodes."""
        check_context(sequences, self.config.context)
        parts = self.transformer
        h = self.dropout(parts["wte"](tokens) + parts["wpe"](sequences.positions))  # (N, D)
        if "emb_norm" in parts:
            h = parts["emb_norm"](h)
        for block in self.blocks:
            h = block(h, sequences)
        return parts["ln_f"](h) if "ln_f" in parts else h
