"""Scores of a language model on reference responses: the likelihood of the responses, and the texts of its answers.

Every score is kept per row. The same numbers are then averaged over all rows, by class and weighted, and resampled in compare.py.
"""

import math
import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF

from sevloss import data
from sevloss.severity import CLASSES

# Of what is not named here, higher is better. How long an answer is, and whether it sends to emergency care, is neither good nor bad.
LOWER_IS_BETTER = ("NLL", "perplexity", "empty", "unfinished", "repetitive", "repeats complaint")
NEITHER_IS_BETTER = ("words", "urgent")


@torch.inference_mode()
def response_nll(model, examples, compute, *, indices=None, most_tokens=4096):
    """(n,) fp64: summed negative log-likelihood, in nats, of each example's targets; 0 for those not in `indices` (None: all)."""
    model.eval()
    total = torch.zeros(len(examples), dtype=torch.float64)
    with compute.autocast():
        for part in data.micro_batches(examples.input_lengths, range(len(examples)) if indices is None else indices, most_tokens):
            batch = data.make_batch(examples, part, compute.device)
            hidden = model(batch.tokens, batch.lengths)[batch.supervised_index]  # (S, D)
            nll = torch.cat([F.cross_entropy((h @ model.head_weight.T).float(), t, reduction="none")
                             for h, t in zip(hidden.split(512), batch.targets.split(512))])
            total[part] = torch.zeros(len(part), dtype=torch.float64).index_add_(0, batch.sequence.cpu(), nll.double().cpu())
    return total


def per_token(nll, tokens):
    """Sums over sums: {nll, perplexity} of the examples together; never a mean of means."""
    mean = float(nll.sum() / tokens.sum()) if len(tokens) else math.nan
    return {"nll": mean, "perplexity": perplexity(mean)}


def perplexity(nll):
    """e to the NLL per token; finite for any finite one."""
    return math.exp(min(nll, 700.0))


# --- means ----------------------------------------------------------------------------------------------------------------

@dataclass
class Score:
    """One score of n rows. values (n,): per row, or summed over the row's tokens; counts (n,): 1 each (None), or the row's tokens."""
    name: str
    values: np.ndarray
    counts: np.ndarray | None = None

    def __post_init__(self):
        self.values = np.asarray(self.values, dtype=np.float64)
        self.counts = np.ones_like(self.values) if self.counts is None else np.asarray(self.counts, dtype=np.float64)
        if self.values.ndim != 1 or self.values.shape != self.counts.shape:
            raise ValueError(f"{self.name}: values {self.values.shape} and counts {self.counts.shape} must both be (n,)")

    def mean(self, weights):
        """sum(w * values) / sum(w * counts), weights (n,): sums over sums. nan where the weights are all 0."""
        total = weights @ self.counts
        return float(weights @ self.values / total) if total else math.nan


def row_groups(classes, critical=None):
    """{name: weights (n,)}: "all"; each class that occurs; "by p(critical)", in which a row counts as much as it is critical.

    classes: n of 0, 1, 2 or None; critical: (n,) p_c of the rows, or None.
    """
    groups = {"all": np.ones(len(classes))}
    groups |= {name: np.array([float(c == i) for c in classes]) for i, name in enumerate(CLASSES) if i in classes}
    return groups if critical is None else groups | {"by p(critical)": np.asarray(critical, dtype=np.float64)}


def summary(scores, groups):
    """A list of Score, and weights as row_groups gives them -> {group: {name of the score: mean}}."""
    return {group: {score.name: score.mean(weights) for score in scores} for group, weights in groups.items()}


# --- answers --------------------------------------------------------------------------------------------------------------

def answer_scores(complaints, answers, references, unfinished):
    """Every score of n answers that texts alone give, as a list of Score. unfinished (n,): the answer has no end."""
    return [
        Score("chrF", chrf(answers, references)),
        Score("BLEU", bleu(answers, references)),
        Score("ROUGE-L", rouge_l(answers, references)),
        Score("words", [len(words(a)) for a in answers]),
        Score("empty", [not words(a) for a in answers]),  # not a letter, not a digit
        Score("unfinished", unfinished),
        Score("repetitive", [repetitive(a) for a in answers]),
        Score("repeats complaint", [repeats_complaint(a, c) for a, c in zip(answers, complaints, strict=True)]),
        Score("urgent", [urgent(a) for a in answers]),
    ]


# sacrebleu's default tokenizer, 13a, splits at ASCII punctuation alone: to it "نعم،" and "نعم" are two words. In data/sample.jsonl
# every fifteenth word of the responses keeps a mark that way, with "intl" none: it splits at all punctuation, and not at diacritics.
# effective_order: an answer of three words has no 4-gram, which must not make its score 0.
TOKENIZER = "intl"


def chrf(answers, references):
    """(n,) chrF2 of each row, 0 to 100 (Popović 2015; sacrebleu)."""
    score = CHRF()
    return np.array([score.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)])


def bleu(answers, references):
    """(n,) BLEU of each row, 0 to 100 (Papineni et al. 2002; sacrebleu), over the n-gram orders that the answer is long enough for."""
    score = BLEU(tokenize=TOKENIZER, effective_order=True)
    return np.array([score.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)])


def _letters(text, form):
    """In a Unicode normal form and lower case, without diacritics and tatweel."""
    return "".join(c for c in unicodedata.normalize(form, text).casefold() if c != "\u0640" and unicodedata.category(c) != "Mn")


def words(text):
    """Runs of letters and digits, in lower case, without diacritics and tatweel. Forms of alef, and ه and ة, ي and ى, stay different."""
    return re.findall(r"[^\W_]+", _letters(text, "NFKC"))


