"""Checkpoints in and out: load_model, load_tokenizer, save_model; and small models from scratch."""

import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch.utils.checkpoint import checkpoint

from sevloss import InputError, distributed, interpreting, write_atomically, write_json
from sevloss.inputs import hub
from sevloss.inputs.tokenizer_files import check_growth, from_vocabulary
from sevloss.models import lora
from sevloss.models.bert import Bert
from sevloss.models.bloom import Bloom
from sevloss.models.gpt2 import GPT2
from sevloss.models.lfm2 import Lfm2
from sevloss.models.llama import Llama

FAMILIES = {"gpt2": GPT2, "aragpt2": GPT2, "bloom": Bloom, "llama": Llama, "qwen2": Llama, "qwen3": Llama,
            "lfm2": Lfm2, "bert": Bert}


def load_model(ckpt, *, dtype=torch.float32, device="cpu", num_labels=None):
    """Short name, hub id or folder -> nn.Module in eval mode, with .config (sizes) and .raw_config.

    Of adapters, the base with all of them merged into its weights. num_labels: for encoders, a head with that
    many classes, initialised where the checkpoint's is not for severity.CLASSES. InputError for whatever does
    not fit: model_type, missing, surplus or misshapen tensors, broken files.
    """
    *adapters, base = hub.folders(ckpt)
    if adapters:
        model = load_model(base, dtype=dtype, device=device, num_labels=num_labels)
        config = hub.read_json(adapters[-1] / "adapter_config.json")
        model.raw_config["_name_or_path"] = config["base_model_name_or_path"]  # tells how texts are prepared
        for folder in reversed(adapters):
            lora.attach_stored(model, folder)
            weights = lora.weights(model)
            stored = hub.open_tensors(hub.find_file(folder, hub.ADAPTERS))
            adapter = f"{folder}, adapters of {model.base}"
            for name, tensor in _read(adapter, stored, weights, device, torch.float32).items():
                weights[name].data = tensor
            lora.merge(model)
            if (folder / "config.json").is_file():  # ours; peft writes none
                model.raw_config["sevloss"] = hub.read_json(folder / "config.json").get("sevloss", {})
        model.base = hub.full_name(ckpt)
        return model.requires_grad_(True).eval()

    # ---- config.json decides
    raw = hub.read_json(hub.find_file(ckpt, ("config.json",)))
    with interpreting(base / "config.json"):
        if raw.get("model_type") not in FAMILIES:
            raise InputError(f"{ckpt} is of model_type {raw.get('model_type')!r}; known are "
                             f"{', '.join(FAMILIES)}: take a checkpoint of one of these")
        if raw.get("quantization_config"):
            raise InputError(f"{ckpt} holds quantized weights (its config.json has a quantization_config): "
                             "take the checkpoint that they were made from")
        family = FAMILIES[raw["model_type"]]
        stored = {}
        for path in hub.weight_files(ckpt):
            stored |= hub.open_tensors(path)
        raw["num_labels"] = num_labels
        if hasattr(family.Config, "eos_token_id"):
            raw["eos_token_id"] = _end_of_text(ckpt, raw)
        model = build(family, family.normalize(raw, stored))

    # ---- weights; a tied head may be stored once more
    places = model.state_dict()
    optional = getattr(family, "optional_keys", ())
    tied = hasattr(model, "head_weight") and model.config.tie_word_embeddings
    if tied:
        places["lm_head.weight"] = model.head_weight
        optional = ("lm_head.weight",)
    ignored = getattr(family, "ignored_keys", "^$")
    state = _read(ckpt, stored, places, device, dtype, family.prefix, ignored, optional)
    second_head = state.pop("lm_head.weight", None) if tied else None
    new = [name for name in model.state_dict() if name not in state]
    if new:
        print(f"initialised, not in the checkpoint or for other classes: {_some(new)}")
    for name in new:
        state[name] = initial(name, places[name].shape).to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    if second_head is not None and not torch.equal(second_head, model.head_weight):
        raise InputError(f"{ckpt}: config.json ties the head to the embedding, but lm_head.weight differs "
                         "from it: to use it, set tie_word_embeddings to false there")
    model.base = hub.full_name(ckpt)
    model.eval()
    with interpreting(base / "config.json"), torch.no_grad():  # raises where sizes do not fit together
        model(torch.zeros(1, dtype=torch.int64, device=device), [1])
    return model


