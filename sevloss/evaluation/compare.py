"""How sure a score is, or a difference of scores, when S runs with different seeds scored the same N rows.

Two-way random-effects layout, one observation a cell: score[s, i] = mean + seed[s] + row[i] + residual[s, i].
The mean over all cells has variance var(seed) / S + var(row) / N + var(residual) / (S N), estimated as
    V = seeds + max(0, rows - residual): the residual, which is in both of the others, counts once;
    seeds = s2(means of runs) / S,  rows = s2(means of rows) / N,  residual = MSE / (S N).
Degrees of freedom are Satterthwaite's (1946), but with S - 2 for S - 1, and never fewer than S - 1:
    df = V^2 / (seeds^2 / (S - 2) + rows^2 / (N - 1) + residual^2 / ((S - 1) (N - 1))).
With S - 1 the test finds up to 8% of equal settings different when S = 3, with S - 2 up to 5.5%.
A weighted mean (one over all tokens weighs each row by its tokens) or a difference of two groups is, to
first order, a constant plus a sum of one influence value per row (delta method). It stands where the mean has
(score[s, i] - mean) / N.
"""

import math
from typing import NamedTuple

import numpy as np

FEWEST_ROWS = 20  # a 95% interval then covers 95% of normal scores' means, 92% of exponential ones'
FEWEST_SEEDS = 3  # of fewer, nothing can be said about settings, only about these runs
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(100)


class Estimate(NamedTuple):
    """A score or a difference. low, high, error, df are nan for fewer than FEWEST_ROWS effective rows."""
    value: float
    low: float = math.nan  # 95% interval
    high: float = math.nan
    error: float = math.nan  # standard error, sqrt(V)
    df: float = math.nan
    rows: float = math.nan  # Kish's effective number; of two groups the smaller one
    seeds: int = 0  # that the interval includes beside the rows; 0: it is about these very runs
    p: float = math.nan  # two-sided, before `holm`; nan where nothing is tested
    sd_seeds: float = math.nan  # standard deviation between runs, where there are two or more


def estimate(values, weights=1.0, minus=None):
    """Estimate of the rows' weighted mean, averaged over runs. Below FEWEST_SEEDS runs V is s2(rows) / N.

    values: (S, N), or (N,) of one run; weights: (N,), 0 or more, or one number for all; minus: (N,) weights
    of a group whose score is subtracted: a contrast.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    scores, influence, rows = row_influence(values, weights)
    if minus is not None:
        other_scores, other_influence, other_rows = row_influence(values, minus)
        scores, influence, rows = scores - other_scores, influence - other_influence, min(rows, other_rows)
    value = float(scores.mean())
    seeds = len(values) if len(values) >= FEWEST_SEEDS else 0
    spread = float(scores.std(ddof=1)) if len(values) > 1 else math.nan
    if rows < FEWEST_ROWS:
        return Estimate(value, rows=rows, seeds=seeds, sd_seeds=spread)

    df = rows - 1
    variance = of_rows = float((influence.mean(0) ** 2).sum())
    if seeds:
        of_seeds = float(scores.var(ddof=1)) / seeds
        residual = float(((influence - influence.mean(0)) ** 2).sum()) / (seeds * (seeds - 1))
        variance = of_seeds + max(0.0, of_rows - residual)
        squares = of_seeds**2 / (seeds - 2) + of_rows**2 / df + residual**2 / ((seeds - 1) * df)
        df = max(seeds - 1.0, variance**2 / squares) if squares else df
    error = math.sqrt(variance)
    margin = student_quantile(0.05, df) * error
    return Estimate(value, value - margin, value + margin, error, df, rows, seeds, sd_seeds=spread)


def row_influence(values, weights):
    """(scores of the runs (S,), influence of the rows (S, N), Kish's effective number of rows n (1965)).

    A run's influence values add up to 0. With their factor, sqrt(n / (n - 1)), their squares add up to s2 / N
    for a mean. Where no row has a weight they and the scores are nan, and n is 0.
    """
    weights = weights * np.ones(values.shape[1])
    total = weights.sum() or math.nan
    n = float(weights.sum() ** 2 / ((weights**2).sum() or 1.0))
    scores = values @ weights / total
    influence = weights * (values - scores[:, None]) / total
    return scores, influence * math.sqrt(n / max(1.0, n - 1)), n


def paired_t(a, b, weights=1.0, minus=None):
    """Estimate of b's score minus a's, with p: the seed-paired t test. Other arguments as in `estimate`.

    a, b: (S, N). Run s of both has the same seed, and what rows and seeds do to both drops out. A plain
    checkpoint, which no seed made, is (1, N). Below FEWEST_SEEDS seeds p is nan.
    """
    result = estimate(np.atleast_2d(b) - np.atleast_2d(a), weights, minus)
    return result._replace(p=student_p(result.value, result.error, result.df)) if result.seeds else result


def rate(values, weights=1.0):
    """Estimate of the mean of scores that are 0 or 1, with Wilson's interval (1927): in [0, 1], never empty.

    Its z is the quantile of t, its n `rows` over the design effect (Kish 1965): V over the variance of
    independent rows. One row more in both makes that 1 where all scores are the same.
    """
    result = estimate(values, weights)
    n, spread = result.rows, result.value * (1 - result.value)
    design_effect = (1 + n * (n - 1) * result.error**2) / (1 + n * spread)
    ratio = student_quantile(0.05, result.df) ** 2 * design_effect / max(1.0, n)  # z^2 / n
    center, margin = result.value + ratio / 2, math.sqrt(ratio * (spread + ratio / 4))
    return result._replace(low=max(0.0, center - margin) / (1 + ratio), high=(center + margin) / (1 + ratio))


def detectable_difference(result, alpha=0.05):
    """The difference that has p < alpha in 80% of cases, given error and df: t_0.8 + t_(1 - alpha/2) errors.
    By the noncentral t distribution it is 80% from df = 9 on, 79% for 4, 77% for 2; as error and df are
    estimates, benchmarks/coverage.py finds 62 to 77%."""
    return (student_quantile(0.4, result.df) + student_quantile(alpha, result.df)) * result.error


def holm(p_values):
    """p-values of tests read together, adjusted: the chance that any falls below 0.05 wrongly is at most 0.05
    (Holm 1979). nan stays nan and does not count as a test."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)  # nan last
    steps = np.maximum(np.isfinite(p).sum() - np.arange(len(p)), 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * steps))
    return adjusted


def student_tail(angle, df):
    """P(T > sqrt(df) tan(angle)), up to a factor: the integral of cos^(df - 1) from angle to pi / 2, by
    Gauss-Legendre quadrature. p-values and quantiles are then exact to 1e-5 for df from 1 to 100,000."""
    half = (math.pi / 2 - angle) / 2
    return float(half * (NODE_WEIGHTS @ np.cos(angle + half * (1 + NODES)) ** (df - 1)))


def student_p(value, error, df):
    """Two-sided p-value of t = value / error; 1 for 0 / 0."""
    return student_tail(math.atan2(abs(value), math.sqrt(df) * error), df) / student_tail(0.0, df)


def student_quantile(p, df):
    """The t whose two-sided p-value is p: for p = 0.05 the 97.5% quantile."""
    angle, step, goal = 0.0, 1.0, p * student_tail(0.0, df)
    while step > 1e-9:  # Newton's method from the left: the tail falls and is convex, so no step goes too far
        step = (student_tail(angle, df) - goal) / math.cos(angle) ** (df - 1)
        angle += step
    return math.sqrt(df) * math.tan(angle)
