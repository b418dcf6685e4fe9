"""Write tokenizers.json: small vocabularies as older checkpoints have them, and the ids of the reference.

    pip install transformers==5.23.0
    python tests/golden/make_tokenizers.py

The vocabularies are trained on data/sample.jsonl. Each case has the other files of such a checkpoint, written
as real ones are, and the ids of every text. The reference is the fast tokenizer of the package
`transformers`; with `never_split` it is the slow one, because the fast one knows no such thing. Two texts are
left out there (null): in one the two differ anyway, in the other ours is meant to differ.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

try:
    from transformers import BertTokenizerFast, GPT2TokenizerFast, Qwen2TokenizerFast
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
except ImportError:
    raise SystemExit("needs the package `transformers`: pip install transformers==5.23.0") from None

HERE = Path(__file__).parent
TEXTS = [
    "", " ", "أعاني من ألم في الصدر منذ يومين", " مسافة قبل  وبين وبعد ", "\nعندي صداع\n\nالاجابة:\n",
    "سطر\r\nثم\tجدول\n \n نهاية", "كلمة" * 40,
    "الجرعة 500 ملغ (مرتين/يوم)، ٣ أيام؛ ثم 2.5٪ — انتهى…",
    "السُّكَّريُّ مَرَضٌ مُزْمِنٌ جِدًّا", "إلى المستشفى: آلام أُذن ئؤة ى", "حـــاد ، مزمن .",
    "e\u0301 ا\u0655 آ \u0622",
    "Aspirin 100mg ÉCOLE it's I'M don't", "中文 مع عربي", "قلبي ❤️ يؤلمني 😷👨\u200d👩\u200d👧 ?",
    "نص ﻻ ﷺ\u200f\u200bو\u00a0فراغ\u2028سطر\x00\ufffd",
    "انتهى<|endoftext|>ثم <|endoftext|>", "[GULF] شلونك [MSA]كيف حالك", "<|im_start|>طبيب<|im_end|>",
    "قبل <|pad|> بعد", "(نعم) (لا)؟",
    "[CLS] نص [MASK] آخر [SEP] [UNK]",
    "راسلنا [بريد] أو [رابط] ثم [مستخدم]", "[رابط][بريد]", "و+ كتاب +ك +كما ال+ بيت", "[x] [ رابط ] {رابط}",
]
NOT_SLOW = (
    "e\u0301 ا\u0655 آ \u0622",  # the slow one composes letters and accents first
    "[رابط][بريد]",  # the slow one knows the tokens between spaces only
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NEVER_SPLIT = ["[بريد]", "[مستخدم]", "[رابط]", "و+", "ال+", "+ك", "+كما"]
END = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
DIALECTS = ["[EGYPTIAN]", "[MSA]", "[LEVANTINE]", "[GULF]", "[MAGHREBI]"]


def byte_level_bpe(lines):
    """-> vocab.json, merges.txt. Id 0 is <|endoftext|>, as in AraGPT2. GPT-2 splits "(نعم", Qwen does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\S+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator([*lines, *["(نعم)"] * 999], trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(tokenizer.to_str())["model"]
    return (json.dumps(model["vocab"], ensure_ascii=False),
            "#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))


def wordpiece(lines):
    """-> vocab.txt; AraBERT's tokens stand amid the others."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL,
                                                                   show_progress=False))
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return "".join(word + "\n" for word in [*words[:200], *NEVER_SPLIT, *words[200:], "رابط", "école",
                                            "École", "حاد", "ـ", "##ـ"])


def added(token, special):
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": special}


def cases(size):
    """size: of the BPE vocabulary. Name -> (reference, the files)."""
    bert = {"do_lower_case": False, "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
            "cls_token": "[CLS]", "mask_token": "[MASK]",
            "tokenize_chinese_chars": True, "strip_accents": None}
    return {
        "gpt2, nothing said": (GPT2TokenizerFast, {}),
        "gpt2-small-arabic": (GPT2TokenizerFast, {
            "tokenizer_config.json": {"pad_token": "<|endoftext|>", "special_tokens_map_file": None},
            "special_tokens_map.json": dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"),
                                                     "<|endoftext|>")}),
        "dialect-ar-gpt-2021": (GPT2TokenizerFast, {
            "tokenizer_config.json": {"add_prefix_space": False, "pad_token": None,
                                      **dict.fromkeys(("unk_token", "bos_token", "eos_token"),
                                                      {"__type": "AddedToken", **END})},
            "special_tokens_map.json": {"bos_token": END, "eos_token": END},
            "added_tokens.json": {token: size + i for i, token in enumerate(DIALECTS)}}),
        "gpt2, prefix space and a new pad token": (GPT2TokenizerFast, {
            "tokenizer_config.json": {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"},
            "special_tokens_map.json": {"eos_token": "<|endoftext|>",
                                        "pad_token": {**END, "content": "<|pad|>", "lstrip": True},
                                        "additional_special_tokens": ["[MSA]", "[GULF]"]}}),
        "qwen2": (Qwen2TokenizerFast, {
            "config.json": {"model_type": "qwen2"},
            "tokenizer_config.json": {"add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>",
                                      "pad_token": "<|endoftext|>",
                                      "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                                      "added_tokens_decoder": {
                                          "0": added("<|endoftext|>", True),
                                          str(size): added("<|im_start|>", True),
                                          str(size + 1): added("<|im_end|>", True),
                                          str(size + 2): added("[GULF]", False)}}}),
        "bert, nothing said": (BertTokenizerFast, {}),
        "multilingual-cased": (BertTokenizerFast, {"tokenizer_config.json": {"do_lower_case": False,
                                                                             "model_max_length": 512}}),
        "bert, accents and Chinese as they are": (BertTokenizerFast, {
            "tokenizer_config.json": {"do_lower_case": True, "strip_accents": False,
                                      "tokenize_chinese_chars": False}}),
        "bert, accents stripped from cased text": (BertTokenizerFast, {
            "tokenizer_config.json": bert | {"strip_accents": True, "mask_token": {
                "__type": "AddedToken", **added("[MASK]", True), "lstrip": True}}}),
        "arabertv2": (BertTokenizerLegacy, {
            "tokenizer_config.json": bert | {"do_basic_tokenize": True, "never_split": NEVER_SPLIT},
            "special_tokens_map.json": {name: value for name, value in bert.items()
                                        if name.endswith("_token")}}),
    }


def main():
    sample = HERE.parent.parent / "data" / "sample.jsonl"
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    lines = [text for row in rows[:60] for text in (row["Question"], row["Answer"])]
    vocab_json, merges = byte_level_bpe(lines)
    vocabularies = {"vocab.json": vocab_json, "merges.txt": merges, "vocab.txt": wordpiece(lines)}
    size = len(json.loads(vocabularies["vocab.json"]))
    golden = {"transformers": version("transformers"), "vocabularies": vocabularies, "texts": TEXTS,
              "cases": {}}
    for name, (reference, files) in cases(size).items():
        names = ["vocab.txt"] if reference.__name__.startswith("Bert") else ["vocab.json", "merges.txt"]
        with tempfile.TemporaryDirectory() as folder:
            for file in names:
                (Path(folder) / file).write_text(vocabularies[file], encoding="utf-8")
            for file, content in files.items():
                (Path(folder) / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            tokenizer = reference.from_pretrained(folder)
            ids = [None if reference is BertTokenizerLegacy and text in NOT_SLOW
                   else tokenizer(text)["input_ids"] for text in TEXTS]
            golden["cases"][name] = {"vocabulary": names, "files": files, "ids": ids}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (HERE / "tokenizers.json").write_text(text + "\n", encoding="utf-8")
    print(f"tokenizers.json: {len(text.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
