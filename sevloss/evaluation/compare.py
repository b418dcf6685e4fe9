"""Whether one run is better than another: bootstrap over rows that both answered, and over seeds where both were repeated.

Every resample draws n of the n rows with replacement (Efron 1979; for texts Koehn 2004), the same rows for both sides, all scores and all
groups. What the rows share, such as hard complaints, drops out of the difference.
"""

from typing import NamedTuple

import numpy as np

from sevloss.evaluation.scores import LOWER_IS_BETTER, NEITHER_IS_BETTER

FEWEST_ROWS = 20  # a 95% interval then covers 93% where differences are normal, 90% where they are exponential; of 5 rows 83% and 79%


class Comparison(NamedTuple):
    """Numbers or arrays. p is two-sided, not corrected for several comparisons; `holm` does that."""
    difference: np.ndarray  # of the second minus the first
    low: np.ndarray  # 95% interval
    high: np.ndarray
    p: np.ndarray


def paired_bootstrap(a, b, counts=None, weights=None, *, resamples=10_000, seed=0):
    """Comparison of two runs on the same rows: sum(w * b) / sum(w * counts) - sum(w * a) / sum(w * counts).

    a, b: (n,), or (n, k) for k scores; counts: shaped like them, (n,), or None for ones; weights: (n,), (n, g) for g groups, or None.
    Results have shape (), (k,), (g,) or (g, k). low and high are percentiles of the resampled differences, and
    p = 2 min(#(differences <= 0) + 1, #(differences >= 0) + 1) / (resamples + 1), at most 1. The three are nan for groups of fewer than
    FEWEST_ROWS rows with a weight.
    """
    return compare_settings(np.asarray(a)[None], np.asarray(b)[None], counts, weights, resamples=resamples, seed=seed)


def compare_settings(a, b, counts=None, weights=None, *, resamples=10_000, seed=0):
    """paired_bootstrap for settings that were trained with several seeds: a (s, n) or (s, n, k), b (t, n) or (t, n, k).

    Each side is its mean over seeds. With two or more seeds on both sides, seeds are resampled too, independently of the rows and of the
    other side; s - 1 of s are drawn, since with s their mean would vary too little, by (s - 1) / s (Rao and Wu 1988). Where seeds matter
    more than rows, a 95% interval still covers only about 80% with 2 seeds, 88% with 3, 94% with 5 (simulated).
    With one seed on a side rows alone are resampled, and the result is about these very runs, not about the settings.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n, k = a.shape[1], a[0, 0].size
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"a {a.shape} and b {b.shape} must have the same rows and scores")
    counts, weights = (np.ones(n) if x is None else np.asarray(x, dtype=np.float64) for x in (counts, weights))

    def columns(x):  # (n,) or (n, k) -> (n, g * k)
        return (weights.reshape(n, -1, 1) * np.broadcast_to(x.reshape(n, -1), (n, k))[:, None]).reshape(n, -1)

    total = columns(counts)
    sides = [b, -a] if len(a) > 1 and len(b) > 1 else [b.mean(0, keepdims=True) - a.mean(0, keepdims=True)]
    sides = [np.stack([columns(run) for run in side], axis=1) for side in sides]  # each (n, s, g * k)
    of_rows, of_seeds = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    chunk, draws = max(1, 2_000_000 // n), []
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may miss a small group
        difference = sum(side.sum(0).mean(0) for side in sides) / total.sum(0)
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            rows = of_rows.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            times = np.bincount(rows.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)  # how often each row was drawn
            draws.append(sum(_over_seeds(times, side, of_seeds) for side in sides) / (times @ total))
    draws = np.concatenate(draws)  # (resamples, g * k)
    enough = np.repeat((weights.reshape(n, -1) > 0).sum(0) >= FEWEST_ROWS, k) & np.isfinite(difference)
    draws[:, ~enough] = 0
    low, high = np.nanquantile(draws, (0.025, 0.975), axis=0)
    tail = np.minimum((draws <= 0).sum(0), (draws >= 0).sum(0))
    p = np.minimum(1, 2 * (tail + 1) / (np.isfinite(draws).sum(0) + 1))
    low, high, p = (np.where(enough, x, np.nan) for x in (low, high, p))
    return Comparison(*(x.reshape(weights.shape[1:] + a.shape[2:])[()] for x in (difference, low, high, p)))


def _over_seeds(times, side, rng):
    """Sums over the drawn rows, averaged over drawn seeds: times (c, n), side (n, s, m) -> (c, m)."""
    n, s, m = side.shape
    sums = (times @ side.reshape(n, s * m)).reshape(-1, s, m)
    if s == 1:
        return sums[:, 0]
    drawn = rng.multinomial(s - 1, np.full(s, 1 / s), size=len(times)) / (s - 1)  # (c, s)
    return np.einsum("cs,csm->cm", drawn, sums)


def bootstrap_mean(values, counts=None, weights=None, *, resamples=10_000, seed=0):
    """(mean, low, high) of one run with its 95% interval, from the same resamples; shapes as in paired_bootstrap."""
    return paired_bootstrap(np.zeros_like(values), values, counts, weights, resamples=resamples, seed=seed)[:3]


def seed_spread(means):
    """(mean, standard deviation) of the means (s, ...) of runs that differ in the seed alone; the latter with s - 1, nan for one run."""
    means = np.asarray(means, dtype=np.float64)
    return means.mean(0), means.std(0, ddof=1) if len(means) > 1 else np.full(means.shape[1:], np.nan)[()]


def holm(p_values):
    """p-values of comparisons that are read together, adjusted: the chance that any of them falls below 0.05 wrongly is at most 0.05
    (Holm 1979). nan stays nan and does not count as a comparison."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=None)  # nan last
    steps = np.maximum(np.isfinite(p).sum() - np.arange(p.size), 1)
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p.ravel()[order] * steps))
    return adjusted.reshape(p.shape)


def sentence(name_a, name_b, score, difference, interval, p, group="all"):
    """What a comparison says. difference: of b minus a; interval: (low, high); p: after Holm; below 0.05 counts as a difference."""
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
    low, high = (low, high) if difference > 0 else (-high, -low)
    return f"{name_b} is {word} than {name_a} in {where} by {abs(difference):.3g} (95% interval {low:.3g} to {high:.3g}, {chance})"
