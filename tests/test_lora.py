"""LoRA: a frozen base, adapters that learn, and files that `peft` and we read from one another."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from sevloss import InputError, data
from sevloss.models import load_model, load_tokenizer, lora, save_model


@pytest.fixture
def document(golden):
    expected = load_file(golden / "gpt2" / "expected.safetensors")
    return expected["tokens"], expected["lengths"].tolist()


@pytest.fixture
def adapted(golden):
    """adapted("gpt2") -> the golden model with adapters that do something (B starts at 0)."""
    def make(family="gpt2", **options):
        torch.manual_seed(0)
        model = load_model(golden / family)
        lora.attach(model, 3, alpha=5.0, **options)
        for layer in lora.layers(model).values():
            torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
        return model
    return make


@pytest.fixture
def from_peft(golden, tmp_path):
    """from_peft("gpt2", r=4) -> a copy of what peft wrote, with the base filled in and other settings in its
    adapter_config.json."""
    def copy(family, **settings):
        folder = shutil.copytree(golden / f"lora_{family}", tmp_path / "adapters")
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": str(golden / family)} | settings
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
    return copy


def assert_same(ours, reference, tolerance=1e-5):
    assert (ours - reference).abs().max() < tolerance * reference.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_adapters_of_peft(golden, from_peft, family):
    """Read and merged, they give the logits that peft computed with them."""
    expected = load_file(golden / family / "expected.safetensors")
    model = load_model(from_peft(family))
    logits = model(expected["tokens"], expected["lengths"].tolist()) @ model.head_weight.T
    assert_same(logits, load_file(golden / f"lora_{family}" / "expected.safetensors")["logits"])
    assert (logits - expected["logits"]).abs().max() > 0.1 * logits.abs().max()  # they do something
    assert not lora.layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "qwen2", "qwen3", "lfm2"])
def test_every_family_has_targets(golden, family):
    """The untrained adapters change nothing, and gradients reach them alone."""
    expected = load_file(golden / family / "expected.safetensors")
    tokens, lengths = expected["tokens"], expected["lengths"].tolist()
    model = load_model(golden / family)
    lora.attach(model, 2, alpha=4.0)
    hidden = model(tokens, lengths)
    assert_same(hidden, expected["final"])
    hidden.square().sum().backward()
    layers = lora.layers(model)
    assert layers and all(layer.lora_B.weight.grad.abs().max() > 0 for layer in layers.values())
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_merging_changes_nothing_but_the_layers(adapted, golden, family):
    tokens, model = torch.arange(9), adapted(family)
    before = model(tokens, [9])
    lora.merge(model)
    assert_same(model(tokens, [9]), before)
    assert list(model.state_dict()) == list(load_model(golden / family).state_dict())


@torch.no_grad()
def test_saved_and_read_again(adapted, document, tmp_path):
    model = adapted()
    save_model(model, Tokenizer(models.BPE()), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert_same(load_model(tmp_path / "run")(*document), model(*document))


@pytest.mark.peers("transformers", "peft")
@torch.no_grad()
def test_peft_opens_what_is_saved(adapted, golden, document, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM
    for family in ("gpt2", "llama"):
        model = adapted(family)
        save_model(model, Tokenizer(models.BPE()), tmp_path / family)
        base = AutoModelForCausalLM.from_pretrained(golden / family, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / family)
        tokens = document[0][:7]
        assert_same(model(tokens, [7]) @ model.head_weight.T, theirs.eval()(tokens[None]).logits[0])


def test_base_in_16_bits_adapters_in_32(golden):
    """The adapters learn in fp32 on a base that is stored as it is computed; the base stays as it was."""
    model = load_model(golden / "llama", dtype=torch.bfloat16).train()
    lora.attach(model, 2, alpha=4.0)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(torch.arange(9), [9])
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    optimizer.step()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_dropout_acts_on_the_adapters_alone(adapted):
    model, tokens = adapted(dropout=0.5), torch.arange(9)
    adapters = [layer.dropout for layer in lora.layers(model).values()]
    for module in model.modules():  # the base's own
        if isinstance(module, torch.nn.Dropout) and module not in adapters:
            module.p = 0.0
    plain = model(tokens, [9])
    assert not torch.allclose(model.train()(tokens, [9]), plain)
    for dropout in adapters:
        dropout.p = 0.0
    assert torch.allclose(model(tokens, [9]), plain)


@pytest.mark.parametrize("settings, message", [
    (dict(use_dora=True), "adapters with use_dora True are not known"),
    (dict(r=4), "lora_A.weight has shape (3, 20), its configuration asks for (4, 20)"),
    (dict(target_modules=["c_attn"]), "holds what its configuration has no place for: base_model.model."),
    (dict(target_modules=["q_proj"]), "no linear layers called 'q_proj'; it has c_attn, c_fc, c_proj"),
    (dict(target_modules="all-linear"), "no linear layers called 'all-linear'; it has c_attn, c_fc, c_proj"),
    (dict(base_model_name_or_path=None), "adapter_config.json cannot be used (TypeError"),
], ids=str)
def test_adapters_that_do_not_fit(from_peft, settings, message):
    with pytest.raises(InputError) as caught:
        load_model(from_peft("gpt2", **settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_embedding_is_no_target(golden):
    model = load_model(golden / "gpt2")
    with pytest.raises(InputError, match="no linear layers called 'wte'"):
        lora.attach(model, 2, alpha=4.0, targets=["wte"])
    assert all(p.requires_grad for p in model.parameters())  # nothing was frozen


@pytest.mark.parametrize("settings", [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_rslora": True}, {"bias": "lora_only"},
    {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"h.0": 8}}, {"revision": "v2"},
    {"trainable_token_indices": [1]}, {"layers_to_transform": 0}, {"layer_replication": [[0, 1]]},
    {"peft_type": "LOHA"}, {"invented_next_year": 1}], ids=str)
def test_a_setting_that_is_not_known_is_refused_by_name(from_peft, settings):
    """Ignored, it would give other logits without a word."""
    with pytest.raises(InputError, match=f"adapters with {next(iter(settings))} .* are not known"):
        load_model(from_peft("gpt2", **settings))


def test_a_setting_that_is_off_changes_nothing(from_peft):
    off = dict(invented_next_year=None, use_new=False, pattern={}, modules=[], bias="none", peft_version="9",
               init_lora_weights="gaussian", revision="main", runtime_config={"a": 1}, inference_mode=False)
    load_model(from_peft("gpt2", **off))


@torch.no_grad()
def test_targets_as_in_peft(golden, from_peft, tmp_path):
    """A string is a regular expression for whole names; exclude_modules takes some away."""
    folder = from_peft("gpt2")
    plain = load_model(folder)(torch.arange(9), [9])
    config = json.loads((folder / "adapter_config.json").read_text())
    targets = config["target_modules"]
    others = sorted({"c_attn", "c_fc", "c_proj"} - set(targets))
    for change in ({"target_modules": rf"transformer\.h\.\d\.(attn|mlp)\.({'|'.join(targets)})"},
                   {"target_modules": [*targets, *others], "exclude_modules": others},
                   {"target_modules": ".*", "exclude_modules": rf".*\.({'|'.join(others)})"}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        assert torch.equal(load_model(folder)(torch.arange(9), [9]), plain), change


def test_the_head_gets_no_adapters(golden):
    """The loss reads its weight."""
    with pytest.raises(InputError, match="no linear layers called 'lm_head'"):
        lora.attach(load_model(golden / "llama"), 2, alpha=4.0, targets=["lm_head"])


def test_adapters_of_peft_on_a_model_that_wants_preprocessing(from_peft, golden, tmp_path):
    """Their base says how texts are prepared, as when it is used itself."""
    base = shutil.copytree(golden / "gpt2", tmp_path / "aragpt2-base")
    folder = from_peft("gpt2", base_model_name_or_path=str(base))
    assert data.choose_preprocess("auto", folder, load_model(folder).raw_config) == "arabert"


@torch.no_grad()
def test_an_adapter_on_an_adapter(adapted, golden, tmp_path):
    """What is found by one resolver: the adapters, one after the other, then the base; tokenizer and
    configuration come from the first that has them."""
    first = adapted()
    save_model(first, Tokenizer(models.BPE()), tmp_path / "first")
    second = load_model(tmp_path / "first")
    assert second.base == str(tmp_path / "first")
    lora.attach(second, 2, alpha=4.0)
    for layer in lora.layers(second).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    save_model(second, Tokenizer(models.BPE()), tmp_path / "second")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "second" / name).unlink()
    assert_same(load_model(tmp_path / "second")(torch.arange(9), [9]), second(torch.arange(9), [9]))
    assert load_tokenizer(tmp_path / "second").get_vocab() == {}
    (tmp_path / "second" / "adapter_model.safetensors").unlink()  # must not be taken from the first
    with pytest.raises(InputError, match="second has no adapter_model.safetensors"):
        load_model(tmp_path / "second")


@pytest.mark.parametrize("base, message", [
    ("/home/someone/base", "adapter_config.json names this base: correct base_model_name_or_path.*is neither a folder"),
    ("{folder}", "names itself as its base"), (5, "adapter_config.json cannot be used .TypeError")])
def test_a_base_that_is_not_there(from_peft, base, message):
    folder = from_peft("gpt2")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder) if base == "{folder}" else base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_model(folder)
