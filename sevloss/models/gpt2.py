"""GPT-2, and the variant of AraGPT2-large and -mega (the norms placed as in GROVER).

Shapes: N tokens of all sequences, end to end; D wide; H heads, each d wide. `sequences` (attention.py) knows
where each sequence begins and computes attention. Names are those of the checkpoints. Sources: Radford et al.
2019; Zellers et al. 2019 (GROVER); Antoun et al. 2021 (AraGPT2).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.models.attention import PackedSequences, check_context, embedding

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
    resid_pdrop: float = 0.1  # attn_pdrop is not read: attention.py says why
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    model_type: str = "gpt2"
    eos_token_id: int | list | None = None
    context = property(lambda config: config.n_positions)


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
        self.heads = config.n_head
        self.layer = layer
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x, sequences):
        qkv = self.c_attn(x).unflatten(1, (3, self.heads, -1))  # (N, 3, H, d)
        q, k, v = qkv.unbind(1)  # each (N, H, d)
        out = sequences.attention(q, k, v, self.layer, scale=self.scale)  # (N, H, d)
        return self.c_proj(out.flatten(1))  # (N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, inner)
        self.c_proj = Conv1D(inner, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))  # (N, D) -> (N, inner) -> (N, D)


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
    """tokens (N,), lengths or KVCache -> hidden (N, D) after the last norm; logits: hidden @ head_weight.T"""

    Config = GPT2Config
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."  # of all names but the head's; some checkpoints leave it out
    ignored_keys = r"(^|\.)attn\.(bias|masked_bias)$"  # old checkpoints carry the causal mask
    lora_targets = ("c_attn", "c_proj")
    blocks = property(lambda model: model.transformer["h"])

    def __init__(self, config):
        super().__init__()
        if config.activation_function not in ACTIVATIONS:
            raise InputError(f"activation_function {config.activation_function!r} in config.json is not "
                             f"known; known: {', '.join(ACTIVATIONS)}")
        self.config = config
        grover = config.model_type == "aragpt2"
        block_class = GroverBlock if grover else Block
        self.transformer = nn.ModuleDict({
            "wte": embedding(config.vocab_size, config.n_embd),
            "wpe": embedding(config.n_positions, config.n_embd),
            "h": nn.ModuleList([block_class(config, layer) for layer in range(config.n_layer)]),
            "emb_norm" if grover else "ln_f": nn.LayerNorm(config.n_embd, config.layer_norm_epsilon),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.embd_pdrop)

    @staticmethod
    def normalize(raw, stored):
        """config.json as stored -> as meant: AraGPT2-large and -mega are known by their embedding norm."""
        if any(name.endswith("emb_norm.weight") for name in stored):
            return {**raw, "model_type": "aragpt2"}
        return raw

    @property
    def head_weight(self):  # (V, D)
        return self.transformer["wte"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens, lengths=None, cache=None):
        sequences = cache or PackedSequences(lengths, tokens.device, causal=True)
        check_context(sequences, self.config.context)
        h = self.transformer["wte"](tokens) + self.transformer["wpe"](sequences.positions)  # (N, D)
        h = self.dropout(h)
        if "emb_norm" in self.transformer:
            h = self.transformer["emb_norm"](h)
        for block in self.blocks:
            h = block(h, sequences)
        if "ln_f" in self.transformer:
            h = self.transformer["ln_f"](h)
        return h
