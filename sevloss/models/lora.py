"""LoRA: the base model is frozen, and some of its linear layers learn a low-rank addition (Hu et al. 2021).

Adapters are stored in the format of the package `peft`, which opens them.
"""

import json
import math
import re

import torch
from torch import nn

from sevloss import InputError, interpreting
from sevloss.inputs import hub
from sevloss.models.gpt2 import Conv1D

PREFIX = "base_model.model."  # of names in peft's files

# Of peft's settings, those that are read, and those that change nothing in what trained adapters compute. Any
# other must be off: peft's next version may have more.
READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path")
WITHOUT_EFFECT = ("task_type", "inference_mode", "peft_version", "auto_mapping", "fan_in_fan_out",
                  "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config")
OFF = ("null", "false", "{}", "[]", '"none"')
# Other ways to begin, PiSSA and OLoRA among them, change the base's weights
ALLOWED = {"peft_type": ('"LORA"',), "init_lora_weights": ("true", "false", '"gaussian"'),
           "revision": ("null", '"main"')}


class LoRALinear(nn.Module):
    """y = base_layer(x) + alpha / r * B A dropout(x).

    A (r, in) starts random and B (out, r) at 0, so y starts as the base's. Both are fp32, whatever the base
    is stored in.
    """

    def __init__(self, base_layer, r, alpha, dropout):
        super().__init__()
        self.transposed = isinstance(base_layer, Conv1D)  # its weight is (in, out)
        outputs, inputs = base_layer.weight.T.shape if self.transposed else base_layer.weight.shape
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.scale = alpha / r
        self.lora_A = nn.Linear(inputs, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, outputs, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        low_rank = self.lora_A(self.dropout(x)) * self.scale  # (N, r)
        return self.base_layer(x) + self.lora_B(low_rank)

    @torch.no_grad()
    def merged(self):
        """The base layer with the addition in its weight: the same function, at the base's price."""
        delta = self.scale * self.lora_B.weight @ self.lora_A.weight  # (out, in)
        weight = self.base_layer.weight
        weight.copy_(weight.float() + (delta.T if self.transposed else delta))
        return self.base_layer


def attach(model, r, *, alpha, dropout=0.0, targets=None, excluded=()):
    """Freezes `model` and gives LoRA layers to every linear layer whose name ends in one of `targets`
    (default: the family's) and in none of `excluded`. Like peft, takes a string in place of a list for a
    regular expression of whole names."""
    targets = targets or list(model.lora_targets)
    linear = [name for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"]  # whose weight the loss reads
    chosen = set()
    for target, pattern in _patterns(targets).items():
        matching = {name for name in linear if re.fullmatch(pattern, name)}
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(f"LoRA targets: the model has no linear layers called {target!r}; "
                             f"it has {', '.join(known)}")
        chosen |= matching
    for pattern in _patterns(excluded).values():
        chosen -= {name for name in chosen if re.fullmatch(pattern, name)}
    model.requires_grad_(False)
    for name in sorted(chosen):
        layer = LoRALinear(model.get_submodule(name), r, alpha, dropout)
        model.set_submodule(name, layer.train(model.training))
    model.lora_config = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}


def _patterns(targets):
    """{target: regular expression of whole names}"""
    if isinstance(targets, str):
        return {targets: targets}
    return {target: rf"(.*\.)?{re.escape(target)}" for target in targets}


def layers(model):
    """{name in the checkpoint: LoRALinear}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def weights(model):
    """{name in peft's files: lora_A and lora_B of every layer}"""
    return {PREFIX + name: p for name, p in model.named_parameters() if ".lora_" in name}


def merge(model):
    """LoRA layers become plain linear layers again, with what they have learnt."""
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.merged())


def adapter_config(model):
    """adapter_config.json, as `peft` writes it."""
    transposed = any(layer.transposed for layer in layers(model).values())
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.base,
            "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True, **model.lora_config}


def attach_stored(model, folder):
    """Attaches adapters as the adapter_config.json of `folder`, ours or peft's, describes them."""
    path = folder / "adapter_config.json"
    config = hub.read_json(path)
    unknown = [f"{key} {value!r}" for key, value in config.items() if key not in (*READ, *WITHOUT_EFFECT)
               and json.dumps(value) not in ALLOWED.get(key, OFF)]
    if unknown:
        raise InputError(f"{folder}: adapters with {', '.join(unknown)} are not known; "
                         "merge them with the package that made them")
    with interpreting(path):
        r, alpha = config["r"], config["lora_alpha"]
        if not (0 < r < 10_000 and math.isfinite(alpha) and config["target_modules"]):
            raise ValueError(f"r {r}, lora_alpha {alpha}, target_modules {config['target_modules']!r}")
        attach(model, r, alpha=alpha, dropout=config.get("lora_dropout", 0.0),
               targets=config["target_modules"], excluded=config.get("exclude_modules") or ())
