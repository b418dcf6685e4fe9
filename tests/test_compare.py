"""The bootstrap against loops, closed forms and simulated data; Holm's correction; the sentences."""

import math

import numpy as np
import pytest

from sevloss.evaluation import compare

ZEROS = np.zeros(200)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def paired_bootstrap(a, b, *arguments, **options):
    """Of two runs: settings with one seed each."""
    return compare.compare_settings(np.asarray(a)[None], np.asarray(b)[None], *arguments, **options)


def test_against_a_loop(rng, monkeypatch):
    """One resample after the other, with the same draws: ratios, weights, and the p of the docstring."""
    monkeypatch.setattr(compare, "FEWEST_ROWS", 1)
    n, resamples = 30, 200
    a, b, counts, weights = rng.normal(size=n), rng.normal(0.3, size=n), rng.integers(1, 9, n), rng.random(n)
    result = paired_bootstrap(a, b, counts, weights, resamples=resamples, seed=5)
    drawn, differences = np.random.default_rng([5, 0]).integers(n, size=(resamples, n)), []
    for rows in drawn:
        w, c = weights[rows], counts[rows]
        differences.append(sum(w * b[rows]) / sum(w * c) - sum(w * a[rows]) / sum(w * c))
    assert result.difference == pytest.approx(sum(weights * (b - a)) / sum(weights * counts))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    below, above = sum(d <= 0 for d in differences), sum(d >= 0 for d in differences)
    assert result.p == pytest.approx(min(1, 2 * min(below + 1, above + 1) / (resamples + 1)))


def test_interval_is_the_normal_one_for_many_rows(rng):
    """Mean +- 1.96 standard errors; and p is twice the tail of the normal distribution."""
    difference = rng.normal(size=2000)
    difference += 0.035 - difference.mean()
    result = paired_bootstrap(np.zeros(2000), difference)
    error = difference.std() / math.sqrt(2000)
    assert result.low == pytest.approx(0.035 - 1.96 * error, abs=0.06 * error)
    assert result.high == pytest.approx(0.035 + 1.96 * error, abs=0.06 * error)
    assert result.p == pytest.approx(math.erfc(0.035 / error / math.sqrt(2)), abs=0.02)
    assert result == paired_bootstrap(np.zeros(2000), difference)
    assert result != paired_bootstrap(np.zeros(2000), difference, seed=1)


def test_coverage_and_p_without_a_difference(rng):
    """Of 600 simulated comparisons of two equal systems 95% have 0 in their interval, 5% a p below 0.05 and
    half one below 0.5."""
    hard = rng.normal(size=(100, 1)) * 5
    a, b = hard + rng.normal(size=(100, 600)), hard + rng.normal(size=(100, 600))
    _, low, high, p = paired_bootstrap(a, b, resamples=1000)
    assert 0.92 < ((low <= 0) & (high >= 0)).mean() < 0.975
    assert 0.025 < (p < 0.05).mean() < 0.08
    assert 0.44 < (p < 0.5).mean() < 0.56


def test_rows_are_paired(rng):
    """What makes a row hard for both drops out: unpaired, the same difference would drown."""
    hard = rng.normal(size=200) * 10
    a, b = hard + rng.normal(size=200), hard + 0.5 + rng.normal(size=200)
    paired, unpaired = paired_bootstrap(a, b), paired_bootstrap(a, rng.permutation(b))
    assert paired.p < 0.01
    assert unpaired.p > 0.05
    assert unpaired.high - unpaired.low > 5 * (paired.high - paired.low)


def test_scores_and_groups_together_are_as_one_by_one(rng):
    a, b, counts = rng.normal(size=(60, 3)), rng.normal(size=(60, 3)), rng.integers(1, 9, (60, 3))
    weights = np.stack([np.ones(60), np.arange(60) < 30], axis=1)
    together = paired_bootstrap(a, b, counts, weights, resamples=300)
    assert together.p.shape == (2, 3)
    for g in range(2):
        for k in range(3):
            alone = paired_bootstrap(a[:, k], b[:, k], counts[:, k], weights[:, g], resamples=300)
            assert [x[g, k] for x in together] == pytest.approx(list(alone))
    assert paired_bootstrap(a, b, resamples=10).p.shape == (3,)
    assert paired_bootstrap(a[:, 0], b[:, 0], None, weights, resamples=10).p.shape == (2,)
    assert isinstance(paired_bootstrap(a[:, 0], b[:, 0], resamples=10).p, float)


def test_chunks_do_not_show(rng, monkeypatch):
    """More rows than fit into one chunk: every resample is there, and has all rows."""
    values = rng.integers(0, 2, 3000).astype(float)
    both = np.stack([values, np.ones(3000)], axis=1)
    chunked = compare.bootstrap_mean(both[None], resamples=1500)  # 666 at a time
    assert chunked[1][1] == chunked[2][1] == 1
    error = values.std() / math.sqrt(3000)
    assert chunked[1][0] == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert chunked[2][0] == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


@pytest.mark.filterwarnings("error")
def test_small_and_empty_groups_have_no_interval(rng):
    """A handful of rows that agree is no evidence, and a class without rows no error."""
    sizes = (0, 1, compare.FEWEST_ROWS - 1, compare.FEWEST_ROWS)
    weights = np.stack([np.arange(200) < m for m in sizes], axis=1)
    result = paired_bootstrap(ZEROS, 1 + rng.random(200), weights=weights)
    assert np.isnan(result.difference).tolist() == [True, False, False, False]
    for x in result[1:]:
        assert np.isnan(x).tolist() == [True, True, True, False]


