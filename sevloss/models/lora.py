"""LoRA: the base model is frozen, and some of its linear layers learn a low-rank addition (Hu et al. 2021).

Adapters are stored in the format of the package `peft`, which opens them.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sevloss import InputError, distributed, write_atomically
from sevloss.inputs import hub
from sevloss.models.gpt2 import Conv1D

PREFIX = "base_model.model."  # of names in peft's files

# Settings of peft that change what adapters compute, and the values that mean: not used.
UNSUPPORTED = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None),
               "use_rslora": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
               "modules_to_save": ([], None), "layers_to_transform": ([], None)}


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


def attach(model, r, *, alpha, dropout=0.0, targets=None):
    """Freezes `model` and gives LoRA layers to every linear layer whose name ends in one of `targets`
    (default: the family's)."""
    targets = list(targets or model.lora_targets)
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    names = set()
    for target in targets:
        matching = [name for name in linear if name == target or name.endswith("." + target)]
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(f"--lora-targets: the model has no linear layers called {target!r}; "
                             f"it has {', '.join(known)}")
        names.update(matching)
    model.requires_grad_(False)
    for name in sorted(names):
        layer = LoRALinear(model.get_submodule(name), r, alpha, dropout)
        model.set_submodule(name, layer.train(model.training))
    model.lora_config = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}


def layers(model):
    """{name in the checkpoint: LoRALinear}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def weights(model):
    """{name in peft's files: lora_A and lora_B of every layer}"""
    named = {}
    for name, layer in layers(model).items():
        named[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight
        named[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight
    return named


def merge(model):
    """LoRA layers become plain linear layers again, with what they have learnt."""
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.merged())


def save(model, folder):
    """adapter_config.json and adapter_model.safetensors, as `peft` writes them."""
    folder = Path(folder)
    tensors = {name: distributed.whole(weight.detach()).cpu().contiguous()
               for name, weight in weights(model).items()}
    write_atomically(folder / "adapter_model.safetensors",
                     lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    transposed = any(layer.transposed for layer in layers(model).values())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.base,
              "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True, **model.lora_config}
    text = json.dumps(config, indent=1, ensure_ascii=False)
    write_atomically(folder / "adapter_config.json", lambda path: path.write_text(text, encoding="utf-8"))


def load(model, folder):
    """Attaches the adapters of `folder`, ours or peft's, to their base model."""
    # what they are
    config = hub.read_json(Path(folder) / "adapter_config.json")
    for key, allowed in UNSUPPORTED.items():
        if config.get(key) not in allowed:
            raise InputError(f"{folder}: adapters with {key} {config[key]!r} are not known; "
                             "merge them with the package that made them")
    r, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not (isinstance(r, int) and isinstance(alpha, (int, float)) and isinstance(targets, list)):
        raise InputError(f"{folder}/adapter_config.json must give r, lora_alpha and a list target_modules")
    attach(model, r, alpha=alpha, dropout=config.get("lora_dropout", 0.0), targets=targets)

    # their weights
    expected = weights(model)
    stored = hub.open_tensors(hub.find_file(folder, hub.ADAPTERS))
    if different := sorted(expected.keys() ^ stored.keys()):
        state = "missing" if different[0] in expected else "surplus"
        base = config.get("base_model_name_or_path")
        raise InputError(f"{folder}: the adapters do not fit the base {base}: {different[0]} is {state}")
    with torch.no_grad():
        for name, weight in expected.items():
            tensor = stored[name]()
            if tensor.shape != weight.shape:
                raise InputError(f"{folder}: {name} has shape {tuple(tensor.shape)}, "
                                 f"the base asks for {tuple(weight.shape)}")
            weight.copy_(tensor)
