"""Checkpoints as people have them: every way of storing one loads the same, and what cannot be used is
refused in one clear line."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sevloss import InputError
from sevloss.checkpoint import weights_digest
from sevloss.inputs.hub import WEIGHTS
from sevloss.models import check_causal, eos_ids, from_scratch, load_model, load_tokenizer, save_model

CAUSAL = ["gpt2", "gpt2_scaled", "aragpt2", "bloom", "bloom_post", "llama", "qwen2", "qwen2_window", "qwen3",
          "lfm2"]
ALL = [*CAUSAL, "bert"]
SENTENCES = ["أعاني من ألم في الصدر منذ يومين", "راجع الطبيب فورًا إذا زاد الألم",
             "الجرعة 500 ملغ مرتين يوميًا، بعد الأكل", "هل هذا الدواء آمن للحامل؟"]


@contextmanager
def refused(message):
    """InputError, in one line, with this in it."""
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def assert_same_weights(model, other):
    __tracebackhide__ = True
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------ every way of storing the same weights

@pytest.mark.parametrize("family", ALL)
def test_safetensors_in_fp16(golden, family):
    """The golden files are stored in fp16: fp32 by default, any other on demand; eval mode, and nothing left
    without memory."""
    stored = load_file(golden / family / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(golden / family, dtype=dtype)
        assert not model.training and not any(buffer.is_meta for buffer in model.buffers())
        for name, parameter in model.named_parameters():
            assert stored[name].dtype == torch.float16 and torch.equal(parameter, stored[name].to(dtype))
            assert parameter.requires_grad


def test_config_decides_the_sizes(golden):
    model = load_model(golden / "gpt2_scaled")
    assert model.head_weight.shape == (51, 21) and model.head_weight is model.lm_head.weight
    assert [block.attn.scale for block in model.transformer["h"]] == [1.0, 0.5]


@pytest.mark.parametrize("config, inner", [({}, 32), ({"block_ffn_dim_multiplier": 1.0}, 24),
                                           ({"block_multiple_of": 5}, 30),
                                           ({"block_auto_adjust_ff_dim": False}, 31)], ids=str)
def test_inner_size_of_lfm2(golden, config, inner):
    """31 in config.json: two thirds of it are 20; 1.3 times that are 26; up to a multiple of 8."""
    model = from_scratch(json.loads((golden / "lfm2" / "config.json").read_text()) | config)
    assert model.blocks[0].feed_forward.w1.weight.shape == (inner, 16)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin_of_2020"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
def test_storage(edited, golden, kind, sharded):
    """.safetensors and .bin, whole or in shards with an index; .bin also in the format before torch 1.6."""
    folder = edited("gpt2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")

    def write(part, path):
        if kind == "safetensors":
            save_file(part, path)
        else:
            torch.save(part, path, _use_new_zipfile_serialization=kind == "bin")

    if sharded:
        names = sorted(tensors)
        shards = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
        for file, part in shards.items():
            write({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {},
                                                                        "weight_map": weight_map}))
    else:
        file, names = f"{stem}.{suffix}", sorted(tensors)
        write(tensors, folder / file)
    assert_same_weights(load_model(folder), load_model(golden / "gpt2"))

    # What resuming asks: are these the weights that the run began with? The last file has other ones now
    before = weights_digest(folder)
    write({name: tensors[name] + 1e-3 for name in (shards[file] if sharded else names)}, folder / file)
    assert weights_digest(folder) != before


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_stored_precision(edited, stored, key):
    """What config.json says of it decides nothing: the caller does, for instance bf16 for a frozen base."""
    folder = edited("gpt2", lambda tensors: {name: (t.float() + 1e-4).to(stored)
                                             for name, t in tensors.items()}, **{key: "float16"})
    tensors = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        assert all(p.dtype == dtype and torch.equal(p, tensors[name].to(dtype))
                   for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_are_no_part_of_the_file(edited, kind):
    """The file may change afterwards, and two tensors that a .bin keeps in one place are two parameters."""
    folder = edited("gpt2_scaled", lambda tensors: {name: t.float() for name, t in tensors.items()})
    path = folder / "model.safetensors"
    if kind == "bin":
        tensors = load_file(path)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, path)
    model = load_model(folder)
    was = model.transformer["wte"].weight.sum().item()
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.transformer["wte"].weight.sum().item() == was


def without(prefix):
    return lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()}


def gamma_and_beta(tensors):
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for name, t in tensors.items()}


def gpt2_buffers(tensors):
    """The causal mask, and the tied head once more."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 29, 29, dtype=torch.uint8).tril()
             for i in range(3)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    return tensors | masks | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def bert_pretraining(tensors):
    """Positions as a buffer, and the heads of pre-training."""
    return tensors | {"bert.embeddings.position_ids": torch.arange(29)[None],
                      "cls.predictions.bias": torch.zeros(59),
                      "cls.predictions.transform.LayerNorm.gamma": torch.ones(20),
                      "cls.seq_relationship.weight": torch.zeros(2, 20)}