def rouge_l(answers, references):
    """(n,) ROUGE-L, 0 to 1 (Lin 2004): F1 = 2 LCS / (length of the answer + of the reference), in `words`. Of two empty texts 0."""
    def f1(a, r):
        return 2 * longest_common_subsequence(a, r) / max(1, len(a) + len(r))
    return np.array([f1(words(a), words(r)) for a, r in zip(answers, references, strict=True)])


def longest_common_subsequence(a, b):
    """Its length, for two lists. A row of the textbook's table is one integer: bit i is 0 where the row grows at a[i] (Hyyrö 2004)."""
    places, ones = {}, (1 << len(a)) - 1
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = ones
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & ones
    return len(a) - row.bit_count()


def _grams(text, n):
    w = words(text)
    return [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]


def repetitive(text):
    """Whether at least a fifth of the word 3-grams stood in the text before. Loops do that; of 2,971 real replies none did."""
    grams = _grams(text, 3)
    return len(grams) - len(set(grams)) >= max(1, len(grams) / 5)


def repeats_complaint(text, complaint):
    """Whether more than half of the words lie in word 5-grams that the complaint has as well. Never of a text under 5 words."""
    there = set(_grams(complaint, 5))
    copied = {i + k for i, gram in enumerate(_grams(text, 5)) if gram in there for k in range(5)}
    return len(copied) > len(words(text)) / 2


# What counts as sending to emergency care, in the spelling of _folded: ا for أ إ آ, ي for ى ئ, و for ؤ, ه for ة, no ء, and " . " for
# punctuation. Modern Standard Arabic and the dialects of the sample. Up to three words may lie between a place and its haste.
_PREFIX = "[وف]?(?:ال|لل|[بكعف]ال|[لبعف])?"
_HOSPITAL, _DOCTOR = "(?:مستشفي|مشفي|سبيطار)", "(?:طبيب|دكتور|حكيم)[كه]?"
_HASTE = "(?:فورا|حالا|بسرعه|عاجلا|بشكل عاجل|علي الفور|في الحال|(?:ب|في |ف )اسرع وقت|(?:بلا|دون|بدون|من غير) (?:تاخير|تاجيل))"
_NOW = f"(?:الان|دلوقتي?|هسه|الحين|هلق|هلا|دابا|دروك|توا|دغري|{_HASTE})"
_BETWEEN = r"(?: \w+){0,3} "
EMERGENCY = (
    f"{_PREFIX}(?:طواري|طوراي|مستعجلات|استعجالات|اسعاف(?! (?:ال)?اولي))",  # طوراي: a frequent slip; اسعاف اولي is first aid
    f"{_PREFIX}(?:حمايه|وقايه) المدنيه", f"{_PREFIX}مركز (?:ال)?سموم", f"[وفلب]?اقرب {_HOSPITAL}",
    f"{_PREFIX}{_HOSPITAL}{_BETWEEN}{_NOW}", f"{_NOW}{_BETWEEN}{_PREFIX}{_HOSPITAL}",
    f"{_PREFIX}{_DOCTOR}{_BETWEEN}{_HASTE}", f"{_HASTE}{_BETWEEN}{_PREFIX}{_DOCTOR}",
    rf"[وفت]?(?:توجه|اذهب|راجع|اكشف)\w{{0,2}} {_HASTE}",
    r"[وفلي]{0,2}(?:[اتين]?تصل|كلم|عيط)\w*(?: \w+){0,3} ب?(?:101|110|112|122|123|140|150|190|911|99[789])",
)
# What takes it back, just before: "no need to go to", "is no case for", or that the emergency injection or plan is meant.
_NO_NEED = (r"(?:لا|ليس|ليست|لست|مش|مو|مب|ما|ما في|مفيش|مافيش|مافي|ماكو|ملوش|ملهاش) "
            r"(?:داعي?|ب?حاجه|ضروره|لزوم|محتاج\w*|[تيان]حتاج\w*|[تي]ستدعي|[تي]ستلزم|حاله)|(?:مش|مو|مب) لازم|ما?[تين]حتاج\w*")
_GOING = r"(?: (?:الي|علي|ع|في|اي|ان|[تني](?:روح|ذهب)\w*|(?:ال|لل|ل)?(?:ذهاب|توجه|روحه|زياره|مراجعه|اتصال|طلب)|حاله|قسم)){0,4}"
_NOT = f"(?:[وف]?(?:{_NO_NEED}){_GOING}|خطه|حقنه|ابره|دوا|حبوب|حقيبه) "
_EMERGENCY = re.compile(rf"\b(?P<not>{_NOT})?(?:{'|'.join(EMERGENCY)})\b")


def _folded(text):
    letters = _letters(text, "NFKD").translate(str.maketrans("ىةٱ٠١٢٣٤٥٦٧٨٩", "يها0123456789", "ء"))  # NFKD: the hamza is a mark of its own
    return " ".join(re.sub(r"[^\w\s]+|\n", " . ", letters).split())


def urgent(text):
    """Whether the text sends to emergency care: an expression of EMERGENCY that is not taken back ("لا داعي للطوارئ").

    A condition counts ("إذا زاد الألم فاذهب إلى الطوارئ"), so does a report ("كنت في الطوارئ أمس"). Denials in other words are not seen.
    A hospital or a doctor alone is not enough: it takes haste, or the nearest hospital. Whether the advice is right, this cannot say.
    """
    return any(not match["not"] for match in _EMERGENCY.finditer(_folded(text)))
