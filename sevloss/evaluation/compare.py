"""Whether one run is better than another: bootstrap over rows that both answered, and over seeds where both
were repeated.

Every resample draws n of the n rows with replacement (Efron 1979; for texts Koehn 2004), the same rows for
both sides, all scores and all groups. What the rows share, such as hard complaints, drops out of the
difference.
"""

from typing import NamedTuple

import numpy as np

from sevloss.evaluation.scores import LOWER_IS_BETTER, NEITHER_IS_BETTER

# A 95% interval then covers 93% where differences are normal, 90% where they are exponential; of 5 rows 83%
# and 79%.
FEWEST_ROWS = 20


class Comparison(NamedTuple):
    """Numbers or arrays. p is two-sided, not corrected for several comparisons; `holm` does that."""
    difference: np.ndarray  # of the second minus the first
    low: np.ndarray  # 95% interval
    high: np.ndarray
    p: np.ndarray


def compare_settings(a, b, counts=None, weights=None, *, resamples=10_000, seed=0):
    """Comparison of sum(w * b) / sum(w * counts) with sum(w * a) / sum(w * counts).

    a: (s, n), or (s, n, k) for k scores, of a setting that was trained with s seeds; b: (t, n) or (t, n, k);
    counts: (n,) or (n, k), or None for ones; weights: (n,), or (n, g) for g groups, or None. Results have
    shape (), (k,), (g,) or (g, k). low and high are percentiles of the resampled differences, and p = 2
    min(#(differences <= 0) + 1, #(differences >= 0) + 1) / (resamples + 1), at most 1. The three are nan for
    groups of fewer than FEWEST_ROWS rows with a weight.

    Each side is its mean over seeds. With two or more seeds on both sides, seeds are resampled too,
    independently of the rows and of the other side; s - 1 of s are drawn, since with s their mean would vary
    too little, by (s - 1) / s (Rao and Wu 1988). Where seeds matter more than rows, a 95% interval still
    covers only about 80% with 2 seeds, 88% with 3, 94% with 5 (simulated). With one seed on a side rows alone
    are resampled, and the result is about these very runs, not about the settings.
    """
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"a {a.shape} and b {b.shape} must have the same rows and scores")
    n = a.shape[1]
    counts = np.ones(n) if counts is None else np.asarray(counts, dtype=np.float64)
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    shape = weights.shape[1:] + a.shape[2:]  # of the results

    # A column for each group and score: values times weights, of each run of a side, and counts times weights
    a = a.reshape(len(a), n, -1)  # (s, n, k)
    b = b.reshape(len(b), n, -1)  # (t, n, k)
    k = a.shape[2]
    weights = weights.reshape(n, -1)  # (n, g)
    if len(a) == 1 or len(b) == 1:
        sides = [b.mean(0, keepdims=True) - a.mean(0, keepdims=True)]
    else:
        sides = [b, -a]
    sides = [_columns(side, weights) for side in sides]  # each (n, s, g * k)
    total = _columns(np.broadcast_to(counts.reshape(1, n, -1), (1, n, k)), weights)[:, 0]  # (n, g * k)

    # Resamples, as many at a time as memory allows
    row_rng = np.random.default_rng([seed, 0])
    seed_rng = np.random.default_rng([seed, 1])
    chunk = max(1, 2_000_000 // n)
    draws = []
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may miss a small group
        difference = sum(side.sum(0).mean(0) for side in sides) / total.sum(0)
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            rows = row_rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            times = np.bincount(rows.ravel(), minlength=size * n)  # how often each row was drawn
            times = times.reshape(size, n).astype(np.float64)
            sums = sum(_over_seeds(times, side, seed_rng) for side in sides)
            draws.append(sums / (times @ total))
    draws = np.concatenate(draws)  # (resamples, g * k)

    # Percentiles and p, of groups that are large enough
    enough = np.repeat((weights > 0).sum(0) >= FEWEST_ROWS, k) & np.isfinite(difference)
    draws[:, ~enough] = 0
    low, high = np.nanquantile(draws, (0.025, 0.975), axis=0)
    tail = np.minimum((draws <= 0).sum(0), (draws >= 0).sum(0))
    p = np.minimum(1, 2 * (tail + 1) / (np.isfinite(draws).sum(0) + 1))
    for x in (low, high, p):
        x[~enough] = np.nan
    return Comparison(*(x.reshape(shape)[()] for x in (difference, low, high, p)))


def _columns(side, weights):
    """side (s, n, k), weights (n, g) -> their products, (n, s, g * k)."""
    s, n, k = side.shape
    return np.einsum("snk,ng->nsgk", side, weights).reshape(n, s, -1)


def _over_seeds(times, side, rng):
    """Sums over the drawn rows, averaged over drawn seeds: times (c, n), side (n, s, m) -> (c, m)."""
    n, s, m = side.shape
    sums = (times @ side.reshape(n, s * m)).reshape(-1, s, m)
    if s == 1:
        return sums[:, 0]
    drawn = rng.multinomial(s - 1, np.full(s, 1 / s), size=len(times)) / (s - 1)  # (c, s)
    return np.einsum("cs,csm->cm", drawn, sums)


def bootstrap_mean(values, counts=None, weights=None, *, resamples=10_000, seed=0):
    """(mean, low, high) of values (s, n) or (s, n, k), with the 95% interval over rows; else as
    compare_settings."""
    values = np.asarray(values)
    zeros = np.zeros_like(values[:1])
    return compare_settings(zeros, values, counts, weights, resamples=resamples, seed=seed)[:3]


def seed_spread(means):
    """Standard deviation, with s - 1, of the means (s, ...) of runs that differ in the seed alone; nan for
    one run."""
    means = np.asarray(means, dtype=np.float64)
    if len(means) == 1:
        return np.full(means.shape[1:], np.nan)
    return means.std(0, ddof=1)


def holm(p_values):
    """p-values of comparisons that are read together, adjusted: the chance that any of them falls below 0.05
    wrongly is at most 0.05 (Holm 1979). nan stays nan and does not count as a comparison."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=None)  # nan last
    steps = np.maximum(np.isfinite(p).sum() - np.arange(p.size), 1)
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p.ravel()[order] * steps))
    return adjusted.reshape(p.shape)


def sentence(name_a, name_b, score, difference, interval, p, group="all"):
    """What a comparison says. difference: of b minus a; interval: (low, high); p: after Holm; below 0.05
    counts as a difference."""
    low, high = interval
    where = score if group == "all" else f"{score} ({group})"
    if not np.isfinite(p):
        return f"{name_b} and {name_a} are not compared in {where}: fewer than {FEWEST_ROWS} rows"
    chance = "p < 0.001 after Holm" if p < 0.001 else f"p = {p:.2g} after Holm"
    if p >= 0.05:
        return (f"{name_b} and {name_a} are not distinguishable in {where} (difference {difference:.3g}, "
                f"95% interval {low:.3g} to {high:.3g}, {chance})")
    if score in NEITHER_IS_BETTER:
        word = "higher" if difference > 0 else "lower"
    else:
        word = "better" if (difference > 0) != (score in LOWER_IS_BETTER) else "worse"
    if difference < 0:  # the sentence says "by how much", without a sign
        low, high = -high, -low
    return (f"{name_b} is {word} than {name_a} in {where} by {abs(difference):.3g} "
            f"(95% interval {low:.3g} to {high:.3g}, {chance})")