def _read(ckpt, stored, places, device, dtype, prefix="", ignored="^$", optional=()):
    """{name in `places`: tensor}; InputError where one has no place or another shape, or is missing.

    stored: {name: function that reads that tensor}, used up here, so that what the file's version of a tensor
    takes is freed in turn. places: {name: tensor of that shape}. prefix: of names, which a file may leave
    out. ignored: pattern of names that need no place. optional: beginnings of names that may be missing.
    """
    state = {}
    surplus = []
    advice = "get configuration and weights from one place"
    for stored_name in list(stored):
        read = stored.pop(stored_name)
        name = _place(stored_name, places, prefix)
        if name is None and re.search(ignored, stored_name):
            continue
        if name is None or name in state:
            surplus.append(stored_name)
            continue
        tensor = read()
        if tensor.shape != places[name].shape:
            raise InputError(f"{ckpt}: {stored_name} has shape {tuple(tensor.shape)}, its configuration asks "
                             f"for {tuple(places[name].shape)}: {advice}")
        state[name] = tensor.to(device=device, dtype=dtype)
        if not state[name].sum(dtype=torch.float32).isfinite():
            raise InputError(f"{ckpt}: {stored_name} has a value that is no number or infinite: take another "
                             "checkpoint")
    if surplus:
        raise InputError(f"{ckpt} holds what its configuration has no place for: {_some(surplus)}; {advice}")
    missing = [name for name in places if name not in state and not name.startswith(optional)]
    if missing:
        raise InputError(f"{ckpt} lacks what its configuration asks for: {_some(missing)}; {advice}")
    return state


def _place(name, places, prefix):
    """The name that a stored tensor has in the module; None where it has no place. Wrappers put module.
    (DataParallel), _orig_mod. (compile) or model. (Lightning) before names, old files lack the family's
    prefix."""
    while name:
        for own_name in (name, prefix + name):
            if own_name in places:
                return own_name
        wrapper, _, rest = name.partition(".")
        name = rest if wrapper in ("module", "_orig_mod", "model") else None
    return None


def _end_of_text(ckpt, raw):
    """The ids that end a text, as config.json writes them: those of config.json and generation_config.json,
    else the tokenizer's."""
    ids = []
    for config in (raw, hub.read_optional(ckpt, "generation_config.json")):
        given = config.get("eos_token_id")
        ids += given if isinstance(given, list) else [given]
    ids = [i for i in dict.fromkeys(ids) if i is not None]  # each once
    token = hub.read_optional(ckpt, "tokenizer_config.json").get("eos_token")
    if token and not ids:
        token = token if isinstance(token, str) else token["content"]
        ids = [load_tokenizer(ckpt).token_to_id(token)]
    return ids if len(ids) > 1 else next(iter(ids), None)


def enable_gradient_checkpointing(model):
    """What a block computed is thrown away and computed again in the backward pass: a third more time, and
    memory for one block's activations instead of all."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def build(family, raw):
    """The module on the meta device: shapes and no memory. raw: what config.json says."""
    names = [field.name for field in fields(family.Config) if field.name in raw]
    config = family.Config(**{name: raw[name] for name in names})
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is bool and not isinstance(value, bool):  # "false" would count as true
            raise InputError(f"config.json: {field.name} is {value!r}, neither true nor false")
    layers = getattr(config, "num_hidden_layers", None) or config.n_layer
    if layers > 1000:
        raise InputError(f"config.json asks for {layers:,} blocks: at most 1,000 are built")
    with torch.device("meta"):  # the values come later
        model = family(config)
    for i in eos_ids(model):
        if not (isinstance(i, int) and 0 <= i < config.vocab_size):
            raise InputError(f"config.json gives eos_token_id {i}, outside the vocabulary of "
                             f"{config.vocab_size}")
    derived = ("num_labels", "pooler", "pooling")  # not of config.json
    model.raw_config = {key: value for key, value in raw.items() if key not in derived}
    return model


def from_scratch(raw):
    """A model with random weights from the global generator. raw: what its config.json would say."""
    family = FAMILIES[raw["model_type"]]
    model = build(family, raw)
    model.load_state_dict({name: initial(name, t.shape) for name, t in model.state_dict().items()},
                          assign=True)
    return model.eval()


def initial(name, shape):
    """What GPT-2 and BERT start from: normal(0, 0.02), biases 0, norms 1."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape) * 0.02


