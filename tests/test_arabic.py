"""AraBERT's preprocessing: outputs of the package `arabert` (golden/make_arabic.py), and every step once."""

import json
import time
from pathlib import Path

import pytest

from sevloss.inputs.arabic import preprocess, unpreprocess

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("arabic.json").read_text(encoding="utf-8"))
REAL = Path(__file__).parents[2] / "shared" / "golden" / "arabert_preprocess.json"


@pytest.mark.parametrize("row", GOLDEN["texts"])
def test_same_as_arabert(row):
    assert preprocess(row["text"]) == row["out"]
    assert unpreprocess(row["out"]) == row["unpre"]


@pytest.mark.parametrize("row", GOLDEN["generated"])
def test_unpreprocess_of_generated_text_is_same_as_arabert(row):
    assert unpreprocess(row["out"]) == row["unpre"]


def test_same_as_arabert_on_real_posts():
    if not REAL.exists():
        pytest.skip("needs ../shared/golden/arabert_preprocess.json: the posts are not ours to publish")
    for row in json.loads(REAL.read_text(encoding="utf-8")):
        assert preprocess(row["text"]) == row["out"]
        assert unpreprocess(row["out"]) == row["unpre"]


PREPROCESS = {
    "HTML entities": ("دم&nbsp;وسكر &quot;صائم&quot;", 'دم وسكر " صائم "'),
    "HTML entities, once": ("&amp;lt;", "lt ;"),
    "diacritics": ("مُزْمِنٌ", "مزمن"),
    "superscript alef is no diacritic": ("ه\u0670ذا", "ه ذا"),
    "tatweel": ("حــــاد", "حاد"),
    "link": ("انظر https://example.org/a?b=1 للجرعة", "انظر [رابط] للجرعة"),
    "link with Arabic after it": ("www.example.comوالرقم", "[رابط] والرقم"),
    "dosage notes that look like links": ("Tab.daily 10.mg", "[رابط] [رابط]"),
    "e-mail address": ("مريم@عيادة.مثال", "[بريد]"),
    "e-mail address that looks like a link": ("clinic@example.com", "[رابط]"),
    "name of a user": ("شكرا @doctor", "شكرا [مستخدم]"),
    "tags": ("ألم<br />و<b>قيء</b>", "ألم و قيء"),
    "comparisons that look like a tag": ("النبض < 60 والضغط > 140", "النبض 140"),
    "Arabic-Indic digits": ("١٢٠", "120"),
    "repetition": ("ألممممم!!!!", "ألمم ! !"),
    "repeated digits": ("1000000", "1000000"),
    "punctuation": ("نعم،لا؟", "نعم ، لا ؟"),
    "decimals": ("5.5 و ٥٫٥", "5 . 5 و 5 ٫ 5"),
    "numbers and Arabic words": ("دواء10مجم", "دواء 10 مجم"),
    "numbers and Latin words": ("HbA1c 10mg", "HbA1c 10mg"),
    "brackets stay where they are": ("[مزمن](حاد)", "[مزمن] ( حاد )"),
    "slash": ("120/80", "120 - 80"),
    "ampersand": ("الفم & الأنف", "الفم الأنف"),
    "emoji": ("سعال 😷 قلب ❤️", "سعال قلب"),
    "presentation forms": ("ﺍﻟﺴﻼﻡ عليكم", "عليكم"),
    "Persian letters": ("پزشک", "زش"),
    "zero-width characters part words": ("ش\u200cرطة", "ش رطة"),
    "white space": (" سطر\n\tثان\u00a0 ", "سطر ثان"),
}


@pytest.mark.parametrize("text, expected", PREPROCESS.values(), ids=PREPROCESS)
def test_preprocess(text, expected):
    assert preprocess(text) == expected


UNPREPROCESS = {
    "punctuation": ("نعم ، لا ؟ ( أو ) .", "نعم، لا؟ (أو)."),
    "full stop without spaces": ("تحسن.ثم عاد", "تحسن. ثم عاد"),
    "decimals": ("5 . 5 و 5 , 5", "5.5 و 5,5"),
    "decimals in pairs": ("1 . 2 . 3", "1.2. 3"),
    "ranges": ("10 - 20", "10-20"),
    "quotation marks": ('" أ " ب " ج "', '"أ" ب "ج"'),
    "a quotation mark too many": ('" أ " ب " ج', '"أ" ب " ج'),
    "apostrophes": ("it ' s", "it ' s"),
    "a backslash nobody asked for": ("` أ ` — ب —", "\\`أ\\` \\—ب\\—"),
}


@pytest.mark.parametrize("text, expected", UNPREPROCESS.values(), ids=UNPREPROCESS)
def test_unpreprocess(text, expected):
    assert unpreprocess(text) == expected


@pytest.mark.parametrize("row", GOLDEN["texts"])
def test_unpreprocess_moves_nothing_but_spaces(row):
    out = preprocess(row["text"])
    assert out == " ".join(out.split())
    if not {"`", "—"} & set(out):  # the backslashes
        assert unpreprocess(out).replace(" ", "") == out.replace(" ", "")


def test_unpreprocess_of_many_spaces_is_fast():
    assert unpreprocess('"' + " " * 20_000) == '"'  # a model that repeats itself; cubic in the original


def test_one_long_word_is_fast():
    """What is left of a broken table; addresses and numbers are looked for once a word, not once a letter."""
    began = time.process_time()
    assert preprocess("سعال" * 10_000 + " @ ") == "سعال" * 10_000 + " @"
    assert time.process_time() - began < 0.5
