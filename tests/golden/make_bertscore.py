"""Write bertscore/: a tiny random BERT, a tokenizer, and what the package bert-score makes of them, for tests/test_bertscore.py.

    pip install torch==2.13.0 transformers==5.23.0 bert-score==0.3.13
    python tests/golden/make_bertscore.py

All weights are random, norms and biases too, and so large that a vector depends on its neighbours, but most on its own piece.
They are stored in fp16 and computed with in fp32. Every pair is scored in a call of its own, because the package's rounding
depends on what a text is padded to. expected.json: `pairs` [candidate, reference], `scores` {block: [[P, R, F] of each pair]},
and `idf` [[P, R, F]] after the last block.
"""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

try:
    from bert_score import BERTScorer
    from transformers import BertConfig, BertModel
except ImportError:
    raise SystemExit("The golden files come from bert-score: pip install bert-score==0.3.13 transformers==5.23.0") from None

FOLDER = Path(__file__).with_name("bertscore")
CONTEXT = 32
PAIRS = [
    ("راجع الطبيب إذا استمر الصداع", "راجع الطبيب إذا استمر الصداع"),
    ("اشرب الماء وخذ قسطًا من الراحة", "اشرب ماء كثيرًا وخذ قسطا من الراحة اليوم"),
    ("لا تقلق فهذا أمر شائع", "توجه إلى الطوارئ فورًا"),
    ("نعم", "نعم، لكن بعد استشارة الطبيب"),
    ("يحتاج الجرح إلى خياطة خلال ست ساعات", "نعم"),
    ("نعم", "لا"),
    ("خُذْ حَبّةً واحِدةً بَعدَ الأكل", "خذ حبة واحدة بعد الأكل"),
    ("  \n خذ الدواء بعد الأكل\t ", "خذ الدواء بعد الأكل"),
    ("الدواء الدواء الدواء", "خذ الدواء مرتين"),
    ("خذ paracetamol 500 mg كل 6 ساعات", "خذ باراسيتامول كل ست ساعات 👍"),
    ("راجع الطبيب إذا استمر الصداع أو الدوخة، واشرب الماء كثيرًا. " * 4, "راجع الطبيب إذا استمر الصداع"),
    ("خذ الدواء بعد الأكل " * 12 + "ثم نم", "توجه إلى الطوارئ فورًا إذا ضاق النفس أو آلمك الصدر. " * 5),
]


def make_tokenizer():
    """Letters, and the words that occur twice. Not trained: the trainer breaks ties by chance. No emoji, so
    that [UNK] occurs."""
    words = Counter(re.findall(r"\w+", " ".join(text for pair in PAIRS for text in pair)))
    letters = sorted(set("".join(words)) | set(".،" + "ًٌٍَُِّْ"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    pieces += sorted(word for word, count in words.items() if count > 1 and len(word) > 1)
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False,
                                                      strip_accents=False)  # as that of mBERT: diacritics stay
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def make_checkpoint():
    """config.json, model.safetensors, tokenizer.json and tokenizer_config.json; without model_max_length the
    package overflows."""
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    (FOLDER / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}, indent=1) + "\n",
                                                  encoding="utf-8")
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=24, num_hidden_layers=3,
                        num_attention_heads=4,
                        intermediate_size=40, max_position_embeddings=CONTEXT, pad_token_id=0)
    model = BertModel(config, add_pooling_layer=False)
    weights = {}
    for name, tensor in model.state_dict().items():
        random = torch.randn(tensor.shape)
        weights[name] = (random if "word_embeddings" in name else 1 + random / 10 if "Norm.weight" in name
                         else random / 4).half()
    save_file(weights, FOLDER / "model.safetensors", {"format": "pt"})
    config = json.loads(config.to_json_string()) | {"architectures": ["BertModel"],
                                                    "dtype": "float32"}  # what the package computes in
    (FOLDER / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main():
    make_checkpoint()
    scores = {}
    for block in range(4):
        scorer = BERTScorer(model_type=str(FOLDER), num_layers=block, device="cpu")
        scores[block] = [[float(x) for x in scorer.score([c], [r])] for c, r in PAIRS]
    scorer = BERTScorer(model_type=str(FOLDER), num_layers=3, device="cpu", idf=True,
                        idf_sents=[r for _, r in PAIRS], nthreads=0)
    idf = [[float(x) for x in scorer.score([c], [r])] for c, r in PAIRS]
    with open(FOLDER / "expected.json", "w", encoding="utf-8") as file:
        json.dump({"pairs": PAIRS, "scores": scores, "idf": idf}, file, ensure_ascii=False, indent=1)
        file.write("\n")
    print(f"{sum(path.stat().st_size for path in FOLDER.iterdir()) / 1000:.0f} kB")
    for pair, *rows in zip(PAIRS, *scores.values(), idf):
        print(" ".join(f"{f:.3f}" for _, _, f in rows), pair[0][:30], "|", pair[1][:30])


if __name__ == "__main__":
    main()
