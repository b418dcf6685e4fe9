"""Encoding each different word once gives what encoding whole texts gives; where it would not, it is not done."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sevloss import data
from sevloss.inputs import tokenizer_files
from sevloss.inputs.tokenizer_files import QWEN_WORDS, WordEncoder, words_stand_alone

BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def trained(texts, pre_tokenizer, normalizer=None, **added):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    if normalizer:
        made.normalizer = normalizer
    made.train_from_iterator([*texts, *["a  b\n c", "x\n \ny   z", "1 . 2"] * 9], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.add_tokens([AddedToken("<think>", special=False, **added)])
    return made


def split(words):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])


STANDING_ALONE = {
    "gpt2": (pre_tokenizers.ByteLevel(False),),
    "gpt2 with a space before the text": (pre_tokenizers.ByteLevel(True),),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),),
    "qwen": (split(QWEN_WORDS), normalizers.NFC()),
}


@pytest.mark.parametrize("name", STANDING_ALONE)
def test_word_by_word_as_in_whole_texts(name, rows, monkeypatch):
    """White space in every order, marks that combine, digits, quotes, added tokens, and names of special ones, which stay text."""
    complaints = [row["Question"] for row in rows]
    made = trained(complaints, *STANDING_ALONE[name])
    pieces = [*"     \n\n\t\r\u00a0\u2028\u200f\x1c\u3000", *"ابتء،؟.!'s12٤٥abé\u0301\u064bـ👍_-(<", "  ", " \n", "\n ", "'ll",
              "<|endoftext|>", "<think>", " <think> "]
    chance = random.Random(0)
    texts = ["".join(chance.choices(pieces, k=chance.randrange(20))) for _ in range(5000)] + complaints
    monkeypatch.setattr(tokenizer_files, "MOST_WORDS", 500)  # so that words are forgotten on the way

    assert words_stand_alone(made)
    encode, expected = WordEncoder(made), data.encode(made, texts, special=True)
    for start in range(0, len(texts), 100):
        assert [ids.tolist() for ids in encode(texts[start:start + 100])] == expected[start:start + 100]
        assert len(encode.ids_of) < 500 + 100 * 20


@pytest.mark.parametrize("parts, added", [
    ((split(BLOOM_WORDS),), {}),  # "، ." is one piece
    ((pre_tokenizers.ByteLevel(False, use_regex=False),), {}),
    ((pre_tokenizers.Metaspace(),), {}),
    ((pre_tokenizers.ByteLevel(False), normalizers.Lowercase()), {}),
    ((pre_tokenizers.ByteLevel(False),), {"rstrip": True}),
])
def test_other_tokenizers_get_whole_texts(parts, added, rows):
    assert not words_stand_alone(trained([row["Answer"] for row in rows], *parts, **added))


def test_what_a_tokenizer_puts_before_a_text_needs_the_whole_text(rows):
    made = trained([row["Answer"] for row in rows], pre_tokenizers.ByteLevel(False))
    assert words_stand_alone(made)
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert not words_stand_alone(made)


def test_no_word_is_given_twice_to_the_tokenizer(tiny, monkeypatch):
    class Counting:
        def __init__(self, of):
            self.of, self.seen = of, []

        def encode_batch_fast(self, words, **arguments):
            self.seen += words
            return self.of.encode_batch_fast(words, **arguments)
    counting = Counting(tiny[1])
    encode = WordEncoder(counting)
    encode(["ألم في الصدر", "ألم في البطن"])
    encode(["ألم في الصدر"])
    assert sorted(counting.seen) == sorted(["ألم", " في", " الصدر", " البطن"])
