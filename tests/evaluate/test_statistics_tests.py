"""Tests of two models must accuse wrongly as rarely as they promise, and agree with textbook and scipy where these know."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vitkit.errors import DataError
from vitkit.evaluate import metrics
from vitkit.evaluate.statistics import (
    benjamini_hochberg,
    bootstrap,
    case_mean,
    combine,
    compare_all,
    delong,
    holm,
    mcnemar,
    paired_bootstrap,
    permutation,
)

# ---- McNemar ---------------------------------------------------------------------------------------------------------


def answers(only_a: int, only_b: int, both: int = 20, none: int = 5):
    """Labels and two predictions with these counts."""
    y = np.zeros(only_a + only_b + both + none, int)
    a = np.repeat([0, 1, 0, 1], [only_a, only_b, both, none])
    b = np.repeat([1, 0, 0, 1], [only_a, only_b, both, none])
    return y, a, b


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (3, 9), (12, 12), (40, 17)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    found = mcnemar(*answers(only_a, only_b))
    assert found.p == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert found.statistic == only_a - only_b and found.n == only_a + only_b


def test_mcnemar_of_equal_and_unlabelled():
    y, a, b = answers(0, 0)
    assert mcnemar(y, a, b).p == 1 and "same cases" in mcnemar(y, a, b).note
    y, a, b = answers(0, 8)
    assert mcnemar(np.where(np.arange(len(y)) < 4, -1, y), a, b).n == 4
    scores = np.eye(2)
    assert mcnemar(y, scores[a], scores[b]) == mcnemar(y, a, b)
    with pytest.raises(DataError, match="one class number per case"):
        mcnemar(np.zeros((3, 2)), np.zeros(3), np.zeros(3))


def test_mcnemar_false_positives():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(2000):
        y, right = np.zeros(150, int), rng.random((2, 150)) < 0.8
        p.append(mcnemar(y, (~right[0]).astype(int), (~right[1]).astype(int)).p)
    assert 0.015 <= np.mean(np.array(p) < 0.05) <= 0.05  # exact: never above 5 %


# ---- permutation -----------------------------------------------------------------------------------------------------


def test_all_exchanges_of_accuracies_are_mcnemar():
    y, a, b = answers(2, 9)
    found = permutation(metrics.accuracy, y, a, b)
    assert found.note == "all exchanges" and found.p == pytest.approx(mcnemar(y, a, b).p)
    assert found.statistic == pytest.approx(metrics.accuracy(y, a) - metrics.accuracy(y, b))


def test_permutation_of_means_equals_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 11))
    wanted = stats.permutation_test(
        (a, b), lambda x, y: x.mean() - y.mean(), permutation_type="samples", n_resamples=9999
    )
    assert permutation(case_mean, a, a, b).p == pytest.approx(wanted.pvalue)
    many = rng.normal(size=(2, 60)) + np.array([[0.3], [0.0]])
    drawn = permutation(case_mean, many[0], *many, n=20_000).p
    assert drawn == pytest.approx(stats.ttest_rel(*many).pvalue, abs=0.01)


def test_permutation_of_any_metric_agrees_with_delong():
    rng = np.random.default_rng(2)
    y = (rng.random(90) < 0.4).astype(float)
    a, b = y + rng.normal(size=90), 0.4 * y + rng.normal(size=90)
    found = permutation(metrics.mean_auc, y[:, None], a[:, None], b[:, None], n=600)
    assert found.p == pytest.approx(delong(y, a, b).p, abs=0.03)
    again = permutation(metrics.mean_auc, y[:, None], a[:, None], b[:, None], n=600)
    assert again == found


def test_whole_patients_are_exchanged():
    """Forty pictures of eight patients: the pictures of one stand or fall together."""
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(8), 5)
    loose, whole = [], []
    for _ in range(300):
        a, b = (np.repeat(rng.normal(size=8), 5) for _ in range(2))
        loose.append(permutation(case_mean, a, a, b, n=400).p < 0.05)
        whole.append(permutation(case_mean, a, a, b, groups=group, n=400).p < 0.05)
    assert np.mean(loose) > 0.25 and np.mean(whole) <= 0.08


def test_permutation_of_what_does_not_differ_or_is_undefined():
    y, a, _ = answers(3, 3)
    assert permutation(metrics.accuracy, y, a, a).p == 1
    empty = np.zeros((4, 1))
    assert math.isnan(permutation(metrics.mean_auc, empty, empty, empty).p)


# ---- DeLong ----------------------------------------------------------------------------------------------------------


def by_definition(y, a, b):
    """Variance of AUC(a) - AUC(b) from all pairs of a positive and a negative."""
    up, down = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    wins = [(s[up][:, None] > s[down]) + 0.5 * (s[up][:, None] == s[down]) for s in (a, b)]
    gap = wins[0] - wins[1]
    return gap.mean(), gap.mean(1).var(ddof=1) / len(up) + gap.mean(0).var(ddof=1) / len(down)


def test_delong_equals_its_definition_with_ties():
    rng = np.random.default_rng(4)
    y = (rng.random(70) < 0.3).astype(float)
    a, b = np.round(y + rng.normal(size=70), 1), np.round(0.5 * y + rng.normal(size=70), 1)
    found = delong(y, a, b)
    gap, variance = by_definition(y, a, b)
    assert found.value == pytest.approx(gap) and found.a - found.b == pytest.approx(gap)
    assert found.a == pytest.approx(metrics.mean_auc(y[:, None], a[:, None]))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * math.sqrt(variance))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(gap) / math.sqrt(variance)))
    alone = delong(y, a, b, groups=np.arange(70))
    assert alone.low == pytest.approx(found.low)  # each case its own patient: Obuchowski is DeLong
    hidden = delong(np.append(y, [-1, np.nan]), np.append(a, [9, 9]), np.append(b, [0, 0]))
    assert hidden == found and delong(y, np.stack([1 - a, a], 1), b[:, None]) == found


def test_delong_false_positives_and_coverage():
    rng = np.random.default_rng(5)
    p, held = [], []
    truth = stats.norm.cdf(1 / math.sqrt(2)) - stats.norm.cdf(0.5 / math.sqrt(2))
    for _ in range(600):
        y = (rng.random(100) < 0.35).astype(float)
        shared = rng.normal(size=100)
        a, b = (0.6 * shared + 0.8 * rng.normal(size=100) + y for _ in range(2))
        p.append(delong(y, a, b).p)
        weaker = delong(y, a, b - 0.5 * y)
        held.append(weaker.low <= truth <= weaker.high)
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.075
    assert 0.925 <= np.mean(held) <= 0.975


def test_delong_of_patients():
    rng = np.random.default_rng(6)
    group = np.repeat(np.arange(30), 6)
    loose, whole = [], []
    for _ in range(300):
        y = np.repeat((rng.random(30) < 0.4).astype(float), 6)
        if y[::6].sum() < 3:
            continue
        a, b = (y + np.repeat(rng.normal(size=30), 6) + 0.3 * rng.normal(size=180) for _ in range(2))
        loose.append(delong(y, a, b).p < 0.05)
        whole.append(delong(y, a, b, groups=group).p < 0.05)
    assert np.mean(loose) > 0.25 and np.mean(whole) <= 0.11


def test_delong_says_what_it_cannot_do():
    y = np.array([1.0, 0, 1, 0])
    same = delong(y, y, y)
    assert same.p == 1 and math.isnan(same.low) and "rank the cases alike" in same.note
    one = delong(y, y, 1 - y, groups=["p"] * 4)
    assert math.isnan(one.p) and "one independent unit" in one.note
    with pytest.raises(DataError, match="needs both classes"):
        delong(np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(DataError, match="score of the positive class"):
        delong(y, np.zeros((4, 3)), y)


# ---- many pairs ------------------------------------------------------------------------------------------------------


def test_corrections_equal_worked_examples():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([0.04, np.nan, 0.01]) == pytest.approx([0.04, np.nan, 0.02], nan_ok=True)
    assert benjamini_hochberg([np.nan]) == pytest.approx([np.nan], nan_ok=True) and len(holm([])) == 0
    with pytest.raises(DataError, match=r"not all in \[0, 1\]"):
        holm([1.2])


def test_holm_keeps_the_familywise_error():
    rng = np.random.default_rng(7)
    p = rng.random((4000, 6))
    assert np.mean((p < 0.05).any(1)) > 0.2
    assert 0.04 <= np.mean([(holm(row) < 0.05).any() for row in p]) <= 0.06


def test_every_pair_of_three_models():
    rng = np.random.default_rng(8)
    y = rng.integers(0, 3, 200)
    right = {"a": 0.9, "b": 0.88, "c": 0.5}
    models = {name: np.where(rng.random(200) < share, y, (y + 1) % 3) for name, share in right.items()}
    found = compare_all(metrics.accuracy, y, models, n=800)
    assert [(one.a, one.b) for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [one.corrected for one in found] == pytest.approx(holm([one.difference.p for one in found]))
    assert found[0].corrected > 0.05 > found[1].corrected
    assert found[1].difference == paired_bootstrap(metrics.accuracy, y, models["a"], models["c"], n=800)
    with pytest.raises(DataError, match="there is no correction 'tukey'"):
        compare_all(metrics.accuracy, y, models, correction="tukey")
    with pytest.raises(DataError, match="at least two"):
        compare_all(metrics.accuracy, y, {"a": y})


def test_combined_p_values():
    p = [0.04, 0.2, 0.01]
    assert combine(p, method="fisher") == pytest.approx(stats.combine_pvalues(p, "fisher").pvalue)
    assert combine(p) == pytest.approx(stats.combine_pvalues(p, "stouffer").pvalue)
    assert combine([0.03], signs=[-1]) == pytest.approx(0.03)
    assert combine([0.05, 0.05], signs=[1, 1]) < 0.01 and combine([0.05, 0.05], signs=[1, -1]) == pytest.approx(1)
    assert combine([0.01, 0.9], signs=[1, 1], weights=[10, 1]) < combine([0.01, 0.9], signs=[1, 1])
    with pytest.raises(DataError, match="cannot combine"):
        combine([0.1, float("nan")])


def test_combined_two_sided_p_is_uniform():
    rng = np.random.default_rng(9)
    z = rng.normal(size=(3000, 4))
    p = 2 * stats.norm.sf(np.abs(z))
    found = np.array([combine(row, signs=np.sign(way)) for row, way in zip(p, z, strict=True)])
    assert 0.04 <= np.mean(found < 0.05) <= 0.06 and 0.47 < found.mean() < 0.53


def test_one_number_a_case_takes_the_quick_path():
    values = np.random.default_rng(10).normal(1, 2, 120)
    group = np.arange(120) // 4
    slow = bootstrap(lambda y, v: float(v.mean()), values, values, groups=group, n=100)
    fast = bootstrap(case_mean, values, values, groups=group, n=100)
    assert [fast.value, fast.low, fast.high] == pytest.approx([slow.value, slow.low, slow.high])
