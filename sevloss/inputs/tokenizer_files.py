"""A tokenizer from the files that older checkpoints have in place of tokenizer.json; and encoding a large table word by word.

vocab.json and merges.txt: byte-level BPE as in GPT-2 and Qwen. vocab.txt: WordPiece as in BERT. What else shapes the ids stands in
tokenizer_config.json, special_tokens_map.json and added_tokens.json, each of which may be absent. The ids are those of the package
`transformers`. Its fast tokenizers split the tokens of `never_split` (AraBERT's [رابط] and the like); here each is one id, as for its slow
tokenizers and as AraBERT was trained.
"""

import json
import re
from array import array
from itertools import chain

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sevloss import InputError
from sevloss.inputs import hub

DEFAULTS = {
    "gpt2": {"eos_token": "<|endoftext|>"},
    "bert": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"},
}
DEFAULTS |= dict.fromkeys(("aragpt2", "qwen2", "qwen3"), DEFAULTS["gpt2"])
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # new ones get ids in this order
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
WORD = re.compile(r"(?s:.)[^ ]*+(?:(?<=\s) [^ ]*+)*+")  # up to the next space that something other than white space precedes
MOST_WORDS = 2 ** 19  # kept with their ids: about 90 MB


def from_vocabulary(ckpt, path) -> Tokenizer:
    """path: the checkpoint's vocab.json or vocab.txt. InputError for a sentencepiece model, and for families that split text otherwise."""
    kind = "bert" if path.name == "vocab.txt" else hub.read_optional(ckpt, "config.json").get("model_type", "gpt2")
    if kind not in DEFAULTS or not path.name.startswith("vocab."):
        raise InputError(f"{path} of a {kind} is not read: get a tokenizer.json, which the package `transformers` makes of it with "
                         "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
    config = hub.read_optional(ckpt, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # newer files have it; it replaces the two others
        config |= hub.read_optional(ckpt, "special_tokens_map.json")
    special = {name: _token(value, True) for name in SPECIAL if (value := config.get(name, DEFAULTS[kind].get(name)))}
    names = {token.content for token in special.values()}
    if "added_tokens_decoder" in config:
        added = {int(i): _token(value, value.get("special") or value["content"] in names)
                 for i, value in config["added_tokens_decoder"].items()}
    else:
        added = {i: _token(value, value in names) for value, i in hub.read_optional(ckpt, "added_tokens.json").items()}

    tokenizer = _wordpiece(path, config, special) if kind == "bert" else _byte_level_bpe(ckpt, path, config, kind)
    tokens = {added[i].content: added[i] for i in sorted(added)}
    for name, token in special.items():
        if name in config or tokenizer.token_to_id(token.content) is not None:  # the defaults only where they exist
            tokens.setdefault(token.content, token)
    for value in config.get("additional_special_tokens") or ():
        tokens.setdefault(_token(value, True).content, _token(value, True))
    tokenizer.add_tokens(list(tokens.values()))
    for i, token in added.items():
        if tokenizer.token_to_id(token.content) != i:
            raise InputError(f"{path} makes the added token {token.content} {tokenizer.token_to_id(token.content)}, but it is to be {i}: "
                             "get the vocabulary and the added tokens from one checkpoint")
    return tokenizer


def _token(value, special):
    """Files give a token as a string, or as an object with flags."""
    value = {"content": value} if isinstance(value, str) else value
    flags = {name: value[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
    return AddedToken(value["content"], special=bool(special), **flags)


def _byte_level_bpe(ckpt, path, config, kind):
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(hub.find_file(ckpt, ("merges.txt",)))))
    prefix_space = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(prefix_space)
    if kind.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(prefix_space, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wordpiece(path, config, special):
    with open(path, encoding="utf-8") as file:
        vocabulary = {line.rstrip("\n"): i for i, line in enumerate(file)}
    unknown, start, end = (special[name].content for name in ("unk_token", "cls_token", "sep_token"))
    if lacking := {unknown, start, end} - vocabulary.keys():
        raise InputError(f"{path} has no {min(lacking)}, so it is no vocabulary of a BERT")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(  # lower case unless told otherwise, and then without accents: BERT's own defaults
        lowercase=config.get("do_lower_case", True), strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A", end], special_tokens=[(token, vocabulary[token]) for token in (start, end)])
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_tokens([AddedToken(token, single_word=True, normalized=False) for token in config.get("never_split") or ()
                          if token in vocabulary])
    return tokenizer


# --- encoding word by word ------------------------------------------------------------------------------------------------

def words_stand_alone(tokenizer) -> bool:
    """Whether a text's ids are those of the matches of WORD in it, end to end.

    So it is where text is cut as for GPT-2 or Qwen, whose regular expressions never match on into a space, and where nothing is put before
    a text and no added token takes in a space.
    """
    if tokenizer.pre_tokenizer is None or not isinstance(tokenizer.normalizer, (type(None), normalizers.NFC)):
        return False
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    parts = state.get("pretokenizers", [state])
    qwen = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    return (all(part["type"] in ("ByteLevel", "Digits") or part == qwen for part in parts)
            and any(part.get("use_regex") or part == qwen for part in parts)
            and not tokenizer.num_special_tokens_to_add(is_pair=False)
            and not any(" " in token.content or token.lstrip or token.rstrip
                        for token in tokenizer.get_added_tokens_decoder().values() if not token.special))


class WordEncoder:
    """Encodes texts with a tokenizer for which words_stand_alone, each different word once: several times as fast in a large table."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids_of = {}  # word -> the bytes of its ids, which are joined faster than lists

    def __call__(self, texts):
        """List of int32 arrays. Words like '</s>' in a text stay text."""
        self.tokenizer.encode_special_tokens = True
        if len(self.ids_of) > MOST_WORDS:
            self.ids_of.clear()
        texts = [WORD.findall(text) for text in texts]
        new = list(set(chain.from_iterable(texts)).difference(self.ids_of))
        encoded = self.tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self.ids_of.update(zip(new, (array("i", e.ids).tobytes() for e in encoded)))
        return [np.frombuffer(b"".join(map(self.ids_of.__getitem__, words)), np.int32) for words in texts]
