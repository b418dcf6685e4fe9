"""Scores of a language model on reference responses: the likelihood of the responses, and the texts of its
answers. Every score is of a row; findings.py averages the rows, all of them or a group.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF

from sevloss import data, distributed
from sevloss.evaluation.urgent import folded, urgent
from sevloss.severity import CLASSES

RATES = ("empty", "unfinished", "repetitive", "repeats complaint", "urgent")  # 0 or 1 in each row
CHRF2 = CHRF()  # Popović 2015
# Papineni et al. 2002, over the n-gram orders that the answer is long enough for: one of three words has no
# 4-gram, which must not make its score 0. sacrebleu's default tokenizer, 13a, splits at ASCII punctuation
# alone: to it "نعم،" and "نعم" are two words; "intl" splits at all punctuation, and not at diacritics.
SENTENCE_BLEU = BLEU(tokenize="intl", effective_order=True)


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
    labelled = any(row.severity is not None for row in rows)
    critical = "critical" if labelled else "predicted critical"
    non_critical = critical.replace("critical", "non-critical")
    if critical in groups and non_critical in groups:
        groups[f"{critical} minus {non_critical}"] = {
            "weights": groups[critical]["weights"], "minus": groups[non_critical]["weights"]}
    if not labelled and all(row.probabilities for row in rows):
        groups["by p(critical)"] = {"weights": np.array([row.probabilities[2] for row in rows])}
    for specialty in sorted(set(specialties) - {""}):
        groups[f"specialty: {specialty}"] = {"weights": (specialties == specialty).astype(float)}
    return groups


# --- answers ------------------------------------------------------------------------------------------------

def answer_scores(complaint, answer, reference, unfinished):
    """{score: value} of one answer. unfinished: it has no end. chrF and BLEU, 0 to 100, are of `folded`
    texts: models behind AraBERT's preprocessing cannot write diacritics, tatweel and Arabic digits."""
    answer_words = words(answer)
    return {
        "chrF": CHRF2.sentence_score(folded(answer), [folded(reference)]).score,
        "BLEU": SENTENCE_BLEU.sentence_score(folded(answer), [folded(reference)]).score,
        "ROUGE-L": rouge_l(answer_words, words(reference)),
        "words": len(answer_words),
        "empty": not answer_words,  # not a letter, not a digit
        "unfinished": unfinished,
        "repetitive": repetitive(answer_words),
        "repeats complaint": repeats_complaint(answer_words, words(complaint)),
        "urgent": urgent(answer),
    }


def words(text):
    """Runs of letters and digits of the folded text. Forms of alef, and ه and ة, ي and ى, stay different."""
    return re.findall(r"[^\W_]+", folded(text))


def rouge_l(answer, reference):
    """ROUGE-L of two lists of words, 0 to 1 (Lin 2004): F1 = 2 LCS / (length of the answer + of the
    reference), with the longest common subsequence. Of two empty ones 0."""
    reference = np.array(reference, dtype=object)
    longest = np.zeros(len(reference) + 1)  # a row of the textbook's table: of so many words of the reference
    for word in answer:
        longest[1:] = np.maximum.accumulate(np.maximum(longest[1:], longest[:-1] + (reference == word)))
    return 2 * longest[-1] / max(1, len(answer) + len(reference))


def repetitive(words):
    """Whether at least a fifth of the word 3-grams stood in the text before. Loops do that; of 2,971 real
    replies none did."""
    grams = _grams(words, 3)
    return len(grams) - len(set(grams)) >= max(1, len(grams) / 5)


def repeats_complaint(words, complaint):
    """Whether more than half of the words lie in word 5-grams that the complaint has as well. Never of a text
    under 5 words."""
    complaint_grams = set(_grams(complaint, 5))
    copied = set()  # positions of words
    for i, gram in enumerate(_grams(words, 5)):
        if gram in complaint_grams:
            copied.update(range(i, i + 5))
    return len(copied) > len(words) / 2


def _grams(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
