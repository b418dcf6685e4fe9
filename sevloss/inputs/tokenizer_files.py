"""A tokenizer from the files that older checkpoints have in place of tokenizer.json.

vocab.json and merges.txt: byte-level BPE as in GPT-2 and Qwen. vocab.txt: WordPiece as in BERT. What else
shapes the ids stands in tokenizer_config.json, special_tokens_map.json and added_tokens.json; each may be
absent. The ids are those of the package `transformers`. Its fast tokenizers split the tokens of `never_split`
(AraBERT's [رابط] and the like); here each is one id, as for its slow tokenizers and as AraBERT was trained.
"""

import math
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sevloss import InputError
from sevloss.inputs import hub

GPT2_TOKENS = {"eos_token": "<|endoftext|>"}
BERT_TOKENS = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
               "mask_token": "[MASK]"}
DEFAULT_TOKENS = dict.fromkeys(("gpt2", "aragpt2", "qwen2", "qwen3"), GPT2_TOKENS) | {"bert": BERT_TOKENS}
# New ones get their ids in this order.
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def from_vocabulary(ckpt, path) -> Tokenizer:
    """path: the checkpoint's vocab.json or vocab.txt. InputError for other kinds of tokenizers, and where the
    vocabulary and the added tokens do not belong together."""
    family = hub.read_optional(ckpt, "config.json").get("model_type", "gpt2")
    if path.name == "vocab.txt":
        family = "bert"
    if family not in DEFAULT_TOKENS or not path.name.startswith("vocab."):
        raise InputError(f"{path} of a {family} is not read: get a tokenizer.json, which `transformers` "
                         "makes with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")

    # Special tokens, and those added later: {id: token}
    config = hub.read_optional(ckpt, "tokenizer_config.json")
    if "added_tokens_decoder" in config:  # newer files have it; it replaces the two others
        added = {int(i): _token(value) for i, value in config["added_tokens_decoder"].items()}
    else:
        config |= hub.read_optional(ckpt, "special_tokens_map.json")
        added = {i: _token(word) for word, i in hub.read_optional(ckpt, "added_tokens.json").items()}
    values = {name: config.get(name, DEFAULT_TOKENS[family].get(name)) for name in SPECIAL}
    special = {name: _token(value, special=True) for name, value in values.items() if value}
    special_words = {token.content for token in special.values()}
    for token in added.values():
        token.special |= token.content in special_words

    # The vocabulary, then these tokens: each once, those with an id of their own first
    if family == "bert":
        tokenizer = _wordpiece(path, config, special)
    else:
        tokenizer = _byte_level_bpe(path, config, family)
    tokens = [added[i] for i in sorted(added)]
    for name, token in special.items():  # a default only where the vocabulary has it
        if name in config or tokenizer.token_to_id(token.content) is not None:
            tokens.append(token)
    tokens += [_token(value, special=True) for value in config.get("additional_special_tokens") or ()]
    once = {}
    for token in tokens:
        once.setdefault(token.content, token)
    tokenizer.add_tokens(list(once.values()))
    for i, token in added.items():
        given = tokenizer.token_to_id(token.content)
        if given != i:
            raise InputError(f"{path} makes the added token {token.content} {given}, but it is to be {i}: "
                             "get the vocabulary and the added tokens from one checkpoint")
    return tokenizer


def _token(value, special=False):
    """Files give a token as a string, or as an object with flags."""
    if isinstance(value, str):
        value = {"content": value}
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized")
    given = {name: value[name] for name in flags if name in value}
    return AddedToken(**given, special=special or bool(value.get("special")))


def _byte_level_bpe(path, config, family):
    merges = hub.find_file(path.parent, ("merges.txt",))
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    qwen = family.startswith("qwen")
    prefix_space = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(prefix_space, use_regex=not qwen)
    if qwen:
        split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wordpiece(path, config, special):
    with open(path, encoding="utf-8") as file:
        vocabulary = {line.rstrip("\n"): i for i, line in enumerate(file)}
    unknown, start, end = (special[name].content for name in ("unk_token", "cls_token", "sep_token"))
    if lacking := {unknown, start, end} - vocabulary.keys():
        raise InputError(f"{path} has no {min(lacking)}, so it is no vocabulary of a BERT")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    # BERT's own defaults: lower case unless told otherwise, and then without accents
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True), strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((end, vocabulary[end]), (start, vocabulary[start]))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def check_growth(tokenizer):
    """InputError for a tokenizer that makes much of little, by rules that each double a text, or a template
    that repeats it."""
    rules = tokenizer.normalizer.__getstate__().decode() if tokenizer.normalizer else ""
    growth = math.prod(max(1, len(text)) for text in re.findall(r'"content":"((?:[^"\\]|\\.)*)', rules))
    template = tokenizer.post_processor.__getstate__() if tokenizer.post_processor else b""
    if growth > 100 or template.count(b'"A"') > 10:
        raise ValueError("it makes a text ten times longer, or more")