def frequencies(tensors):
    """Rotary frequencies as a buffer of every block, and the tied head once more."""
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}
    return tensors | buffers | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("family, old", [
    ("gpt2", without("transformer.")), ("aragpt2", without("transformer.")), ("bert", without("bert.")),
    ("bert", gamma_and_beta),
    ("gpt2", gpt2_buffers), ("gpt2", lambda tensors: without("transformer.")(gpt2_buffers(tensors))),
    ("bert", bert_pretraining),
    ("bloom", without("transformer.")), ("llama", without("model.")), ("lfm2", without("model.")),
    ("qwen2", frequencies),
], ids=["gpt2 without prefix", "aragpt2 without prefix", "bert without prefix", "gamma and beta",
        "gpt2 buffers", "both", "pre-training",
        "bloom without prefix", "llama without prefix", "lfm2 without prefix", "rotary buffers"])
def test_old_names(edited, golden, family, old):
    assert_same_weights(load_model(edited(family, old)), load_model(golden / family))


def test_aragpt2_is_known_by_its_weights(edited, golden):
    """AraGPT2-large and -mega say model_type gpt2; what we save says aragpt2, and loads the same."""
    assert json.loads((golden / "aragpt2" / "config.json").read_text())["model_type"] == "gpt2"
    assert load_model(golden / "aragpt2").config.model_type == "aragpt2"
    assert_same_weights(load_model(edited("aragpt2", model_type="aragpt2")), load_model(golden / "aragpt2"))


# What older files say (or leave out, None) where the golden ones have `rope_parameters`, `layer_types`,
# `hidden_size`, ...
OLD_CONFIGS = {
    "bloom": ("bloom", dict(hidden_size=None, n_head=None, tie_word_embeddings=None, n_embed=18,
                            num_attention_heads=6, n_inner=None,
                            seq_length=2048, offset_alibi=100, attention_softmax_in_fp32=True)),
    "llama": ("llama", dict(rope_parameters=None, head_dim=None, attention_bias=None, mlp_bias=None,
                            rope_theta=100.0, rope_scaling=dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "llama of 2024": ("llama", dict(rope_parameters=None, rope_theta=100.0, rope_scaling=dict(
        type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "qwen2": ("qwen2", dict(rope_parameters=None, rope_theta=1e6, rope_scaling=None, layer_types=None,
                            use_sliding_window=False,
                            sliding_window=4, max_window_layers=1)),
    "qwen2 with a window": ("qwen2_window", dict(rope_parameters=None, rope_theta=1e6, layer_types=None)),
    "qwen3": ("qwen3", dict(rope_parameters=None, rope_theta=1e6, rope_scaling=None, layer_types=None,
                            sliding_window=None)),
    "lfm2": ("lfm2", dict(rope_parameters=None, rope_theta=1e6, layer_types=None, full_attn_idxs=[2, 4],
                          intermediate_size=None,
                          block_ff_dim=31, tie_word_embeddings=None, tie_embedding=True)),
    "lfm2 with both": ("lfm2", dict(rope_parameters=None, rope_theta=1e6, full_attn_idxs=[2, 4],
                                    intermediate_size=99, block_ff_dim=31,
                                    tie_word_embeddings=False, tie_embedding=True, theta=1e6, block_dim=16,
                                    num_heads=4)),
}


@pytest.fixture
def old_config(edited, golden):
    """key of OLD_CONFIGS -> the golden folder, and a copy with that config.json."""
    def old_config(case):
        family, old = OLD_CONFIGS[case]
        folder = edited(family, **old | {"dtype": None, "torch_dtype": "float16"})
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items()
                                                        if value is not None}))
        return golden / family, folder
    return old_config


@pytest.mark.parametrize("case", OLD_CONFIGS)
@torch.no_grad()
def test_old_configs(old_config, case):
    """Weights, and what is computed from them, which is all that shows how positions are rotated and how far
    attention sees."""
    new, old = (load_model(folder) for folder in old_config(case))
    assert_same_weights(new, old)
    assert torch.equal(new(torch.arange(20), [20]), old(torch.arange(20), [20]))


# ------------------------------------------------------------------ heads that a checkpoint lacks

NEW_HEAD = ("initialised, not in the checkpoint or for other classes: classifier.weight, "
            "classifier.bias\n")


def lacking(*prefixes):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefixes)}


def test_missing_head_is_initialised(edited, capsys):
    """num_labels asks for a head; what the checkpoint has not is initialised, and a line says so."""
    folder = edited("bert", lacking("classifier."))
    assert not hasattr(load_model(folder), "classifier") and capsys.readouterr().out == ""
    torch.manual_seed(0)
    model = load_model(folder, num_labels=4)
    assert capsys.readouterr().out == NEW_HEAD
    assert model.classify(torch.arange(5), [2, 3]).shape == (2, 4)
    assert 0.01 < model.classifier.weight.std() < 0.03 and not model.classifier.bias.any()


