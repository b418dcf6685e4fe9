"""LoRA: the base model is frozen, and chosen linear layers learn a low-rank addition (Hu et al. 2021).

Adapters are stored in the format of the package `peft`, which opens them.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sevloss import InputError, write_atomically
from sevloss.inputs import hub

PREFIX = "base_model.model."  # of names in peft's files


class LoRALinear(nn.Module):
    """y = base_layer(x) + alpha / r * B A dropout(x). A (r, in) starts random and B (out, r) at 0, so y starts as the base's."""

    def __init__(self, base_layer, r, alpha, dropout):
        super().__init__()
        self.transposed = not isinstance(base_layer, nn.Linear)  # GPT-2 stores (in, out)
        inputs, outputs = base_layer.weight.shape if self.transposed else reversed(base_layer.weight.shape)
        device = base_layer.weight.device
        self.base_layer, self.scale = base_layer, alpha / r
        self.lora_A = nn.Linear(inputs, r, bias=False, device=device)  # fp32, whatever the base is stored in
        self.lora_B = nn.Linear(r, outputs, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x)) * self.scale)

    def merged(self):
        """The base layer with the addition in its weight: the same function, at the base's price."""
        delta = self.scale * self.lora_B.weight @ self.lora_A.weight  # (out, in)
        weight = self.base_layer.weight
        with torch.no_grad():
            weight.copy_(weight.float() + (delta.T if self.transposed else delta))
        return self.base_layer


def attach(model, r, *, alpha, dropout=0.0, targets=None):
    """Freezes `model` and gives LoRA layers to every linear layer whose name ends in one of `targets` (default: the family's)."""
    targets = list(targets or model.lora_targets)
    linear = {name for name, module in model.named_modules()
              if not isinstance(module, nn.Embedding) and getattr(module, "weight", torch.empty(0)).dim() == 2}
    found = {target: [name for name, _ in model.named_modules() if name == target or name.endswith("." + target)] for target in targets}
    for target, names in found.items():
        if not names or any(name not in linear for name in names):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(f"--lora-targets: the model has no linear layers called {target!r}; it has {', '.join(known)}")
    model.requires_grad_(False)
    for name in sorted({name for names in found.values() for name in names}):
        _replace(model, name, LoRALinear(model.get_submodule(name), r, alpha, dropout).train(model.training))
    model.lora_config = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}


def layers(model):
    """{name in the checkpoint: LoRALinear}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model):
    """LoRA layers become plain linear layers again, with what they have learnt."""
    for name, layer in layers(model).items():
        _replace(model, name, layer.merged())


def save(model, folder):
    """adapter_config.json and adapter_model.safetensors, as `peft` writes them."""
    tensors = {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight.detach().cpu().contiguous()
               for name, layer in layers(model).items() for part in ("lora_A", "lora_B")}
    write_atomically(Path(folder) / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    transposed = any(layer.transposed for layer in layers(model).values())
    (Path(folder) / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.base, "bias": "none",
        "fan_in_fan_out": transposed, "inference_mode": True, **model.lora_config}, indent=1, ensure_ascii=False), encoding="utf-8")


def load(model, folder):
    """Attaches the adapters of `folder`, ours or peft's, to their base model."""
    config = hub.read_json(Path(folder) / "adapter_config.json")
    plain = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None),
             "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": ([], None), "layers_to_transform": ([], None)}
    for key, values in plain.items():
        if config.get(key) not in values:
            raise InputError(f"{folder}: adapters with {key} {config[key]!r} are not known; merge them with the package that made them")
    if not isinstance(config.get("target_modules"), list) or not all(isinstance(config.get(k), (int, float)) for k in ("r", "lora_alpha")):
        raise InputError(f"{folder}/adapter_config.json must give r, lora_alpha and a list target_modules")
    attach(model, config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0), targets=config["target_modules"])
    expected = {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight for name, layer in layers(model).items()
                for part in ("lora_A", "lora_B")}
    stored = hub.open_tensors(hub.find_file(folder, hub.ADAPTERS))
    if different := sorted(expected.keys() ^ stored.keys()):
        raise InputError(f"{folder}: the adapters do not fit the base {config.get('base_model_name_or_path')}: {different[0]} "
                         f"is {'missing' if different[0] in expected else 'surplus'}")
    with torch.no_grad():
        for name, weight in expected.items():
            tensor = stored[name]()
            if tensor.shape != weight.shape:
                raise InputError(f"{folder}: {name} has shape {tuple(tensor.shape)}, the base asks for {tuple(weight.shape)}")
            weight.copy_(tensor)


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module) if parent else setattr(model, child, module)
