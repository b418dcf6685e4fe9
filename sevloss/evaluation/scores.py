"""Scores of a language model on reference responses: the likelihood of the responses, and the texts of its
answers.

Every score is kept per row. findings.py averages the rows, all of them or a group.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF

from sevloss import data, distributed
from sevloss.evaluation.urgent import folded, urgent
from sevloss.severity import CLASSES

RATES = ("empty", "unfinished", "repetitive", "repeats complaint", "urgent")  # 0 or 1 in each row


@torch.no_grad()  # in inference mode autocast would cast the weights to 16 bits anew for every batch
def response_nll(model, examples, compute, *, indices=None, most_tokens=4096):
    """(n,) fp64 on the CPU: the negative log-likelihood, in nats, of each example's targets, summed over
    them; 0 for those not in `indices` (None: all). most_tokens: of a forward pass."""
    model.eval()
    order, sums = [], []
    indices = range(len(examples)) if indices is None else indices
    with compute.autocast():
        for part in distributed.micro_batches(examples.input_lengths, indices, most_tokens):
            batch = data.make_batch(examples, part, compute.device)
            hidden = model(batch.tokens, batch.lengths).index_select(0, batch.supervised_index)  # (S, D)
            nll = torch.zeros(len(part), dtype=torch.float64, device=compute.device)
            chunks = zip(hidden.split(512), batch.targets.split(512), batch.sequence.split(512))
            for h, targets, sequence in chunks:  # not all logits at once
                logits = F.linear(h, model.head_weight).float()  # (512, V)
                nll.index_add_(0, sequence, F.cross_entropy(logits, targets, reduction="none").double())
            order += part
            sums.append(nll)
    total = torch.zeros(len(examples), dtype=torch.float64)
    if order:
        total[order] = torch.cat(sums).cpu()  # once, so that the device never waits
    return distributed.add_up(total)


def per_token(nll, tokens):
    """Sums over sums: {nll, perplexity} of the examples together; never a mean of means."""
    mean = float(nll.sum() / tokens.sum()) if len(tokens) else math.nan
    return {"nll": mean, "perplexity": math.exp(min(mean, 700.0))}


# --- groups of rows -----------------------------------------------------------------------------------------

def row_groups(rows):
    """{name: arguments of compare.estimate, weights (n,) among them}: "all"; each class; the contrast of
    critical minus non-critical rows; each specialty. rows: findings.Answer. Predicted classes are groups of
    their own, and have no part in the contrast where any row has a label. Where none has, there is also "by
    p(critical)": a row counts as much as it is critical."""
    names = np.array([row.class_name for row in rows])
    specialties = np.array([row.specialty for row in rows])
    groups = {"all": {"weights": np.ones(len(rows))}}
    for name in (*CLASSES, *(f"predicted {name}" for name in CLASSES)):
        if name in names:
            groups[name] = {"weights": (names == name).astype(float)}
    labelled = bool(set(CLASSES) & groups.keys())
    critical, non_critical = (("" if labelled else "predicted ") + CLASSES[i] for i in (2, 0))
    if critical in groups and non_critical in groups:
        groups[f"{critical} minus {non_critical}"] = {
            "weights": groups[critical]["weights"], "minus": groups[non_critical]["weights"]}
    if not labelled and all(row.probabilities for row in rows):
        groups["by p(critical)"] = {"weights": np.array([row.probabilities[2] for row in rows])}
    for specialty in sorted(set(specialties) - {""}):
        groups[f"specialty: {specialty}"] = {"weights": (specialties == specialty).astype(float)}
    return groups


# --- answers ------------------------------------------------------------------------------------------------

def answer_scores(complaints, answers, references, unfinished):
    """{score: (n,)}: every score of n answers that texts alone give. unfinished (n,): the answer has no end.
    chrF, BLEU and ROUGE-L are of `folded` texts: models behind AraBERT's preprocessing cannot write
    diacritics, tatweel and the Arabic shapes of digits."""
    folded_answers = [folded(a) for a in answers]
    folded_references = [folded(r) for r in references]
    scores = {
        "chrF": chrf(folded_answers, folded_references),
        "BLEU": bleu(folded_answers, folded_references),
        "ROUGE-L": rouge_l(answers, references),
        "words": [len(words(a)) for a in answers],
        "empty": [not words(a) for a in answers],  # not a letter, not a digit
        "unfinished": unfinished,
        "repetitive": [repetitive(a) for a in answers],
        "repeats complaint": [repeats_complaint(a, c) for a, c in zip(answers, complaints, strict=True)],
        "urgent": [urgent(a) for a in answers],
    }
    return {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}


# sacrebleu's default tokenizer, 13a, splits at ASCII punctuation alone: to it "نعم،" and "نعم" are two words.
# In data/sample.jsonl every fifteenth word of the responses keeps a mark that way, with "intl" none: it
# splits at all punctuation, and not at diacritics.
TOKENIZER = "intl"


def chrf(answers, references):
    """(n,) chrF2 of each row, 0 to 100 (Popović 2015; sacrebleu)."""
    score = CHRF()
    return np.array([score.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)])


def bleu(answers, references):
    """(n,) BLEU of each row, 0 to 100 (Papineni et al. 2002; sacrebleu), over the n-gram orders that the
    answer is long enough for: an answer of three words has no 4-gram, which must not make its score 0."""
    score = BLEU(tokenize=TOKENIZER, effective_order=True)
    return np.array([score.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)])


def words(text):
    """Runs of letters and digits of the folded text. Forms of alef, and ه and ة, ي and ى, stay different."""
    return re.findall(r"[^\W_]+", folded(text))


def rouge_l(answers, references):
    """(n,) ROUGE-L, 0 to 1 (Lin 2004): F1 = 2 LCS / (length of the answer + of the reference), in `words`. Of
    two empty texts 0."""
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        a, r = words(answer), words(reference)
        scores.append(2 * longest_common_subsequence(a, r) / max(1, len(a) + len(r)))
    return np.array(scores)


def longest_common_subsequence(a, b):
    """Its length, for two lists. A row of the textbook's table is one integer: bit i is 0 where the row grows
    at a[i] (Hyyrö 2004)."""
    places = {}  # word -> bits of its positions in a
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    ones = (1 << len(a)) - 1
    row = ones
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & ones
    return len(a) - row.bit_count()


def _grams(text, n):
    w = words(text)
    return [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]


def repetitive(text):
    """Whether at least a fifth of the word 3-grams stood in the text before. Loops do that; of 2,971 real
    replies none did."""
    grams = _grams(text, 3)
    return len(grams) - len(set(grams)) >= max(1, len(grams) / 5)


def repeats_complaint(text, complaint):
    """Whether more than half of the words lie in word 5-grams that the complaint has as well. Never of a text
    under 5 words."""
    complaint_grams = set(_grams(complaint, 5))
    copied = set()  # positions of words
    for i, gram in enumerate(_grams(text, 5)):
        if gram in complaint_grams:
            copied.update(range(i, i + 5))
    return len(copied) > len(words(text)) / 2