def test_head_without_a_pooler_reads_the_mean(edited, tmp_path):
    """Where there is no pooler the new head reads the mean of each document's tokens; `transformers` must not
    take it for its own."""
    folder = edited("bert", lacking("classifier.", "bert.pooler."))
    assert load_model(folder).architecture == "BertModel"
    model, tokens = load_model(folder, num_labels=3), torch.arange(9)
    hidden = model(tokens, [2, 7])
    expected = model.mean_classifier(torch.stack([hidden[:2].mean(0), hidden[2:].mean(0)]))
    torch.testing.assert_close(model.classify(tokens, [2, 7]), expected)
    save_model(model, Tokenizer(models.BPE()), tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    torch.testing.assert_close(again.classify(tokens, [2, 7]), expected)
    assert again.architecture == "BertModel" and not hasattr(again, "classifier")


def test_head_is_taken_by_the_names_of_its_classes(edited, capsys):
    """A head for the three severities serves, whatever their order in id2label."""
    names = ["Critical", "غير حرج", "NEUTRAL"]
    folder = edited("bert", id2label=dict(enumerate(names)))
    stored = load_model(folder).classifier
    head = load_model(folder, num_labels=3).classifier
    assert capsys.readouterr().out == ""
    assert torch.equal(head.weight, stored.weight[[1, 2, 0]]) and torch.equal(head.bias, stored.bias[[1, 2, 0]])


def test_a_stored_head_whose_classes_have_no_names(edited, golden):
    stored = load_model(golden / "bert").classifier
    head = load_model(edited("bert", id2label={}, num_labels=3)).classifier
    assert torch.equal(head.weight, stored.weight)


@pytest.mark.parametrize("labels", [{}, {"id2label": {"0": "sad", "1": "glad", "2": "critical"}},
                                    {"id2label": {"0": "critical", "1": "neutral", "2": "critical"}}], ids=str)
def test_head_for_other_classes_is_initialised(edited, golden, capsys, labels):
    """For other names or another number of classes a new one starts, on the pooler that is there."""
    pooler = load_model(golden / "bert").bert["pooler"]["dense"].weight
    folder = edited("bert", **labels)
    torch.manual_seed(0)
    head = load_model(folder, num_labels=3).classifier.weight
    assert capsys.readouterr().out == NEW_HEAD and head.std() < 0.03
    model = load_model(folder, num_labels=5)
    assert capsys.readouterr().out == NEW_HEAD
    assert model.classifier.weight.shape == (5, 20)
    assert torch.equal(model.bert["pooler"]["dense"].weight, pooler)


def test_a_new_head_without_a_pooler_reads_the_mean(edited, capsys):
    """Also where the checkpoint has a head, but for other classes."""
    model = load_model(edited("bert", lacking("bert.pooler."), id2label={}), num_labels=5)
    assert model.mean_classifier.weight.shape == (5, 20) and "pooler" not in model.bert


# ------------------------------------------------------------------ what cannot be used

def test_unknown_model_type(edited):
    with refused("is of model_type 't5'; known are gpt2,"):
        load_model(edited("gpt2", model_type="t5"))


@pytest.mark.parametrize("config, message", [
    ({"activation_function": "swish"},
     "activation_function 'swish' in config.json is not known; known: gelu_new"),
    ({"n_embd": 24}, "has shape (60,), its configuration asks for (72,)"),
    ({"n_layer": 4},
     "lacks what its configuration asks for: transformer.h.3.ln_1.weight, transformer."),
    ({"n_layer": 2},
     "holds what its configuration has no place for: transformer.h.2.attn.c_attn.bias"),
    ({"layer_norm_epsilon": "1e-5"}, "config.json cannot be used (TypeError: layer_norm(): argument 'eps'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', neither true nor false"),
    ({"n_layer": "3"}, "config.json cannot be used (TypeError: "),
    ({"n_head": 3}, "config.json cannot be used (RuntimeError: unflatten: Provided sizes [3, 3, -1] don't"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_config_that_does_not_fit(edited, config, message):
    with refused(message):
        load_model(edited("gpt2", **config))


@pytest.mark.parametrize("name, heads, message", [
    ("bert", "num_attention_heads", "config.json cannot be used (RuntimeError: "),
    ("bloom", "n_head", "config.json cannot be used (RuntimeError: "),
    ("llama", "num_key_value_heads", "its configuration asks for ("),  # the weights show it first
    ("lfm2", "num_key_value_heads", "its configuration asks for (")])
def test_heads_that_do_not_divide(edited, name, heads, message):
    with refused(message):
        load_model(edited(name, **{heads: 7}))


def test_config_without_a_size(edited):
    folder = edited("gpt2")
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 53}')
    with refused("config.json cannot be used (TypeError: GPT2Config.__init__() missing 4 required"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"gpt2"'])
def test_broken_config(edited, text):
    folder = edited("gpt2")
    (folder / "config.json").write_text(text)
    with refused("config.json cannot be used ("):
        load_model(folder)


@pytest.mark.parametrize("config", [{"hidden_act": "relu"}, {"position_embedding_type": "relative_key"}],
                         ids=str)
def test_other_kinds_of_bert(edited, config):
    with refused("only BERT with gelu and absolute positions is known; config.json says"):
        load_model(edited("bert", **config))


def test_other_kinds_of_llama(edited):
    with refused("hidden_act 'gelu' in config.json is not known"):
        load_model(edited("llama", hidden_act="gelu"))


def test_other_kinds_of_rotary_positions(edited):
    with refused("rotary positions of type 'yarn' in config.json are not known"):
        load_model(edited("qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6,
                                                    "factor": 4.0}))(torch.arange(5), [5])


@pytest.mark.parametrize("layer_types", [None, ["conv"] * 4, ["conv"] * 4 + ["sliding_attention"]])
def test_other_kinds_of_lfm2(edited, layer_types):
    with refused("layer_types in config.json must say full_attention or conv for each of 5 blocks"):
        load_model(edited("lfm2", layer_types=layer_types))


def test_missing_tensor(edited):
    with refused("lacks what its configuration asks for: transformer.h.1.mlp.c_fc.weight;"):
        load_model(edited("gpt2", lacking("transformer.h.1.mlp.c_fc.weight")))


def test_second_head(edited):
    """A tied head may be stored once more (see gpt2_buffers), but not another one: nobody knows which of the
    two is meant."""
    with refused("config.json ties the head to the embedding, but lm_head.weight differs from it: "
                 "to use it, set tie_word_embeddings"):
        load_model(edited("gpt2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}))


def test_untied_head_may_not_be_missing(edited):
    with refused("lacks what its configuration asks for: lm_head.weight;"):
        load_model(edited("llama", lacking("lm_head.")))


@pytest.mark.parametrize("surplus", ["transformer.h.0.attn.q_norm.weight", "transformer.h.7.attn.c_attn.bias",
                                     "score.weight"])
def test_surplus_tensor(edited, surplus):
    with refused(f"holds what its configuration has no place for: {surplus};"):
        load_model(edited("gpt2", lambda tensors: tensors | {surplus: torch.zeros(3)}))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
def test_a_prefix_of_all_names_does_not_count(edited, golden, family, prefix):
    """As DataParallel, torch.compile and Lightning put it."""
    folder = edited(family, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    for a, b in zip(load_model(folder).parameters(), load_model(golden / family).parameters()):
        assert torch.equal(a, b)


def test_a_tensor_of_another_module_is_no_substitute(edited):
    """Only the wrappers' names are dropped: a tensor that is missing is not taken from elsewhere."""
    name = "transformer.ln_f.weight"
    with refused("holds what its configuration has no place for: ema.shadow."):
        load_model(edited("gpt2", lambda tensors: {f"ema.shadow.{n}" if n == name else n: t
                                                   for n, t in tensors.items()}))


@pytest.mark.parametrize("wrap", [lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model_state_dict": t},
                                  lambda t: {"model": t, "optimizer": {"state": {0: t}, "groups": []}}])
def test_tensors_inside_a_training_state(edited, golden, wrap):
    folder = edited("gpt2")
    torch.save(wrap(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for a, b in zip(load_model(folder).parameters(), load_model(golden / "gpt2").parameters()):
        assert torch.equal(a, b)


def test_quantized_weights_are_called_so(edited):
    with refused("holds quantized weights (its config.json has a quantization_config)"):
        load_model(edited("gpt2", lambda tensors: {}, quantization_config={"load_in_4bit": True}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(edited, value):
    def spoil(tensors):
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
        return tensors
    with refused("transformer.h.1.mlp.c_fc.weight has a value that is no number or infinite"):
        load_model(edited("gpt2", spoil))


def test_a_million_layers(edited):
    with refused("asks for 1,000,000 blocks: at most 1,000 are built"):
        load_model(edited("gpt2", n_layer=10 ** 6))


@pytest.mark.parametrize("config, generation, token, ids", [
    (3, {"eos_token_id": [4, 3]}, None, (3, 4)), ([5, 3], {"eos_token_id": 4}, None, (5, 3, 4)),
    (None, {"eos_token_id": 7}, "a", (7,)), (None, None, "a", (1,)), (None, None, {"content": "a"}, (1,)),
    (None, {}, "absent", ()), (0, None, None, (0,))])
def test_what_ends_a_text(edited, config, generation, token, ids):
    """config.json and generation_config.json together, the tokenizer where both are silent."""
    folder = edited("gpt2", eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    Tokenizer(models.WordLevel({"b": 0, "a": 1})).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    model = load_model(folder)
    assert eos_ids(model) == ids
    if not ids:
        with refused("has no end-of-text token: its config.json must give eos_token_id"):
            check_causal(model, folder)


def test_an_encoder_writes_no_texts(golden):
    with refused("is no causal language model but an encoder"):
        check_causal(load_model(golden / "bert"), "bert")


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Sequence", "normalizers":
                    [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}},
    {"normalizer": {"type": "Sequence", "normalizers":
                    [{"type": "Replace", "pattern": {"String": '"'}, "content": '""'}] * 12}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
                        "pair": [], "special_tokens": {}}}], ids=["normalizer", "quotes", "template"])
def test_a_tokenizer_that_multiplies_its_input(tmp_path, change):
    (tmp_path / "config.json").write_text("{}")
    tokenizer = json.loads(small_tokenizer().to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with refused("it makes a text ten times longer, or more"):
        load_tokenizer(tmp_path)


def test_misshapen_tensor(edited):
    with refused("transformer.h.0.mlp.c_fc.weight has shape (37, 20), its configuration asks for (20, 37)"):
        load_model(edited("gpt2", lambda t: t | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(37, 20)}))


@pytest.mark.parametrize("size", [0, 5, 1000, -100])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin_of_2020"])
def test_truncated_file(edited, kind, size):
    folder = edited("gpt2")
    path = folder / "model.safetensors"
    if kind != "safetensors":
        tensors = load_file(path)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "bin")
    path.write_bytes(path.read_bytes()[:size])
    with refused(f"{path} is broken or not finished downloading"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin",
                                  "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_lfs_pointer(edited, name):
    """What git leaves in place of a large file."""
    folder = edited("gpt2")
    if name != "tokenizer.json":
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"wte.weight": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if name in WEIGHTS:
        (folder / "model.safetensors.index.json").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1476\n")
    with refused(f"{folder / name} is a git-lfs pointer in place of the file: run `git lfs pull` in its"):
        load_tokenizer(folder) if name == "tokenizer.json" else load_model(folder)


def test_bin_that_is_something_else(edited):
    folder = edited("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with refused("pytorch_model.bin is broken or not finished downloading: Weights only load failed; "
                 "delete it and get it again"):
        load_model(folder)


class Code:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_bin_is_not_run(edited, tmp_path, new_format):
    folder = edited("gpt2")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Code(tmp_path / "ran")}, folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=new_format)
    with refused("pytorch_model.bin holds more than tensors and is not loaded"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_not_run(edited, tmp_path):
    """AraGPT2-large brings its own modeling file."""
    folder = edited("aragpt2", auto_map={"AutoConfig": "modeling_aragpt2.AraGPT2Config",
                                         "AutoModel": "modeling_aragpt2.AraGPT2Model"})
    (folder / "modeling_aragpt2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    load_model(folder), load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"a": {"b": torch.zeros(2)}, "c": {"d": torch.zeros(2)}}],
                         ids=["list", "numbers", "two models"])
def test_bin_that_is_no_state_dict(edited, content):
    folder = edited("gpt2")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with refused("pytorch_model.bin holds more than tensors and is not loaded"):
        load_model(folder)


def test_no_weights(edited):
    folder = edited("gpt2")
    (folder / "model.safetensors").unlink()
    with refused(f"the checkpoint {folder} has no {' or '.join(WEIGHTS)}: complete its download"):
        load_model(folder)


def test_shards(edited):
    """An index whose shard is not there, that points out of its folder, or that is no index."""
    folder = edited("gpt2")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    for weight_map, message in (({"a": "model-00002-of-00002.safetensors"},
                                 "has no model-00002-of-00002.safetensors: complete its"),
                                ({"a": "../other/model.safetensors"}, "names a shard outside its folder"),
                                ({"a": ["model-00001-of-00002.safetensors"]}, "index.json cannot be used"),
                                (None, "index.json cannot be used")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with refused(message):
            load_model(folder)


def test_no_config(edited):
    folder = edited("gpt2")
    (folder / "config.json").unlink()
    with refused(f"the checkpoint {folder} has no config.json: complete"):
        load_model(folder)


@pytest.mark.parametrize("message, names", [
    ("is neither a folder, nor a hub id like owner/name, nor one of aragpt2-base, ",
     ["aragpt3", "./runs/1", "/no/such/folder", "tests/typo", "..\\typo", "~/typo"]),
    ("is neither a folder nor a valid hub id", ["no-folder/1/best", "a b/c"]),
])
def test_unknown_name(message, names):
    """Known from its form alone: no connection is tried."""
    for name in names:
        with refused(message):
            load_model(name)


# ------------------------------------------------------------------ tokenizers

def small_tokenizer():
    """A few words: the golden models have no room for the 256 bytes of byte_level_bpe."""
    words = "<|endoftext|> أعاني من ألم في الصدر منذ يومين".split()
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))


def byte_level_bpe():
    """Like AraGPT2's: byte-level BPE with a prefix space, and one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet))
    return tokenizer


def wordpiece():
    """Like AraBERT's: [CLS] text [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special,
                                                                       show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                             special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def test_tokenizer_neither_pads_nor_truncates(tmp_path):
    """tokenizer.json may fix both (sentence encoders do); a long complaint would lose its end without a
    word."""
    tokenizer = wordpiece()
    whole = [encoding.ids for encoding in tokenizer.encode_batch(SENTENCES)]
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    assert [encoding.ids for encoding in load_tokenizer(tmp_path).encode_batch(SENTENCES)] == whole


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "model": {"type": "Magic"}}'])
def test_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with refused("tokenizer.json cannot be used ("):
        load_tokenizer(tmp_path)


def test_no_tokenizer(golden):
    with refused("has no tokenizer.json or vocab.json or vocab.txt or "):
        load_tokenizer(golden / "gpt2")


@pytest.mark.parametrize("family, size", [("gpt2", 53), ("bert", 59)])
def test_tokenizer_larger_than_the_embedding(edited, family, size):
    """A smaller one is well, for embeddings are often padded; one whose ids leave gaps is as large as its
    last id."""
    folder = edited(family)
    Tokenizer(models.WordLevel({"a": 0, "b": size - 1})).save(str(folder / "tokenizer.json"))
    load_tokenizer(folder)
    Tokenizer(models.WordLevel({"a": 0, "b": size})).save(str(folder / "tokenizer.json"))
    with refused(f"the tokenizer has {size + 1} tokens, 'b' last, the model {size}: take the tokenizer that"):
        load_tokenizer(folder)


# ------------------------------------------------------------------ tokenizers of older checkpoints

OLD_TOKENIZERS = json.loads(Path(__file__).with_name("golden").joinpath("tokenizers.json").read_text("utf-8"))


@pytest.fixture
def old_tokenizer(tmp_path):
    """old_tokenizer(a case of the golden file, {file: other content}) -> folder"""
    def write(case, other=()):
        files = {name: OLD_TOKENIZERS["vocabularies"][name]
                 for name in OLD_TOKENIZERS["cases"][case]["vocabulary"]}
        for name, content in (files | OLD_TOKENIZERS["cases"][case]["files"] | dict(other)).items():
            text = content if isinstance(content, (str, bytes)) else json.dumps(content, ensure_ascii=False)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path
    return write


@pytest.mark.parametrize("case", OLD_TOKENIZERS["cases"])
def test_old_tokenizer(old_tokenizer, case):
    """The ids of `transformers`; and the same again when the tokenizer is stored as a tokenizer.json."""
    tokenizer = load_tokenizer(old_tokenizer(case))
    again = Tokenizer.from_str(tokenizer.to_str())
    for text, ids in zip(OLD_TOKENIZERS["texts"], OLD_TOKENIZERS["cases"][case]["ids"]):
        if ids is not None:
            assert tokenizer.encode(text).ids == ids
        assert again.encode(text).ids == tokenizer.encode(text).ids


def test_end_of_text_is_one_id(old_tokenizer):
    """Though nothing but the vocabulary names it; not where that does not either. Decoding leaves it out, and
    nothing more."""
    tokenizer = load_tokenizer(old_tokenizer("gpt2, nothing said"))
    assert tokenizer.encode("<|endoftext|>").ids == [0]
    assert tokenizer.decode([0, *tokenizer.encode("ألم شديد").ids, 0]) == "ألم شديد"
    vocabulary = OLD_TOKENIZERS["vocabularies"]["vocab.json"].replace("<|endoftext|>", "</s>")
    tokenizer = load_tokenizer(old_tokenizer("gpt2, nothing said", {"vocab.json": vocabulary}))
    assert tokenizer.get_vocab_size() == len(json.loads(vocabulary))


def test_a_token_that_is_named_twice_keeps_its_flags(old_tokenizer):
    i = OLD_TOKENIZERS["vocabularies"]["vocab.txt"].split("\n").index("[MASK]")
    config = {"mask_token": "[MASK]", "added_tokens_decoder": {i: {"content": "[MASK]", "lstrip": True}}}
    tokenizer = load_tokenizer(old_tokenizer("bert, nothing said", {"tokenizer_config.json": config}))
    assert tokenizer.get_added_tokens_decoder()[i].lstrip


def test_tokens_of_arabert_stay_whole(old_tokenizer):
    """Also where no space stands around them; not where letters follow."""
    tokenizer = load_tokenizer(old_tokenizer("arabertv2"))
    tokens = tokenizer.encode("،[رابط][بريد].", add_special_tokens=False).tokens
    assert tokens == ["،", "[رابط]", "[بريد]", "."]
    assert "+ك" not in tokenizer.encode("+كل").tokens


@pytest.mark.parametrize("case, other, message", [
    ("qwen2", {"config.json": {"model_type": "llama"}},
     "vocab.json of a llama is not read: get a tokenizer.json"),
    ("gpt2, nothing said", {"vocab.json": '{"a": 0'}, "vocab.json cannot be used ("),
    ("gpt2, nothing said", {"merges.txt": "#version: 0.2\nq q\n"},
     "vocab.json cannot be used (Exception: Error while initializing"),
    ("gpt2, nothing said", {"tokenizer_config.json": "{"}, "tokenizer_config.json cannot be used ("),
    ("dialect-ar-gpt-2021", {"added_tokens.json": {"[MSA]": 64_000}},
     "makes the added token [MSA] 420, but it is to be 64000: get"),
    ("bert, nothing said", {"vocab.txt": "[PAD]\n[UNK]\n[SEP]\nألم\n"},
     "vocab.txt has no [CLS], so it is no vocabulary of a BERT"),
    ("bert, nothing said", {"vocab.txt": "ألم".encode("utf-16")},
     "vocab.txt cannot be used (UnicodeDecodeError: 'utf-8' codec can't decode"),
], ids=["family", "broken vocabulary", "merges of another", "broken config", "added tokens of another",
        "no CLS", "no text"])
def test_old_tokenizer_that_cannot_be_used(old_tokenizer, case, other, message):
    folder = old_tokenizer(case, other)
    with refused(message):
        load_tokenizer(folder)


def test_vocabulary_without_merges(old_tokenizer):
    folder = old_tokenizer("gpt2, nothing said")
    (folder / "merges.txt").unlink()
    with refused("has no merges.txt: complete its download"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name, family", [("tokenizer.model", "llama"), ("sentencepiece.bpe.model", "bert")])
def test_sentencepiece(tmp_path, name, family):
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with refused(f"{name} of a {family} is not read: get a tokenizer.json, which `transformers`"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------ saving

@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_to_the_bit(golden, tmp_path, family, dtype):
    model, tokenizer = load_model(golden / family, dtype=dtype), small_tokenizer()
    save_model(model, tokenizer, tmp_path / "run")
    again = load_model(tmp_path / "run", dtype=dtype)
    assert_same_weights(model, again)
    assert again.config == model.config
    assert load_tokenizer(tmp_path / "run").to_str() == tokenizer.to_str()
    saved, was = (json.loads((folder / "config.json").read_text())
                  for folder in (tmp_path / "run", golden / family))
    assert saved == was | {"dtype": str(dtype).removeprefix("torch."), "model_type": model.config.model_type,
                           "architectures": [model.architecture]}
    if family != "aragpt2":  # which has no class in transformers
        assert saved["architectures"] == was["architectures"]
    with safe_open(tmp_path / "run" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # older transformers insist on it


def test_stopped_while_saving(golden, tmp_path, monkeypatch):
    """The weights of before are still there, whole."""
    model = load_model(golden / "gpt2")
    save_model(model, byte_level_bpe(), tmp_path)

    def half_a_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr("sevloss.models.save_file", half_a_file)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, byte_level_bpe(), tmp_path)
    assert_same_weights(load_model(tmp_path), model)


def test_new_head_is_saved_with_its_classes(golden, tmp_path):
    model = load_model(golden / "bert", num_labels=5)
    save_model(model, wordpiece(), tmp_path)
    assert_same_weights(load_model(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["id2label"]) == len(config["label2id"]) == 5
    assert config["architectures"] == ["BertForSequenceClassification"]


# ------------------------------------------------------------------ what we save, transformers opens

TEXTS = [*SENTENCES, "\nعندي صداع\n\nالاجابة:\n", "Aspirin 100mg", "ألم"]


def random_model(golden, family, vocab_size):
    """The golden shape with another vocabulary; weights ten times what training starts from, so that mistakes
    show."""
    torch.manual_seed(0)
    raw = json.loads((golden / family / "config.json").read_text()) | {"vocab_size": vocab_size,
                                                                       "num_labels": 3}
    raw |= {"n_positions" if raw["model_type"] == "gpt2" else "max_position_embeddings": 128}
    if family != "bert":
        raw |= {"bos_token_id": 0, "eos_token_id": 0}
    model = from_scratch(raw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0)
                            + 0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.peers("transformers")
@pytest.mark.parametrize("family", [family for family in CAUSAL if family != "aragpt2"])
@torch.no_grad()
def test_transformers_opens_a_saved_language_model(golden, tmp_path, family):
    """Equal token ids, text and logits; and here too it is the same again."""
    import transformers
    tokenizer = byte_level_bpe()
    if family.startswith("qwen2"):  # transformers splits as Qwen does, whatever tokenizer.json says
        qwen = transformers.Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    model = random_model(golden, family, tokenizer.get_vocab_size())
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert theirs.dtype == torch.float32
    assert their_tokenizer.eos_token == "<|endoftext|>"
    assert their_tokenizer.eos_token_id == their_tokenizer.pad_token_id == 0
    for text in TEXTS:
        ids = load_tokenizer(tmp_path).encode(text).ids
        assert their_tokenizer(text)["input_ids"] == ids
        assert their_tokenizer.decode(ids) == tokenizer.decode(ids)
        logits = model(torch.tensor(ids), [len(ids)]) @ model.head_weight.T
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(again(torch.tensor(ids), [len(ids)]) @ again.head_weight.T, logits)


@pytest.mark.peers("transformers")
@pytest.mark.parametrize("case", OLD_CONFIGS)
@torch.no_grad()
def test_transformers_opens_what_came_with_an_old_config(old_config, tmp_path, case):
    """And reads that config.json as we do."""
    import transformers
    model, ids = load_model(old_config(case)[1]), torch.arange(20)
    save_model(model, byte_level_bpe(), tmp_path / "saved")
    for folder in (tmp_path / "checkpoint", tmp_path / "saved"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = model(ids, [20]) @ model.head_weight.T
        difference = (theirs(ids[None]).logits[0] - logits).abs().max()
        assert difference < 1e-5 * logits.abs().max()


@pytest.mark.peers("transformers")
@torch.no_grad()
def test_transformers_opens_a_saved_classifier(golden, tmp_path):
    """One stream of documents here, a padded batch there."""
    import transformers
    tokenizer = wordpiece()
    model = random_model(golden, "bert", tokenizer.get_vocab_size())
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    ids = [encoding.ids for encoding in load_tokenizer(tmp_path).encode_batch(TEXTS)]
    assert [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"],
                                                           batch["attention_mask"])] == ids
    logits = model.classify(torch.tensor([i for row in ids for i in row]), [len(row) for row in ids])
    torch.testing.assert_close(theirs(**batch).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.peers("transformers")
@torch.no_grad()
def test_transformers_opens_a_saved_encoder(edited, tmp_path):
    import transformers
    model = load_model(edited("bert", lacking("classifier.", "bert.pooler.")))
    save_model(model, wordpiece(), tmp_path / "saved")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    hidden = theirs(torch.arange(9)[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden, model(torch.arange(9), [9]), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ names on the hub

@contextmanager
def hub_server(repositories):
    """As much of the hub as a download needs, on 127.0.0.1. repositories: {name: {file: bytes}}, None for the
    bytes of a gated one. Gives its address, and the list of files that were downloaded."""
    served = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
            repository = "/".join(path.split("/")[:2])
            files = repositories.get(repository, {})
            _, _, file = path.partition("/resolve/" + "c" * 40 + "/")
            if not files:
                self.answer(401, {"X-Error-Code": "RepoNotFound"})  # 401, not 404: it may be private
            elif "/tree/" in path:
                self.answer_json([{"type": "file", "path": name, "size": len(files[name] or ""), "oid": name}
                                  for name in files])
            elif not file:
                self.answer_json({"id": repository, "sha": "c" * 40,
                                  "siblings": [{"rfilename": name} for name in files]})
            elif files[file] is None:
                self.answer(403, {"X-Error-Code": "GatedRepo"})
            else:
                etag = hashlib.sha256(files[file]).hexdigest()
                self.answer(200, {"X-Repo-Commit": "c" * 40, "ETag": f'"{etag}"'}, files[file])
                served.extend([file] * (self.command == "GET"))

        do_HEAD = do_GET

        def answer_json(self, content):
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def answer(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
    server.server_close()


LOAD = """
import sys, time
from sevloss import InputError
from sevloss.models import load_model, load_tokenizer
def sleep(seconds):
    raise SystemExit(f"waits for {seconds} s")
time.sleep = sleep  # as retries do
for name in sys.argv[1:]:
    try:
        total = sum(p.double().sum() for p in load_model(name).parameters()).item()
        print(name, total, load_tokenizer(name).get_vocab_size())
    except InputError as error:
        print(error)
"""


def load_elsewhere(names, home, **environment):
    """In a process of its own: huggingface_hub reads the environment once, when it is imported. -> a line for
    each name"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")
             and "proxy" not in name.lower()}
    done = subprocess.run([sys.executable, "-c", LOAD, *names], cwd=Path(__file__).parents[1],
                          env=clean | environment | {"HF_HOME": str(home)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hub(edited, golden, tmp_path):
    """Hub ids and short names download once, then load without a connection, and nothing waits for one:
    safetensors without the .bin beside it, a lone .bin with a vocab.txt, and shards."""
    tokenizer = small_tokenizer().to_str().encode()
    config, weights = ((golden / "gpt2" / file).read_bytes() for file in ("config.json", "model.safetensors"))
    bert = edited("bert")
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    index = {"weight_map": dict.fromkeys(load_file(golden / "gpt2" / "model.safetensors"),
                                         "model-00001-of-00001.safetensors")}
    repositories = {
        "someone/gpt2": {"config.json": config, "model.safetensors": weights, "pytorch_model.bin": b"-",
                         "tokenizer.json": tokenizer, "onnx/model.safetensors": b"-", "rust_model.ot": b"-"},
        "aubmindlab/bert-base-arabertv02": {"config.json": (bert / "config.json").read_bytes(),
                                            "vocab.txt": "[UNK]\n[CLS]\n[SEP]\n[رابط]\n".encode(),
                                            "tokenizer_config.json": '{"never_split": ["[رابط]"]}'.encode(),
                                            "pytorch_model.bin": (bert / "pytorch_model.bin").read_bytes()},
        "someone/shards": {"config.json": config, "model.safetensors.index.json": json.dumps(index).encode(),
                           "tokenizer.json": tokenizer,
                           "model-00001-of-00001.safetensors": weights},
        "someone/no-model": {"README.md": b""},
        "someone/no-weights": {"config.json": config},
        "someone/gated": {"config.json": None, "model.safetensors": None},
    }
    sums = [sum(p.double().sum() for p in load_model(golden / family).parameters()).item()
            for family in ("gpt2", "bert", "gpt2")]
    names = ["someone/gpt2", "arabertv02", "someone/shards"]
    loaded = [f"{name} {total} {size}" for name, total, size in zip(names, sums, (8, 4, 8))]
    home = tmp_path / "home"

    with hub_server(repositories) as (address, served):
        online = load_elsewhere([*names, "someone/typo", "someone/no-model", "someone/no-weights",
                                 "someone/gated"],
                                home, HF_ENDPOINT=address)
        assert sorted(served) == sorted([*repositories["aubmindlab/bert-base-arabertv02"],
                                         *repositories["someone/shards"],
                                         "config.json", "model.safetensors", "tokenizer.json", "config.json"])
    assert online == [
        *loaded,
        "there is no folder someone/typo, and the hub has no repository someone/typo "
        "(or it is private: run `hf auth login`)",
        "the checkpoint someone/no-model has no config.json: "
        "complete its download, or take another checkpoint",
        f"the checkpoint someone/no-weights has no {' or '.join(WEIGHTS)}: "
        "complete its download, or take another checkpoint",
        "someone/gated is gated: accept its terms on the hub, then run `hf auth login`",
    ]
    offline = [*loaded, "someone/else is not in the local cache and the hub cannot be reached: "
                        "connect once, or give a folder"]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):  # the server is gone, so that connections are refused
        assert load_elsewhere([*names, "someone/else"], home, HF_ENDPOINT=address, **environment) == offline
