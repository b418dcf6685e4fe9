"""From a name to files: short names, downloads, and reading weights. Nothing from a checkpoint is executed."""

import json
import pickle
import re
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open

from sevloss import InputError

SHORT_NAMES = {
    "aragpt2-base": "aubmindlab/aragpt2-base",
    "aragpt2-medium": "aubmindlab/aragpt2-medium",
    "aragpt2-large": "aubmindlab/aragpt2-large",
    "aragpt2-mega": "aubmindlab/aragpt2-mega",
    "gpt2-small-arabic": "akhooli/gpt2-small-arabic",
    "dialect-ar-gpt-2021": "monsoon-nlp/dialect-ar-gpt-2021",
    "bloomz-560m": "bigscience/bloomz-560m",
    "al-atlas-0.5b": "atlasia/Al-Atlas-0.5B",
    "lfm2-350m": "LiquidAI/LFM2-350M",
    "lfm2-700m": "LiquidAI/LFM2-700M",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "arabertv02": "aubmindlab/bert-base-arabertv02",
    "arabertv2": "aubmindlab/bert-base-arabertv2",
    "bert-base-multilingual-cased": "google-bert/bert-base-multilingual-cased",
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model")  # the last two are refused


def local_folder(ckpt) -> Path:
    """A folder, a short name or a hub id (owner/name) -> a local folder with config.json; weights and tokenizer come on demand.

    Downloads go through huggingface_hub: its cache (HF_HOME), its server (HF_ENDPOINT), its offline switch (HF_HUB_OFFLINE=1).
    """
    if Path(ckpt).is_dir():
        if not any((Path(ckpt) / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"the folder {ckpt} has no config.json, so it is no checkpoint")
        return Path(ckpt)
    return _download(ckpt, "config.json").parent


def full_name(ckpt) -> str:
    """What another program or folder finds the checkpoint by: the folder's absolute path, or the hub id."""
    return str(Path(ckpt).resolve()) if Path(ckpt).is_dir() else _repository(ckpt)


def find_file(ckpt, names) -> Path:
    """The first of `names` that the checkpoint has, downloaded if need be."""
    for name in names:
        if Path(ckpt).is_dir():
            if (path := Path(ckpt) / name).is_file():
                with open(path, "rb") as file:
                    if file.read(24) == b"version https://git-lfs.":
                        raise InputError(f"{path} is a git-lfs pointer in place of the file: run `git lfs pull` in its folder")
                return path
        else:
            try:
                return _download(ckpt, name)
            except FileNotFoundError:
                continue
            except Unreachable:  # nobody says which of them there are: one that was downloaded before will do
                for other in names:
                    if isinstance(cached := try_to_load_from_cache(_repository(ckpt), other), str):
                        return Path(cached)
                raise
    raise InputError(f"the checkpoint {ckpt} has {'none of ' if len(names) > 1 else 'no '}{', '.join(names)}: "
                     "complete its download, or take another checkpoint")


class Unreachable(InputError):
    """The hub cannot be asked, and the file is not in the cache."""


def _repository(ckpt) -> str:
    return SHORT_NAMES.get(str(ckpt).lower(), str(ckpt))


def _download(ckpt, name) -> Path:
    repository = _repository(ckpt)
    if "/" not in repository or Path(repository).is_absolute() or repository.startswith("."):
        raise InputError(f"{ckpt} is neither a folder, nor a hub id like owner/name, nor one of {', '.join(SHORT_NAMES)}")
    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise Unreachable(f"{repository} is not in the local cache and the hub cannot be reached: "
                          "connect once, or give a folder") from error
    except GatedRepoError as error:
        raise InputError(f"{repository} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no folder {ckpt}, and the hub has no repository {repository} "
                         "(or it is private: run `hf auth login`)") from error
    except EntryNotFoundError as error:
        if name == "config.json":
            raise InputError(f"{repository} has no config.json, so it is no checkpoint") from error
        raise FileNotFoundError(name) from error
    except HFValidationError as error:
        raise InputError(f"{ckpt} is neither a folder nor a valid hub id") from error
    except (HTTPError, OSError) as error:
        raise InputError(f"downloading {name} of {repository} failed: {_first_line(error)}") from error


def read_json(path) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {_first_line(error)}; correct it or get it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read as JSON of names and values: it holds a {type(content).__name__}; get it again")
    return content


def read_optional(ckpt, name) -> dict:
    """A JSON file that not every checkpoint has: its content, or {}."""
    if Path(ckpt).is_dir():
        return read_json(Path(ckpt) / name) if (Path(ckpt) / name).is_file() else {}
    try:
        return read_json(_download(ckpt, name))
    except FileNotFoundError:
        return {}
    except Unreachable:
        if is_offline_mode() or try_to_load_from_cache(_repository(ckpt), name):  # what it returns: a mark that there is no such file
            return {}
        raise


def stored_tensors(ckpt) -> dict:
    """Name -> function that reads that tensor. A caller that drops each function when it has called it holds one tensor more than it
    keeps. A .bin is read whole, and its tensors are freed one by one."""
    path = find_file(ckpt, WEIGHTS)
    if not path.name.endswith(".index.json"):
        return open_tensors(path)
    tensors, weight_map = {}, read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path} has no weight_map, so it does not say where the tensors are: get it again")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:  # an index may not point outside its folder
            raise InputError(f"{path} names a shard outside its folder: {shard}; get it from a place you trust")
        tensors |= open_tensors(find_file(ckpt, (shard,)))
    if absent := [name for name in weight_map if name not in tensors]:
        raise InputError(f"{path} says that {weight_map[absent[0]]} holds {absent[0]}, which it does not: "
                         "get the index and all shards again")
    return tensors


def open_tensors(path) -> dict:
    """Of one file: name -> function that reads that tensor."""
    refusal = f"{path} holds more than tensors and is not loaded: get the checkpoint as .safetensors"
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt", backend="pread")  # not mapped: its pages would count as ours, once more
            return {name: partial(file.get_tensor, name) for name in file.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True)  # an unpickler that makes tensors and nothing else
    except Exception as error:  # what broken files raise has no common class
        if found := re.search(r"GLOBAL (\S+)", str(error)):  # torch's own message explains how to run that code
            raise InputError(f"{refusal} (this one runs {found[1]})") from error
        what = "it is not what torch.save writes" if isinstance(error, pickle.UnpicklingError) else _first_line(error).split(". ")[0]
        raise InputError(f"{path} is broken or not finished downloading: {what}; delete it and get it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(refusal)
    return {name: partial(lambda tensor: tensor, tensor) for name, tensor in state.items()}


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
