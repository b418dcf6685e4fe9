"""AraBERT's text preprocessing, and its undoing after generation.

bert-base-arabertv02 and aragpt2-base/-medium were trained on text that went through these steps, so text for them has to go through
the same ones, quirks included. The original is AraBERT's Python package `arabert` (Antoun, Baly and Hajj, 2020,
https://github.com/aub-mind/arabert); tests/golden/arabic.json holds its outputs.
"""

import html
import re
from functools import lru_cache

_LETTERS = "\u0621-\u063a\u0641-\u064a"  # ء to غ and ف to ي
_HOST = "-a-zA-Z0-9@:%._+~#="
_PATH = "-a-zA-Z0-9_./~?=%&"
_LINK, _MAIL, _USER = " [رابط] ", " [بريد] ", " [مستخدم] "  # "link", "mail", "user": tokens of the models' vocabulary

# Rules are (needle, pattern, replacement). Without the needle the pattern cannot match: most texts have none, and looking is cheaper.
# In the first pattern the lookahead is for speed too.
_ADDRESSES = [
    (".", re.compile(rf"(?=[{_HOST}])(?:https?://.)?(?:www\.)?[{_HOST}]{{2,256}}\.[a-z]{{2,6}}\b[{_HOST}?&/]*"), _LINK),
    ("http", re.compile(rf"https?://[{_PATH}]+"), _LINK),
    ("www", re.compile(rf"www[{_PATH}]+"), _LINK),
    (".com", re.compile(r"[a-zA-Z]+\.com"), _LINK),
    ("http", re.compile(r"http\S*"), _LINK),
    ("www", re.compile(r"www\S*"), _LINK),
    ("://", re.compile(r"://"), _LINK),
    ("@", re.compile(r"[\w-]+@(?:[\w-]+\.)+[\w-]+"), _MAIL),  # few get here: the first pattern takes a.b@c.com for a link
    ("@", re.compile(r"\S+@\S+"), _MAIL),
    ("@", re.compile(r"@\w+"), _USER),
]
_MARKS = re.compile("[\u064b-\u0652\u0640]+")  # fathatan to sukun, and tatweel
_TAG = re.compile(r"<[^>]+>")
_ARABIC_NUMBER = re.compile("[\u0660-\u0669]+")  # ٠ to ٩
_ARABIC_TO_ASCII = str.maketrans("٠١٢٣٤٥٦٧٨٩", "0123456789")
_REPEATED = re.compile(r"(\D)\1\1+")
_SYMBOL = re.compile(rf"[^0-9a-zA-Z{_LETTERS}\[\]\s]")
_DIGIT = re.compile("[0-9]")
_NUMBER_WORD = re.compile(rf"([0-9]+)([{_LETTERS}]+)")
_WORD_NUMBER = re.compile(rf"([{_LETTERS}]++)([0-9]+)")
_NOT_KEPT = re.compile(
    rf"[^0-9a-zA-Z{_LETTERS}\s"
    "\u0653-\u065f"  # combining marks from madda on
    "\u0671-\u0674"  # ٱ and high hamza; Persian letters are not kept
    "\u06da\u0b4d"  # a Quranic pause mark, and a sign of the Oriya script
    r"""!"#$%'()*+,\-.:;<=>?@\[\\\]^_`{|}~"""  # ASCII but for & and /
    "٪٫٬،؛؟«»·–—‘’“”…]"
)


def _quoted(mark):
    # The lookahead leaves one way to take the spaces apart. Without it, a mark before n spaces costs n³ steps.
    return re.compile(rf"{mark}\s+(?=[^\s{mark}]|\s\s{mark})([^{mark}]+)\s{mark}")


_QUOTES = [
    ('"', _quoted('"'), r'"\1"'),
    ("'", _quoted("'"), r"'\1'"),
    ("`", _quoted("`"), r"\\`\1\\`"),  # the backslashes, here and below, are the original's
    ("—", _quoted("—"), r"\\—\1\\—"),
]
_DECIMALS = [
    (" . ", re.compile(r"(\d) \. (\d+)"), r"\1.\2"),
    (" , ", re.compile(r"(\d) , (\d+)"), r"\1,\2"),
]
_SPACE_AROUND = re.compile(r" ([-+<=>@\\^_|–]) ")
_SPACE_BEFORE = re.compile(r" ([!#$%),.:;?\]}٪’،؟”؛…»·])")
_SPACE_AFTER = re.compile(r"([(\[{“«‘*~]) ")


def _apply(rules, text):
    for needle, pattern, replacement in rules:
        if needle in text:
            text = pattern.sub(replacement, text)
    return text


def preprocess(text: str) -> str:
    """The text as bert-base-arabertv02 and aragpt2 saw theirs: cleaned, punctuation spaced, on a single line.

    Source: AraBERT, package `arabert`, ArabertPreprocessor("bert-base-arabertv02").preprocess.

    >>> preprocess("ضغط الدمّ ١٢٠/٨٠، والسكر ٥.٥%!!!!")
    'ضغط الدم 120 - 80 ، والسكر 5 . 5 % ! !'
    """
    if "&" in text or "<" in text or (":" in text and "/" in text):  # what &lt;, < and https:// begin may end in a later word
        return _steps(text)
    return " ".join(filter(None, map(_steps_of_word, text.split())))


def _steps(text):
    text = html.unescape(text)  # 1. HTML entities, once: &amp;lt; becomes &lt;
    text = _MARKS.sub("", text)  # 2. diacritics, 3. tatweel
    text = _apply(_ADDRESSES, text)  # 4. links, e-mail addresses, @names: one after the other
    if "<" in text:  # 5. tags; line breaks first, or the outer tag of "<b <br /> c>" would end inside
        text = _TAG.sub(" ", text.replace("<br />", " "))
    text = _ARABIC_NUMBER.sub(lambda number: number[0].translate(_ARABIC_TO_ASCII), text)  # 6. Arabic-Indic digits
    text = _REPEATED.sub(r"\1\1", text)  # 7. three or more of the same become two, but for digits
    text = _SYMBOL.sub(r" \g<0> ", text)  # 8. space around symbols, and between numbers and Arabic words
    if _DIGIT.search(text):
        text = _NUMBER_WORD.sub(r" \1 \2 ", text)
        text = _WORD_NUMBER.sub(r" \1 \2 ", text)
    text = text.replace("/", "-")  # 9. the vocabulary has no slash
    text = _NOT_KEPT.sub(" ", text)  # 10. emoji, presentation forms, invisible characters
    return " ".join(text.split())  # 11. white space


_steps_of_word = lru_cache(2 ** 17)(_steps)  # words come again and again: a large table takes half the time


def unpreprocess(text: str) -> str:
    """Generated text as one would write it: without the spaces that preprocess put around punctuation.

    Source: AraBERT, package `arabert`, ArabertPreprocessor("bert-base-arabertv02").unpreprocess.

    >>> unpreprocess('ضغط الدم 120 - 80 ، والسكر " 5 . 5 % " !')
    'ضغط الدم 120-80، والسكر "5.5%"!'
    """
    text = _apply(_QUOTES, text)  # 1. inside quotation marks, paired from the left
    text = " ".join(text.replace(".", " . ").split())  # 2. full stops apart: a model may leave out their spaces
    text = _apply(_DECIMALS, text)  # 3. decimals, pairwise: 1 . 2 . 3 becomes 1.2 . 3
    text = _SPACE_AROUND.sub(r"\1", text)  # 4. around operators, before closing marks, after opening marks
    text = _SPACE_BEFORE.sub(r"\1", text)
    return _SPACE_AFTER.sub(r"\1", text)
