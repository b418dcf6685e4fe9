"""How often compare.py is wrong: settings that differ by chance alone, simulated again and again.

    python benchmarks/coverage.py [--repetitions 10000] [--seeds 3 5 10] [--rows 30 90 260]
                                  [--correlations 0 0.6 0.9]

Two settings are trained with the same seeds and score the same rows. A row's NLL per token is the sum of
    what the row costs every run      3 on average, standard deviation 0.6, skewed to the right
    what the setting does to it       0 on average, 0.035 / sqrt(tokens / 60), the same with every seed
    what the seed does to all rows    0.016, correlated between the settings
    ... and to critical rows          0.002, independent between the settings
    a residual                        0.035 / sqrt(tokens / 60)
and the tokens are log-normal, around 60. With a correlation of 0.6 the difference of the settings spreads by
0.014 over seeds, that of their contrasts by 0.003: as on real rows. Scores: the mean over rows; the ratio of
summed NLL to summed tokens; the contrast of so many critical rows with 260 others. (In the first two all rows
are critical.)

type I      how often paired_t has p < 0.05; in brackets for one seed, if taken for the settings
coverage    of the 95% interval of one setting
detectable  what detectable_difference gives, the median; and the power at this difference
seeds       the part of the difference's variance that seeds make: near 0 rows dominate, near 1 seeds

The second table is the coverage of 95% intervals of rates, by rate() and by estimate(). Each row has a
rate of its own, from a beta distribution: half of the variance is between rows.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sevloss.evaluation import compare  # noqa: E402

SEED, SEED_CRITICAL, ROW, RESIDUAL = 0.016, 0.002, 0.035, 0.035  # standard deviations


def simulate(random, critical, seeds, correlation):
    """NLL per token of settings a and b, each (S, N), and tokens (N,). critical: (N,) of 0 and 1."""
    n = len(critical)
    tokens = np.ceil(60 * random.lognormal(0, 0.5, n))
    cost = 1.2 + 0.2 * random.gamma(9, size=n)
    common = random.normal(size=(seeds, 1))
    settings = []
    for _ in "ab":
        seed = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * random.normal(size=(seeds, 1))
        of_critical = SEED_CRITICAL * random.normal(size=(seeds, 1)) * critical
        noise = ROW * random.normal(size=n) + RESIDUAL * random.normal(size=(seeds, n))
        settings.append(cost + SEED * seed + of_critical + noise / np.sqrt(tokens / 60))
    return *settings, tokens


def measure(score, rows, seeds, correlation, repetitions):
    """(type I, type I of one seed, coverage, detectable difference, power, part of the seeds)."""
    random = np.random.default_rng([rows, seeds, round(100 * correlation)])
    contrast = score == "contrast"
    critical = np.arange(rows + 260 * contrast) < rows
    truth = 0 if contrast else 3
    groups = {"weights": critical, "minus": ~critical} if contrast else {}
    tests, one_seed, covered = [], [], []
    for _ in range(repetitions):
        a, b, tokens = simulate(random, critical, seeds, correlation)
        if score == "ratio":
            groups = {"weights": tokens}
        setting = compare.estimate(a, **groups)
        if setting.rows < compare.FEWEST_ROWS:
            continue  # tokens so unequal that the ratio has no interval
        tests.append(compare.paired_t(a, b, **groups))
        one = compare.estimate(b[0] - a[0], **groups)
        one_seed.append(not one.low < 0 < one.high)
        covered.append(setting.low < truth < setting.high)
    difference = np.median([compare.detectable_difference(test) for test in tests[::10]])
    power = np.mean([compare.student_p(t.value + difference, t.error, t.df) < 0.05 for t in tests])
    seed_variance = 2 * (SEED_CRITICAL**2 + (0 if contrast else SEED**2 * (1 - correlation))) / seeds
    part = seed_variance / np.var([t.value for t in tests])
    type_1 = np.mean([t.p < 0.05 for t in tests])
    return type_1, np.mean(one_seed), np.mean(covered), difference, power, part


def rate_coverage(mean, rows, seeds, repetitions):
    """(coverage of rate(), coverage of estimate())."""
    random = np.random.default_rng([round(100 * mean), rows, seeds])
    covered = []
    for _ in range(repetitions):
        values = random.random((seeds, rows)) < random.beta(mean, 1 - mean, rows)
        covered.append([x.low < mean < x.high for x in (compare.rate(values), compare.estimate(values))])
    return np.mean(covered, axis=0)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--repetitions", type=int, default=10_000, help="of each line of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--rows", type=int, nargs="+", default=[30, 90, 260])
    parser.add_argument("--correlations", type=float, nargs="+", default=[0, 0.6, 0.9])
    args = parser.parse_args()

    print("score     rows  seeds  correlation  type I  (one seed)  coverage  detectable  power  seeds")
    scores = ("mean", "ratio", "contrast")
    for score, rows, seeds, r in product(scores, args.rows, args.seeds, args.correlations):
        cells = measure(score, rows, seeds, r, args.repetitions)
        type_1, one_seed, coverage, difference, power, part = cells
        print(f"{score:8} {rows:5} {seeds:6} {r:12} {type_1:7.3f} {f'({one_seed:.3f})':>11} {coverage:9.3f} "
              f"{difference:11.4f} {power:6.2f} {part:6.2f}", flush=True)

    print("\nrate   rows  seeds  rate()  estimate()")
    for mean, rows, seeds in product((0.02, 0.1, 0.5), args.rows, (1, *args.seeds)):
        wilson, plain = rate_coverage(mean, rows, seeds, args.repetitions)
        print(f"{mean:4} {rows:6} {seeds:6} {wilson:7.3f} {plain:11.3f}", flush=True)


if __name__ == "__main__":
    main()