def test_equal_runs_do_not_differ(rng):
    a = rng.normal(size=200)
    assert paired_bootstrap(a, a) == (0, 0, 0, 1)


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


def test_bootstrap_mean(rng):
    """The mean of a ratio: tokens count, not rows."""
    tokens = rng.integers(1, 9, 200)
    mean, low, high = compare.bootstrap_mean(3.0 * tokens[None], tokens)
    assert mean == pytest.approx(3) and low == pytest.approx(3) and high == pytest.approx(3)
    mean, low, high = compare.bootstrap_mean(rng.normal(7, size=(1, 200)))
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.2)


# --- seeds --------------------------------------------------------------------------------------------------

def test_seed_spread():
    assert compare.seed_spread([[1.0, 4.0], [3.0, 4.0]]) == pytest.approx([math.sqrt(2), 0])
    assert np.isnan(compare.seed_spread([[5.0, 6.0]])).tolist() == [True, True]


def test_interval_with_seeds_is_the_normal_one(rng):
    """Variances add up: that of the rows' mean, and of each side's mean over seeds, taken with s - 1."""
    rows, of_a, of_b = rng.normal(size=400), rng.normal(size=8), rng.normal(size=6)
    a, b = of_a[:, None] / 20 + np.zeros(400), of_b[:, None] / 20 + rows
    result = compare.compare_settings(a, b, resamples=20_000)
    error = math.sqrt(rows.var() / 400 + of_a.var(ddof=1) / 8 / 400 + of_b.var(ddof=1) / 6 / 400)
    assert result.difference == pytest.approx(b.mean() - a.mean())
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.02)
    a, b = of_a[:, None] + np.zeros(400), of_b[:, None] + np.zeros(400)  # seeds alone
    result = compare.compare_settings(a, b, resamples=20_000)
    error = math.sqrt(of_a.var(ddof=1) / 8 + of_b.var(ddof=1) / 6)
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.04)


def test_coverage_with_seeds(rng):
    """400 simulated comparisons of equal settings, five seeds each: resampling rows alone takes luck with
    seeds for a difference."""
    def setting():
        return rng.normal(size=(5, 100, 400)) + 0.3 * rng.normal(size=(5, 1, 400))
    a, b = setting(), setting()

    def coverage(result):
        return ((result.low <= 0) & (result.high >= 0)).mean()
    assert 0.91 < coverage(compare.compare_settings(a, b, resamples=500)) < 0.99
    assert coverage(paired_bootstrap(a.mean(0), b.mean(0), resamples=500)) < 0.8


def test_one_seed_on_a_side_is_the_mean_over_seeds_paired_over_rows(rng):
    a, b = rng.normal(size=(3, 50)), rng.normal(size=(1, 50))
    expected = paired_bootstrap(a.mean(0), b[0], resamples=100)
    assert compare.compare_settings(a, b, resamples=100) == pytest.approx(expected)


# --- many comparisons ---------------------------------------------------------------------------------------

def test_holm_by_hand():
    """Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1, which may not fall below the one before."""
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]).tolist() == [1, 1]
    assert compare.holm([]).tolist() == []
    assert compare.holm([[0.01], [0.02]]).tolist() == [[0.02], [0.02]]


def test_holm_does_not_count_what_was_not_compared():
    adjusted = compare.holm([math.nan, 0.01, 0.03])
    assert math.isnan(adjusted[0])
    assert adjusted[1:] == pytest.approx([0.02, 0.03])


@pytest.mark.parametrize("score, difference, interval, p, expected", [
    ("chrF", 1.2, (0.4, 2), 0.003,
     "B is better than A in chrF by 1.2 (95% interval 0.4 to 2, p = 0.003 after Holm)"),
    ("chrF", -1.2, (-2, -0.4), 0.003,
     "B is worse than A in chrF by 1.2 (95% interval 0.4 to 2, p = 0.003 after Holm)"),
    ("NLL", -0.05, (-0.08, -0.02), 0.0002,
     "B is better than A in NLL by 0.05 (95% interval 0.02 to 0.08, p < 0.001 after Holm)"),
    ("NLL", 0.05, (0.02, 0.08), 0.049,
     "B is worse than A in NLL by 0.05 (95% interval 0.02 to 0.08, p = 0.049 after Holm)"),
    ("NLL", 0.05, (0.01, 0.09), 0.051,
     "B and A are not distinguishable in NLL "
     "(difference 0.05, 95% interval 0.01 to 0.09, p = 0.051 after Holm)"),
    ("words", 5, (2, 8), 0.01, "B is higher than A in words by 5 (95% interval 2 to 8, p = 0.01 after Holm)"),
    ("urgent", -0.1, (-0.2, -0.05), 0.01,
     "B is lower than A in urgent by 0.1 (95% interval 0.05 to 0.2, p = 0.01 after Holm)"),
    ("chrF", 0.1, (-0.3, 0.5), 0.61,
     "B and A are not distinguishable in chrF "
     "(difference 0.1, 95% interval -0.3 to 0.5, p = 0.61 after Holm)"),
    ("chrF", 0.1, (math.nan, math.nan), math.nan,
     f"B and A are not compared in chrF: fewer than {compare.FEWEST_ROWS} rows"),
])
def test_sentence(score, difference, interval, p, expected):
    assert compare.sentence("A", "B", score, difference, interval, p) == expected


def test_sentence_names_the_group():
    sentence = compare.sentence("A", "B", "chrF", 1.2, (0.4, 2), 0.003, group="critical")
    assert "better than A in chrF (critical) by 1.2" in sentence
    assert "chrF (critical)" in compare.sentence("A", "B", "chrF", 0, (-1, 1), 0.9, group="critical")