def load_tokenizer(ckpt) -> Tokenizer:
    """The checkpoint's tokenizer.json, else what its vocabulary files give, with padding and truncation
    switched off.

    Raises InputError where there is none, or one that gives ids which the checkpoint's embedding has no row
    for.
    """
    path = hub.find_file(ckpt, hub.TOKENIZERS, or_base=True)
    with interpreting(path, "get it again, or a newer version of the package `tokenizers`"):
        if path.name == "tokenizer.json":
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = from_vocabulary(ckpt, path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        words = hub.read_optional(ckpt, "tokenizer_config.json").get("never_split") or ()
        known = [word for word in words if tokenizer.token_to_id(word) is not None]
        tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in known])
        check_growth(tokenizer)
        vocabulary = tokenizer.get_vocab()
        last = max(vocabulary, key=vocabulary.get, default="")
        rows = hub.read_optional(ckpt, "config.json").get("vocab_size")
        if rows and vocabulary and vocabulary[last] >= rows:  # fewer tokens: many embeddings are padded
            raise InputError(f"{ckpt}: the tokenizer has {vocabulary[last] + 1} tokens, {last!r} last, "
                             f"the model {rows}: take the tokenizer that the model was trained with")
    return tokenizer


def save_model(model, tokenizer, folder):
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json, which `transformers`
    opens too.

    Of a model with LoRA layers the adapters alone are written, in the format of `peft`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # ---- config.json
    raw = {key: value for key, value in model.raw_config.items() if key != "torch_dtype"}
    raw["architectures"] = [model.architecture]
    raw["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    num_labels = getattr(model.config, "num_labels", 0)
    if num_labels and len(raw.get("id2label", {})) != num_labels:
        raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        raw["label2id"] = {name: int(i) for i, name in raw["id2label"].items()}
    write_json(folder / "config.json", raw)

    # ---- weights
    if lora.layers(model):
        name = "adapter_model.safetensors"
        state = distributed.to_write(lora.weights(model))
        write_json(folder / "adapter_config.json", lora.adapter_config(model))
    else:
        name = "model.safetensors"
        state = distributed.to_write(model.state_dict())
    write_atomically(folder / name, lambda path: save_file(state, path, metadata={"format": "pt"}),
                     sum(tensor.nbytes for tensor in state.values()))

    # ---- tokenizer; without tokenizer_config.json transformers picks a class by model_type and, for GPT-2,
    # loses the prefix space
    write_atomically(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    special = {}
    for eos in eos_ids(model)[:1]:
        special |= {"eos_token": tokenizer.id_to_token(eos), "pad_token": tokenizer.id_to_token(eos)}
    for name in ("bos_token", "pad_token"):
        if isinstance(raw.get(f"{name}_id"), int):
            special[name] = tokenizer.id_to_token(raw[f"{name}_id"])
    for name in ("cls", "sep", "mask", "pad", "unk") if hasattr(model, "classify") else ():
        if tokenizer.token_to_id(f"[{name.upper()}]") is not None:
            special[f"{name}_token"] = f"[{name.upper()}]"
    special = {name: token for name, token in special.items() if token is not None}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context, **special})


def check_causal(model, ckpt):
    """InputError unless the model can write texts and end them."""
    if not hasattr(model, "head_weight"):
        raise InputError(f"{ckpt} is no causal language model but an encoder: take one such as aragpt2-base")
    if not eos_ids(model):
        raise InputError(f"{ckpt} has no end-of-text token: its config.json must give eos_token_id")


def eos_ids(model):
    """The ids that end a text, as config.json gives them; () for an encoder."""
    ids = getattr(model.config, "eos_token_id", None)
    return (ids,) if isinstance(ids, int) else tuple(ids or ())


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
