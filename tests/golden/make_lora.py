"""Write lora_gpt2/ and lora_llama/: adapters made by `peft` on golden/gpt2 and golden/llama, and the logits
of base and adapters together.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    python tests/golden/make_lora.py      (after make_models.py)
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

try:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
except ImportError:
    raise SystemExit("These files come from the package `peft`: "
                     "pip install peft==0.21.2 transformers==5.23.0") from None

HERE = Path(__file__).parent


def make(family, targets, r, alpha):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(HERE / family, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets,
                                            fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))  # B too, which starts at 0
    folder = HERE / f"lora_{family}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = family  # relative: the tests fill it in
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    expected = load_file(HERE / family / "expected.safetensors")
    documents = expected["tokens"].split(expected["lengths"].tolist())
    with torch.no_grad():
        logits = torch.cat([model(document[None]).logits[0] for document in documents])
    save_file({"logits": logits.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    make("gpt2", ["c_attn", "c_proj"], r=3, alpha=5)  # c_proj: of attention, which is square, and of the MLP
    make("llama", ["q_proj", "v_proj", "down_proj"], r=2, alpha=8)
