"""From a name to a folder with a checkpoint's files, and from these to tensors. Nothing of them is run."""

import functools
import json
from pathlib import Path

import torch
from huggingface_hub import HfApi, errors, snapshot_download
from safetensors import safe_open

from sevloss import InputError, interpreting

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
# Of each kind, the first that a checkpoint has is read
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model")
OTHER_FILES = ("config.json", "adapter_config.json", "generation_config.json", "merges.txt",
               "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Unreachable(InputError):
    """The hub cannot be asked, and the checkpoint is not in the cache."""


def full_name(ckpt) -> str:
    """What the checkpoint is found by from anywhere: the folder's absolute path, or the hub id."""
    if Path(ckpt).is_dir():
        return str(Path(ckpt).resolve())
    return SHORT_NAMES.get(str(ckpt).lower(), str(ckpt))


def folders(ckpt) -> list[Path]:
    """A folder, a short name or a hub id (owner/name) -> where its files lie: the local folder; of an
    adapter, then that of its base, which may be an adapter too.

    Downloads go through huggingface_hub: its cache (HF_HOME), its server (HF_ENDPOINT), its offline switch
    (HF_HUB_OFFLINE=1). Raises InputError for what is no checkpoint, Unreachable where there is no connection.
    """
    found = [Path(ckpt) if Path(ckpt).is_dir() else _download(full_name(ckpt))]
    while (path := found[-1] / "adapter_config.json").is_file():
        base = read_json(path).get("base_model_name_or_path")
        with interpreting(path):
            folder = Path(base) if Path(base).is_dir() else None
        try:
            folder = folder or _download(full_name(base))
        except InputError as error:
            message = f"{path} names this base: correct base_model_name_or_path there if need be; {error}"
            raise type(error)(message) from error
        if folder in found:
            raise InputError(f"{path} names itself as its base: correct base_model_name_or_path there")
        found.append(folder)
    return found


@functools.cache  # asked once, so that weights and tokenizer are of one version
def _download(repository):
    """The repository's folder in the cache, with its configuration, tokenizer and one kind of weights."""
    owner, _, name = repository.partition("/")
    typed_path = not name or owner in ("", ".", "..", "~") or "\\" in repository or Path(owner).is_dir()
    if typed_path and repository not in SHORT_NAMES.values():
        raise InputError(f"{repository} is neither a folder, nor a hub id like owner/name, nor one of "
                         f"{', '.join(SHORT_NAMES)}")
    try:
        # Asked here, because snapshot_download has no timeout: it would wait for a silent network
        listed = HfApi().model_info(repository, timeout=10).siblings
    except errors.HFValidationError as error:
        raise InputError(f"{repository} is neither a folder nor a valid hub id") from error
    except (errors.HTTPError, OSError) as error:  # no connection, no access, or HF_HUB_OFFLINE=1
        return _cached(repository, error)

    files = {file.rfilename for file in listed}
    weights = next((name for name in (*ADAPTERS, *WEIGHTS) if name in files), "")
    shards = weights.removesuffix(".index.json").replace(".", "-*.")
    wanted = [*OTHER_FILES, *TOKENIZERS, weights, shards]
    with interpreting(repository, "try again", wanted="downloaded"):
        try:
            return Path(snapshot_download(repository, allow_patterns=wanted))
        except errors.GatedRepoError as error:
            raise InputError(f"{repository} is gated: accept its terms on the hub, then run `hf auth login`"
                             ) from error


def _cached(repository, reason):
    """The repository's folder as downloaded before. reason: what asking the hub raised."""
    try:
        return Path(snapshot_download(repository, allow_patterns="*config.json", local_files_only=True))
    except errors.LocalEntryNotFoundError:
        if isinstance(reason, errors.RepositoryNotFoundError):
            raise InputError(f"there is no folder {repository}, and the hub has no repository {repository} "
                             "(or it is private: run `hf auth login`)") from reason
        raise Unreachable(f"{repository} is not in the local cache and the hub cannot be reached: "
                          "connect once, or give a folder") from reason


def find_file(ckpt, names, *, or_base=False) -> Path:
    """The first of `names` that the checkpoint has, or, with or_base, its base. InputError where it has none,
    or a git-lfs pointer."""
    places = folders(ckpt) if or_base else folders(ckpt)[:1]
    for path in [folder / name for folder in places for name in names]:
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(24) == b"version https://git-lfs.":
                    raise InputError(f"{path} is a git-lfs pointer in place of the file: "
                                     "run `git lfs pull` in its folder")
            return path
    raise InputError(f"the checkpoint {ckpt} has no {' or '.join(names)}: "
                     "complete its download, or take another checkpoint")


def read_json(path) -> dict:
    """A JSON file of names and values; InputError where it is anything else."""
    with interpreting(path):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"JSON with a {type(content).__name__} in place of names and values")
        return content


def read_optional(ckpt, name) -> dict:
    """A JSON file that not every checkpoint has: its content, or that of the base's, or {}."""
    paths = [folder / name for folder in folders(ckpt) if (folder / name).is_file()]
    return read_json(paths[0]) if paths else {}


def weight_files(ckpt, names=WEIGHTS) -> list[Path]:
    """The first of `names` that is there; of an index, all its shards."""
    path = find_file(ckpt, names)
    if not path.name.endswith(".index.json"):
        return [path]
    with interpreting(path, "get it again"):
        shards = sorted(set(read_json(path)["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise InputError(f"{path} names a shard outside its folder, {shard}: do not trust it")
        return [find_file(ckpt, (shard,)) for shard in shards]


def open_tensors(path) -> dict:
    """{name: function that reads that tensor}, of one .safetensors or .bin file."""
    refusal = f"{path} holds more than tensors and is not loaded: get the checkpoint as .safetensors"
    try:
        if path.suffix == ".safetensors":
            # read, not mapped: mapped pages would count as ours once more
            file = safe_open(path, framework="pt", backend="pread")
            return {name: functools.partial(file.get_tensor, name) for name in file.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True)  # can make tensors and nothing else
    except Exception as error:  # what broken files raise has no common class
        if "GLOBAL" in str(error):  # torch's own message explains how to run it
            raise InputError(refusal) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = first_line.split(". ")[0]
        raise InputError(f"{path} is broken or not finished downloading: {reason}; "
                         "delete it and get it again") from error
    if isinstance(state, dict):  # trainers wrap the tensors: {"state_dict": tensors, "epoch": 3}
        inner = [value for value in state.values() if _all_tensors(value) and value]
        state = inner[0] if len(inner) == 1 else state
    if not _all_tensors(state):
        raise InputError(refusal)
    return {name: functools.partial(torch.clone, tensor.detach()) for name, tensor in state.items()}


def _all_tensors(state):
    return isinstance(state, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
