"""What an encoder has to beat: the majority class, and a linear model on character n-grams."""

import math
from collections import Counter

import torch
import torch.nn.functional as F

from sevloss.data import normalise


def majority_logits(targets, rows):
    """(rows, 3): the log shares of the classes among the training targets (n, 3)."""
    return targets.mean(0).clamp(min=1e-6).log().expand(rows, 3)


def linear_logits(texts, targets, others):
    """Logistic regression on TF-IDF of character 2- to 5-grams, trained on texts (n) and targets (n, 3) with
    an L2 penalty of |W|^2 / 2 beside the summed loss. others: lists of m texts -> list of (m, 3) logits."""
    # The n-grams that occur in two texts or more, and the inverse document frequency of each
    counts = [ngrams(text) for text in texts]
    frequency = Counter(gram for count in counts for gram in count)
    idf = {gram: math.log((1 + len(texts)) / (1 + n)) + 1 for gram, n in frequency.items() if n > 1}
    index = {gram: i for i, gram in enumerate(idf)}

    def bags(counts):
        """The n-grams of each text and their TF-IDF, of length 1, laid end to end for embedding_bag."""
        ids, starts, values = [], [], []
        for count in counts:
            tf_idf = {gram: (1 + math.log(n)) * idf[gram] for gram, n in count.items() if gram in idf}
            length = math.hypot(*tf_idf.values())
            starts.append(len(ids))
            ids += [index[gram] for gram in tf_idf]
            values += [value / length for value in tf_idf.values()]
        return torch.tensor(ids, dtype=torch.long), torch.tensor(starts), torch.tensor(values)

    def logits(ids, starts, values):
        return F.embedding_bag(ids, weight, starts, mode="sum", per_sample_weights=values) + bias  # (n, 3)

    weight = torch.zeros(len(idf), 3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")
    train = bags(counts)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(*train), targets, reduction="sum") + weight.square().sum() / 2
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():
        return [logits(*bags(map(ngrams, other))) for other in others]


def ngrams(text):
    """Counter of the 2- to 5-grams of each word with its borders."""
    counts = Counter()
    for word in normalise(text).split():
        word = f" {word} "
        for n in range(2, 6):
            counts.update(word[i:i + n] for i in range(len(word) - n + 1))
    return counts
