"""What an encoder has to beat: the majority class, and a linear model on character n-grams."""

import math
from collections import Counter

import torch
import torch.nn.functional as F

from sevloss.data import normalise


def majority_logits(targets, rows):
    """(rows, 3): the log shares of the classes among the training targets (n, 3)."""
    return targets.mean(0).clamp(min=1e-6).log().expand(rows, 3)


def linear_logits(texts, targets, others, *, strength=1.0):
    """Logistic regression on TF-IDF of character 2- to 5-grams, trained on texts and targets (n, 3): logits (m, 3) of each list
    in `others`. strength: of the L2 penalty, strength / 2 * |W|^2 beside the summed loss.
    """
    grams = [ngrams(text) for text in texts]
    frequency = Counter(gram for counts in grams for gram in counts)
    index = {gram: i for i, gram in enumerate(gram for gram, n in frequency.items() if n > 1)}
    idf = {gram: math.log((1 + len(texts)) / (1 + frequency[gram])) + 1 for gram in index}

    def bags(counts):
        """Per text its n-grams and their TF-IDF of length 1, laid end to end for embedding_bag."""
        ids, values, starts = [], [], []
        for one in counts:
            known = {gram: (1 + math.log(n)) * idf[gram] for gram, n in one.items() if gram in index}
            length = math.sqrt(sum(v * v for v in known.values())) or 1.0
            starts.append(len(ids))
            ids += [index[gram] for gram in known]
            values += [v / length for v in known.values()]
        return torch.tensor(ids, dtype=torch.long), torch.tensor(starts), torch.tensor(values)

    def logits(bag):
        ids, starts, values = bag
        return F.embedding_bag(ids, weight, starts, mode="sum", per_sample_weights=values) + bias  # (n, 3)

    weight, bias = torch.zeros(len(index), 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")
    train = bags(grams)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(train), targets, reduction="sum") + strength / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():
        return [logits(bags([ngrams(text) for text in other])) for other in others]


def ngrams(text):
    """Counter of the 2- to 5-grams of each word with its borders."""
    counts = Counter()
    for word in normalise(text).split():
        word = f" {word} "
        for n in range(2, 6):
            counts.update(word[i:i + n] for i in range(len(word) - n + 1))
    return counts
