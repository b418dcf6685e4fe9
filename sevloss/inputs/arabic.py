"""AraBERT's text preprocessing, and its undoing after generation.

bert-base-arabertv02 and aragpt2-base/-medium were trained on text that went through these steps, so text for
them has to go through the same ones, quirks included. The original is the Python package `arabert` (Antoun,
Baly and Hajj, 2020, https://github.com/aub-mind/arabert); tests/golden/arabic.json holds its outputs.
"""

import html
import re

_LETTERS = "\u0621-\u063a\u0641-\u064a"  # ء to غ and ف to ي
_HOST = "-a-zA-Z0-9@:%._+~#="
_PATH = "-a-zA-Z0-9_./~?=%&"

# Links, e-mail addresses and names become tokens of the models' vocabulary: "link", "mail", "user".
_LINKS = [
    # The lookahead says nothing new: it lets the search pass over Arabic text three times as fast.
    re.compile(rf"(?=[{_HOST}])(?:https?://.)?(?:www\.)?[{_HOST}]{{2,256}}\.[a-z]{{2,6}}\b[{_HOST}?&/]*"),
    re.compile(rf"https?://[{_PATH}]+"),
    re.compile(rf"www[{_PATH}]+"),
    re.compile(r"(?:(?<![a-zA-Z])|(?<=\.com))[a-zA-Z]++\.com"),  # without the first part, n² steps
    re.compile(r"http\S*"),
    re.compile(r"www\S*"),
    re.compile(r"://"),
]
_MAILS = [
    re.compile(r"(?<![\w-])[\w-]+@(?:[\w-]+\.)+[\w-]+"),  # few get here: a.b@c.com was taken for a link
    re.compile(r"(?<!\S)\S+@\S+"),
]
_NOT_KEPT = re.compile(
    rf"[^0-9a-zA-Z{_LETTERS}\s"
    "\u0653-\u065f"  # combining marks from madda on
    "\u0671-\u0674"  # ٱ and high hamza; Persian letters are not kept
    "\u06da\u0b4d"  # a Quranic pause mark, and a sign of the Oriya script
    r"""!"#$%'()*+,\-.:;<=>?@\[\\\]^_`{|}~"""  # ASCII but for & and /
    "٪٫٬،؛؟«»·–—‘’“”…]"
)
# The lookahead leaves one way to take the spaces apart; without it, a mark before n spaces costs n³ steps.
_QUOTED = r"{0}\s+(?=[^\s{0}]|\s\s{0})([^{0}]+)\s{0}"
_QUOTES = {'"': r'"\1"', "'": r"'\1'", "`": r"\\`\1\\`", "—": r"\\—\1\\—"}  # \\ as in the original


def preprocess(text: str) -> str:
    """The text as bert-base-arabertv02 and aragpt2 saw theirs: cleaned, punctuation spaced, on a single line.

    Source: AraBERT, package `arabert`, ArabertPreprocessor("bert-base-arabertv02").preprocess.

    >>> preprocess("ضغط الدمّ ١٢٠/٨٠، والسكر ٥.٥%!!!!")
    'ضغط الدم 120 - 80 ، والسكر 5 . 5 % ! !'
    """
    text = re.sub("&#[0-9]{1000,};?", "\ufffd", text)  # no character, and too long for Python's int
    text = html.unescape(text)  # 1. HTML entities, once: &amp;lt; becomes &lt;
    text = re.sub("[\u064b-\u0652\u0640]+", "", text)  # 2. diacritics: fathatan to sukun, 3. tatweel
    for pattern in _LINKS:  # 4. links, e-mail addresses, @names: one after the other
        text = pattern.sub(" [رابط] ", text)
    if "@" in text:  # few texts have one, and looking is cheaper than matching
        for pattern in _MAILS:
            text = pattern.sub(" [بريد] ", text)
        text = re.sub(r"@\w+", " [مستخدم] ", text)
    text = text.replace("<br />", " ")  # 5. tags; this one first, for it may stand in another: "<b <br /> c>"
    end = text.rfind(">") + 1  # no tag begins behind it, and looking for one costs n² steps
    text = re.sub(r"<[^>]+>", " ", text[:end]) + text[end:]
    for value, digit in enumerate("٠١٢٣٤٥٦٧٨٩"):  # 6. Arabic-Indic digits
        text = text.replace(digit, str(value))
    text = re.sub(r"(\D)\1\1+", r"\1\1", text)  # 7. three or more of the same become two, but for digits
    # 8. space around symbols, and between numbers and Arabic words
    text = re.sub(rf"[^0-9a-zA-Z{_LETTERS}\[\]\s]", r" \g<0> ", text)
    text = re.sub(rf"(?<![0-9])([0-9]++)([{_LETTERS}]+)", r" \1 \2 ", text)
    text = re.sub(rf"(?<![{_LETTERS}])([{_LETTERS}]++)([0-9]+)", r" \1 \2 ", text)
    text = text.replace("/", "-")  # 9. the vocabulary has no slash
    text = _NOT_KEPT.sub(" ", text)  # 10. emoji, presentation forms, invisible characters
    return " ".join(text.split())  # 11. white space


def unpreprocess(text: str) -> str:
    """Generated text as one would write it: without the spaces that preprocess put around punctuation.

    Source: AraBERT, package `arabert`, ArabertPreprocessor("bert-base-arabertv02").unpreprocess.

    >>> unpreprocess('ضغط الدم 120 - 80 ، والسكر " 5 . 5 % " !')
    'ضغط الدم 120-80، والسكر "5.5%"!'
    """
    for mark, replacement in _QUOTES.items():  # 1. inside quotation marks, paired from the left
        text = re.sub(_QUOTED.format(mark), replacement, text)
    text = " ".join(text.replace(".", " . ").split())  # 2. full stops apart: a model may leave out the spaces
    text = re.sub(r"(\d) \. (\d+)", r"\1.\2", text)  # 3. decimals, pairwise: 1 . 2 . 3 becomes 1.2 . 3
    text = re.sub(r"(\d) , (\d+)", r"\1,\2", text)
    # 4. no space around operators, before closing marks, after opening marks
    text = re.sub(r" ([-+<=>@\\^_|–]) ", r"\1", text)
    text = re.sub(r" ([!#$%),.:;?\]}٪’،؟”؛…»·])", r"\1", text)
    return re.sub(r"([(\[{“«‘*~]) ", r"\1", text)
