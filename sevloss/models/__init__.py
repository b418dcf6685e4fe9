"""Checkpoints in and out: load_model, load_tokenizer, save_model; and small models from scratch."""

import re
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

from sevloss import InputError, distributed, interpreting, write_atomically, write_json
from sevloss.inputs import hub, tables
from sevloss.inputs.tokenizer_files import check_growth, from_vocabulary, keep_whole
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
    # ---- config.json decides; an adapter leads to its base
    *adapters, base = hub.folders(ckpt)
    if adapters:
        model = load_model(base, dtype=dtype, device=device, num_labels=num_labels)
        for folder in reversed(adapters):
            lora.load(model, folder)
            lora.merge(model)
            if (folder / "config.json").is_file():  # ours; peft writes none
                model.raw_config["sevloss"] = hub.read_json(folder / "config.json").get("sevloss", {})
        model.base = hub.full_name(ckpt)
        return model.requires_grad_(True).eval()
    raw = hub.read_json(hub.find_file(ckpt, ("config.json",)))
    with interpreting(base / "config.json"):
        if raw.get("model_type") not in FAMILIES:
            raise InputError(f"{ckpt} is of model_type {raw.get('model_type')!r}; known are "
                             f"{', '.join(FAMILIES)}: take a checkpoint of one of these")
        if raw.get("quantization_config"):
            raise InputError(f"{ckpt} holds quantized weights (its config.json has a quantization_config): "
                             "take the checkpoint that they were made from")
        family = FAMILIES[raw["model_type"]]
        stored = _without_shared_prefix(hub.stored_tensors(ckpt), family.prefix)  # {name: function}
        if hasattr(family.Config, "eos_token_id"):
            raw["eos_token_id"] = _end_of_text(ckpt, raw)
        head_rows = list(range(num_labels or 0))
        if num_labels:
            raw["num_labels"] = num_labels
            names = raw.get("id2label") or {}
            classes = [tables.LABELS.get(tables.plain(names[i])) for i in sorted(names, key=int)]
            head_rows = [classes.index(i) for i in head_rows if i in classes]
        model = build(family, family.normalize_config(raw, stored))
    expected = model.state_dict()
    tied = hasattr(model, "head_weight") and model.config.tie_word_embeddings

    # ---- read the tensors that the module has a place for
    state = {}
    surplus = []
    addresses = set()
    read_second_head = None
    for stored_name in list(stored):
        read = stored.pop(stored_name)  # taken out, so that what the file's version takes is freed in turn
        name = stored_name.replace("LayerNorm.gamma", "LayerNorm.weight")  # old BERTs
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name not in expected and family.prefix + name in expected:
            name = family.prefix + name
        if name not in expected:
            if tied and name == "lm_head.weight":
                read_second_head = read
            elif not re.search(family.ignored_keys, name):
                surplus.append(stored_name)
            continue
        tensor = read()
        if num_labels and name.startswith(("classifier.", "mean_classifier.")):
            if len(head_rows) < num_labels or len(tensor) != num_labels:
                continue  # a head for other classes: a new one is made
            tensor = tensor[head_rows]
        if tensor.shape != expected[name].shape:
            raise InputError(f"{ckpt}: {stored_name} has shape {tuple(tensor.shape)}, config.json asks for "
                             f"{tuple(expected[name].shape)}: get config.json and the weights from one place")
        tensor = tensor.to(device=device, dtype=dtype)
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise InputError(f"{ckpt}: {stored_name} has a value that is no number or infinite: take another "
                             "checkpoint")
        # in a .bin two can share memory, and training one would change the other
        if tensor.data_ptr() in addresses:
            tensor = tensor.clone()
        addresses.add(tensor.data_ptr())
        state[name] = tensor

    # ---- what is surplus or missing
    if surplus:
        raise InputError(f"{ckpt} holds {len(surplus)} tensors that a {raw['model_type']} of its "
                         f"config.json has no place for: {_some(surplus)}; get config.json and the weights "
                         "from one place")
    missing = [name for name in expected if name not in state]
    needed = [name for name in missing if not any(name.startswith(key) for key in family.optional_keys)]
    if needed:
        raise InputError(f"{ckpt} lacks {len(needed)} tensors that a {raw['model_type']} of its config.json "
                         f"needs: {_some(needed)}; get config.json and the weights from one place")
    if missing:
        print(f"initialised, not in the checkpoint or for other classes: {_some(missing)}")
    for name in missing:
        state[name] = initial(name, expected[name].shape).to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    if read_second_head and not _equal(read_second_head(), model.head_weight):
        raise InputError(f"{ckpt}: config.json ties the head to the embedding, but lm_head.weight differs "
                         "from it: to use it, set tie_word_embeddings to false there")
    model.base = hub.full_name(ckpt)
    return model.eval()


