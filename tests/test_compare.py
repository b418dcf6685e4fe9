"""Estimates and tests against hand-made tables, closed forms and simulated data; Holm's correction."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from sevloss.evaluation import compare

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "coverage.py"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def coverage():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the variance ---------------------------------------------------------------------------------------

def test_by_hand(monkeypatch):
    """Three seeds, four rows. Means of runs 2, 3, 7: s2 = 7; of rows 2, 4, 4, 6: s2 = 8 / 3; MSE = 24 / 6."""
    monkeypatch.setattr(compare, "FEWEST_ROWS", 4)
    residual = np.array([[2, -2, 0, 0], [0, 2, 0, -2], [-2, 0, 0, 2]])
    b = np.array([[2], [3], [7]]) + np.array([-2, 0, 0, 2]) + residual
    result = compare.paired_t(np.zeros(4), b)
    of_seeds, of_rows, of_residual = 7 / 3, 8 / 3 / 4, 24 / 6 / 12
    variance = of_seeds + of_rows - of_residual
    assert result.value == 4
    assert result.error**2 == pytest.approx(variance)
    assert result.df == 2  # the formula gives 1.3
    assert result.high - 4 == pytest.approx(4 - result.low) == pytest.approx(4.302653 * math.sqrt(variance))
    assert 0.05 < result.p < 0.2 and (result.rows, result.seeds) == (4, 3)


def test_without_spread_of_seeds_it_is_the_t_test_over_rows(rng):
    difference = rng.normal(0.3, size=50)
    result = compare.paired_t(np.zeros((5, 50)), np.tile(difference, (5, 1)))
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(50))
    assert result.value / result.error == pytest.approx(t)
    assert result.df == pytest.approx(49)
    assert result.p == pytest.approx(compare.student_p(t, 1, 49))
    assert result[:5] == pytest.approx(compare.estimate(difference)[:5])


def test_without_spread_of_rows_it_is_the_t_test_over_seeds():
    seeds = np.array([0.1, 0.4, 0.2, 0.5, 0.3])
    result = compare.paired_t(np.zeros((5, 30)), np.tile(seeds[:, None], (1, 30)))
    assert result.error == pytest.approx(seeds.std(ddof=1) / math.sqrt(5))
    assert result.df == 4
    assert result.p == pytest.approx(0.0132, abs=1e-4)  # t = 4.243, of a table


def test_degrees_of_freedom_of_rows_and_seeds(rng):
    """Rows and seeds that spread, without a residual."""
    rows, seeds = rng.normal(size=30), rng.normal(size=(5, 1)) / 8
    result = compare.estimate(rows + seeds)
    of_rows, of_seeds = rows.var(ddof=1) / 30, seeds.var(ddof=1) / 5
    assert result.error**2 == pytest.approx(of_rows + of_seeds)
    assert result.df == pytest.approx((of_rows + of_seeds) ** 2 / (of_seeds**2 / 3 + of_rows**2 / 29))
    assert result.df > 4  # which it is at least


def test_residual_counts_once(rng):
    """Where a difference is residual alone, V is its variance over all cells, on average; not twice that."""
    variances = [compare.estimate(rng.normal(size=(10, 100))).error ** 2 for _ in range(400)]
    assert np.mean(variances) == pytest.approx(1 / 1000, rel=0.1)


def test_ratio_has_the_error_of_the_jackknife(rng):
    counts = rng.integers(20, 60, 80)
    values = 3.0 * counts + rng.normal(size=80) * 10
    result = compare.estimate(values / counts, counts)
    without_one = (values.sum() - values) / (counts.sum() - counts)
    jackknife = math.sqrt(79 / 80 * ((without_one - without_one.mean()) ** 2).sum())
    assert result.value == pytest.approx(values.sum() / counts.sum())
    assert result.error == pytest.approx(jackknife, rel=0.03)


def test_contrast_is_welch_over_rows(rng):
    """Of one run: the variances of both groups' means add up; degrees of freedom are the smaller group's."""
    values, critical = rng.normal(size=100), np.arange(100) < 30
    result = compare.estimate(values, weights=critical, minus=~critical)
    groups = [compare.estimate(values[critical]), compare.estimate(values[~critical])]
    assert result.value == pytest.approx(groups[0].value - groups[1].value)
    assert result.error == pytest.approx(math.hypot(groups[0].error, groups[1].error))
    assert (result.df, result.rows) == pytest.approx((29, 30))


def test_what_seeds_move_in_common_cancels_in_the_contrast(rng):
    values, critical = rng.normal(size=(5, 100)), np.arange(100) < 30
    moved = values + 10 * rng.normal(size=(5, 1))
    assert compare.estimate(moved).error > 10 * compare.estimate(values).error
    expected = compare.estimate(values, weights=critical, minus=~critical)
    assert compare.estimate(moved, weights=critical, minus=~critical) == pytest.approx(expected, nan_ok=True)


# --- invariances ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups", [{}, {"weights": np.arange(5, 65)}, {"weights": np.arange(60) < 30},
                                    {"weights": np.arange(60) < 30, "minus": np.arange(60) >= 30}])
def test_invariances(rng, groups):
    a, b = rng.normal(size=(2, 4, 60))
    result = compare.paired_t(a, b, **groups)
    swapped = compare.paired_t(b, a, **groups)
    assert swapped[:5] == pytest.approx((-result.value, -result.high, -result.low, result.error, result.df))
    assert swapped.p == pytest.approx(result.p)
    shared = rng.normal(size=60) + rng.normal(size=(4, 1))
    assert compare.paired_t(a + shared, b + shared, **groups) == pytest.approx(result)
    rows, seeds = rng.permutation(60), rng.permutation(4)
    reordered = {key: value[rows] for key, value in groups.items()}
    assert compare.paired_t(a[seeds][:, rows], b[seeds][:, rows], **reordered) == pytest.approx(result)
    scaled = {key: 7 * value for key, value in groups.items()}
    assert compare.paired_t(a, b, **scaled) == pytest.approx(result)
    tripled = compare.paired_t(3 * a, 3 * b, **groups)
    assert tripled[3:8] == pytest.approx((3 * result.error, *result[4:8]))
    assert tripled.sd_seeds == pytest.approx(3 * result.sd_seeds)


def test_a_group_is_as_its_rows_alone(rng):
    values, counts = rng.normal(size=(3, 90)), rng.integers(1, 9, 90)
    alone = compare.estimate(values[:, :40], counts[:40])
    assert compare.estimate(values, counts * (np.arange(90) < 40)) == pytest.approx(alone, nan_ok=True)


def test_seeds_are_paired(rng):
    """What a seed does to both settings drops out."""
    seed = rng.normal(size=(6, 1))
    a, b = seed + rng.normal(size=(6, 50)) / 10, seed + 0.1 + rng.normal(size=(6, 50)) / 10
    assert compare.paired_t(a, b).p < 0.01
    assert compare.paired_t(a, b[[1, 2, 3, 4, 5, 0]]).p > 0.3


def test_a_checkpoint_is_a_constant(rng):
    checkpoint, runs = rng.normal(size=50), rng.normal(size=(3, 50))
    expected = compare.paired_t(np.tile(checkpoint, (3, 1)), runs)
    assert compare.paired_t(checkpoint, runs) == compare.paired_t(checkpoint[None], runs) == expected


# --- what is not tested ---------------------------------------------------------------------------------

@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_have_no_p(rng, seeds):
    """An interval over rows, of these very runs; no verdict on the settings."""
    a, b = rng.normal(size=(2, seeds, 50))
    result = compare.paired_t(a, b + 100)
    assert math.isnan(result.p) and result.seeds == 0
    assert result[:5] == pytest.approx(compare.estimate((b + 100 - a).mean(0))[:5])


@pytest.mark.filterwarnings("error")
def test_few_effective_rows_have_no_interval(rng):
    """One row that weighs as much as all others is few rows, and an empty group is no error."""
    values = rng.normal(size=(3, 200))
    for weights, rows in [(np.arange(200) < 19, 19), (np.arange(200) < 0, 0), ([199] + [1] * 199, 3.98)]:
        results = [compare.estimate(values, weights=weights), compare.rate(values > 0, weights),
                   compare.paired_t(np.zeros(200), values, weights=np.ones(200), minus=weights)]
        for result in results:
            assert all(map(math.isnan, (result.low, result.high, result.error, result.df, result.p)))
            assert result.rows == pytest.approx(rows, abs=0.01)
            assert math.isnan(result.value) == (rows == 0)
    assert compare.estimate(values, weights=np.arange(200) < 20).error > 0


@pytest.mark.filterwarnings("error")
def test_equal_settings_do_not_differ(rng):
    a = rng.normal(size=(3, 50))
    assert compare.paired_t(a, a)[:4] == (0, 0, 0, 0) and compare.paired_t(a, a).p == 1
    assert compare.paired_t(np.zeros((3, 50)), np.ones((3, 50))).p == 0


def test_different_tables_are_refused():
    for shape in [(3, 30), (4, 40)]:
        with pytest.raises(ValueError):
            compare.paired_t(np.zeros((3, 40)), np.zeros(shape))


# --- rates, power, Holm ---------------------------------------------------------------------------------

def test_rate_is_wilson(rng):
    """For one run and equal weights: the solutions of |rate - x| = t sqrt(x (1 - x) / n)."""
    for hits in (0, 1, 13, 40):
        values = np.arange(40) < hits
        result = compare.rate(values)
        for x in (result.low, result.high):
            assert abs(hits / 40 - x) == pytest.approx(2.022691 * math.sqrt(x * (1 - x) / 40), abs=1e-6)
        flipped = compare.rate(~values)
        assert (1 - flipped.high, 1 - flipped.low) == pytest.approx((result.low, result.high))
        assert compare.rate(np.tile(values, (5, 1)))[:6] == pytest.approx(result[:6])  # five equal runs
    assert compare.rate(np.zeros(40)).low == 0 and compare.rate(np.ones((3, 40))).low < 1


def test_rate_includes_seeds(rng):
    """Runs of which two answer all rows alike and a third does not are no 120 independent rows."""
    apart = compare.rate(np.repeat([[0], [0], [1]], 40, axis=1))
    mixed = compare.rate(rng.random((3, 40)) < 1 / 3)
    assert apart.high - apart.low > 0.9 and mixed.high - mixed.low < 0.3


def test_detectable_difference(rng):
    """t of the table: 1.9647 and 0.8423 where df = 499, 2.7764 (4.6041 for 0.01) and 0.9410 where df = 4."""
    result = compare.estimate(rng.normal(size=500))
    few = result._replace(df=4)
    assert compare.detectable_difference(result) == pytest.approx((1.9647 + 0.8423) * result.error, rel=1e-4)
    assert compare.detectable_difference(few) == pytest.approx((2.7764 + 0.9410) * few.error, rel=1e-4)
    assert compare.detectable_difference(few, 0.01) == pytest.approx((4.6041 + 0.9410) * few.error, rel=1e-4)


def test_holm():
    """By hand: 0.005 * 4, 0.01 * 3, 0.03 * 2, and the largest not below the one before."""
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]).tolist() == [1, 1]
    assert compare.holm([]).tolist() == []
    adjusted = compare.holm([math.nan, 0.01, 0.03])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.02, 0.03])


# --- Student's t ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("df, p, t", [
    (1, 0.05, 12.706205), (2, 0.05, 4.302653), (4, 0.4, 0.940965), (9, 0.01, 3.249836), (29, 0.05, 2.045230),
    (259, 0.001, 3.328486), (10_000, 0.05, 1.960201)])
def test_quantiles_of_the_table(df, p, t):
    assert compare.student_quantile(p, df) == pytest.approx(t, rel=1e-6)
    assert compare.student_p(t, 1, df) == compare.student_p(-2 * t, 2, df) == pytest.approx(p, rel=1e-6)


def test_student_in_closed_form():
    """With one degree of freedom it is Cauchy's distribution, with two t / sqrt(2 + t^2)."""
    for t in (0, 0.1, 1.5, 20, 1e6):
        assert compare.student_p(t, 1, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t))
        assert compare.student_p(t, 1, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert compare.student_p(0, 0, 5) == 1 and compare.student_p(1, 0, 5) == pytest.approx(0, abs=1e-9)


def test_student_as_scipy():
    stats = pytest.importorskip("scipy").stats
    for df in (1.5, 2.5, 7.3, 60, 1234.5, 1e5):
        for p in (0.8, 0.4, 0.05, 0.0025, 1e-5):
            assert compare.student_quantile(p, df) == pytest.approx(stats.t.isf(p / 2, df), rel=1e-5)
        for t in (0.2, 1, 3, 30):
            assert compare.student_p(t, 1, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-6)


# --- simulated ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("score, rows, seeds, correlation", [
    ("mean", 260, 3, 0.6), ("ratio", 90, 5, 0.9), ("contrast", 30, 3, 0.6)])
def test_type_1_error_and_coverage(coverage, score, rows, seeds, correlation):
    """5% and 95%, within 3.2 standard errors of 300 repetitions. One seed is far off where seeds matter."""
    result = coverage.measure(score, rows, seeds, correlation, 300)
    type_1, one_seed, covered, difference, power, part = result
    assert 0.01 < type_1 < 0.09
    assert 0.91 < covered < 0.99
    assert (one_seed > 0.15) == (part > 0.2)
    assert 0.5 < power < 0.95


def test_benchmark_prints_its_tables(coverage, capsys, monkeypatch):
    arguments = "--repetitions 5 --seeds 3 --rows 40 --correlations 0.6"
    monkeypatch.setattr(sys, "argv", ["coverage.py", *arguments.split()])
    coverage.main()
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    rates = ["0.02", "0.02", "0.1", "0.1", "0.5", "0.5"]
    assert first_words == ["score", "mean", "ratio", "contrast", "rate", *rates]