def _equal(stored, tensor):
    """Whether `stored` is what `tensor` was read from. In parts, to save memory."""
    if stored.shape != tensor.shape:
        return False
    return all(torch.equal(a.to(b), b) for a, b in zip(stored.split(4096), tensor.split(4096)))


def _without_shared_prefix(stored, family_prefix):
    """What wrappers put before all names goes: module. (DataParallel), _orig_mod. (compile), model.
    (Lightning)."""
    while True:
        prefixes = {name.partition(".")[0] + "." for name in stored}
        rest = {name.partition(".")[2]: read for name, read in stored.items()}
        own = prefixes == {family_prefix} and not all(name.startswith((family_prefix, "lm_head."))
                                                      for name in rest)
        if len(prefixes) != 1 or own or "" in rest:
            return stored
        stored = rest


def _end_of_text(ckpt, raw):
    """The ids that end a text, as config.json writes them: those of config.json and generation_config.json,
    else the tokenizer's."""
    ids = {}
    for config in (raw, hub.read_optional(ckpt, "generation_config.json")):
        given = config.get("eos_token_id")
        ids |= dict.fromkeys(given if isinstance(given, list) else [given])
    ids.pop(None, None)
    token = hub.read_optional(ckpt, "tokenizer_config.json").get("eos_token")
    if token and not ids:
        token = token if isinstance(token, str) else token["content"]
        ids[load_tokenizer(ckpt).token_to_id(token)] = None
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def enable_gradient_checkpointing(model):
    """What a block computed is thrown away and computed again in the backward pass: a third more time, and
    memory for one block's activations instead of all."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def build(family, raw):
    """The module on the meta device: shapes and no memory. raw: what config.json says."""
    what = f"config.json of a {raw['model_type']}"
    for field in fields(family.Config):
        value = raw.get(field.name, field.default)
        if value is MISSING:
            raise InputError(f"{what} lacks {field.name}: get it again")
        if field.default is MISSING and not (isinstance(value, int) and value > 0):
            raise InputError(f"{what} gives {field.name} as {value!r}: it must be a positive number")
        if "layer" in field.name and isinstance(value, int) and value > 1000:
            raise InputError(f"{what} gives {field.name} as {value:,}: at most 1,000 blocks are built")
        if isinstance(field.default, (int, float)) and not isinstance(value, (int, float, type(None))):
            raise InputError(f"{what} gives {field.name} as {value!r}: write it as {field.default!r} is "
                             "written")
    names = [field.name for field in fields(family.Config) if field.name in raw]
    config = family.Config(**{name: raw[name] for name in names})
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
    path = hub.find_file(ckpt, hub.TOKENIZERS)
    with interpreting(path, "get it again, or a newer version of the package `tokenizers`"):
        if path.name == "tokenizer.json":
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = from_vocabulary(ckpt, path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        keep_whole(tokenizer, hub.read_optional(ckpt, "tokenizer_config.json").get("never_split") or ())
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
        lora.save(model, folder)
    else:
        state = distributed.to_write(model.state_dict())
        write_atomically(folder / "model.safetensors",
                         lambda path: save_file(state, path, metadata={"format": "pt"}),
                         sum(tensor.nbytes for tensor in state.values()))

    # ---- tokenizer; without tokenizer_config.json transformers picks a class by model_type and, for GPT-2,
    # loses the prefix space
    write_atomically(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    special = {}
    for eos in eos_ids(model)[:1]:
        special["eos_token"] = tokenizer.id_to_token(eos)
        special["pad_token"] = tokenizer.id_to_token(eos)
    for name in ("bos_token", "pad_token"):
        if isinstance(raw.get(f"{name}_id"), int):
            special[name] = tokenizer.id_to_token(raw[f"{name}_id"])
    if hasattr(model, "classify"):
        for name in ("cls", "sep", "mask", "pad", "unk"):
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
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
