"""Intervals must cover what they promise, compare pairs fairly, be quick, and say when there is none."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from vitkit.errors import DataError
from vitkit.evaluate import metrics, resampling
from vitkit.evaluate.statistics import bootstrap, mean_interval, paired_bootstrap

EXPERIMENTS = 300


def covered(intervals, truth):
    return np.mean([i.low <= truth <= i.high for i in intervals])


def test_accuracy_interval_covers():
    rng = np.random.default_rng(0)
    found = []
    for seed in range(EXPERIMENTS):
        y = rng.integers(0, 5, 120)
        guess = np.where(rng.random(120) < 0.8, y, (y + 1) % 5)
        found.append(bootstrap(metrics.accuracy, y, guess, n=600, seed=seed))
    assert 0.90 <= covered(found, 0.8) <= 0.98


def test_auc_interval_covers():
    rng = np.random.default_rng(1)
    truth = 0.5 * (1 + math.erf(1 / 2))  # two normals one deviation apart: Phi(1 / sqrt 2)
    found = []
    for seed in range(EXPERIMENTS):
        y = (rng.random((100, 1)) < 0.3).astype(float)
        found.append(bootstrap(metrics.mean_auc, y, rng.normal(size=(100, 1)) + y, n=600, seed=seed))
    assert 0.90 <= covered(found, truth) <= 0.98


def clustered(rng, patients=25, images=8):
    """Accuracy 0.7 on average, but patients differ: images of one are right or wrong together."""
    ease = rng.beta(1.4, 0.6, patients)
    group = np.repeat(np.arange(patients), images)
    return np.zeros(len(group), int), (rng.random(len(group)) > ease[group]).astype(int), group


def test_group_interval_covers_where_the_plain_one_does_not():
    rng = np.random.default_rng(2)
    by_patient, by_image = [], []
    for seed in range(EXPERIMENTS):
        y, guess, group = clustered(rng)
        by_patient.append(bootstrap(metrics.accuracy, y, guess, groups=group, n=600, seed=seed))
        by_image.append(bootstrap(metrics.accuracy, y, guess, n=600, seed=seed))
    assert 0.90 <= covered(by_patient, 0.7) <= 0.98
    assert covered(by_image, 0.7) < 0.85
    assert by_patient[0].n == 25 and by_image[0].n == 200


def test_few_units_do_not_give_a_narrow_interval():
    rng = np.random.default_rng(3)
    found = []
    for seed in range(EXPERIMENTS):
        y, guess, group = clustered(rng, patients=8, images=40)
        found.append(bootstrap(metrics.accuracy, y, guess, groups=group, n=600, seed=seed))
    assert covered(found, 0.7) >= 0.88


def test_strata_keep_class_counts_and_narrow_the_interval():
    rng = np.random.default_rng(4)
    y = np.repeat([0, 1], [150, 50])
    guess = np.where(y == 0, 0, np.where(rng.random(200) < 0.1, 1, 0))  # one class easy, one hard
    plain, kept = bootstrap(metrics.accuracy, y, guess), bootstrap(metrics.accuracy, y, guess, strata=y)
    assert kept.high - kept.low < 0.8 * (plain.high - plain.low)
    share = bootstrap(lambda y: float(y.mean()), y, strata=y)
    assert math.isnan(share.low) and "same in every draw" in share.note


def test_stratified_interval_covers():
    """Classes drawn apart, one easy and one hard: the truth is about as many of each as there are."""
    rng = np.random.default_rng(13)
    y = np.repeat([0, 1], [90, 40])
    truth = (90 * 0.9 + 40 * 0.6) / 130
    found = []
    for seed in range(EXPERIMENTS):
        guess = np.where(rng.random(130) < np.where(y == 0, 0.9, 0.6), y, 1 - y)
        found.append(bootstrap(metrics.accuracy, y, guess, strata=y, n=600, seed=seed))
    assert 0.90 <= covered(found, truth) <= 0.98


def test_stratified_auc_interval_covers():
    rng = np.random.default_rng(14)
    truth = 0.5 * (1 + math.erf(1 / 2))
    y = np.repeat([0.0, 1.0], [70, 30])[:, None]
    found = []
    for seed in range(EXPERIMENTS):
        scores = rng.normal(size=(100, 1)) + y
        found.append(bootstrap(metrics.mean_auc, y, scores, strata=y[:, 0], n=600, seed=seed))
    assert 0.90 <= covered(found, truth) <= 0.98


def sick_and_well(rng, patients=40, images=5):
    """Patients are sick or not, which is the stratum; images of one are right or wrong together: 0.8 and 0.6 on average."""
    sick = np.arange(patients) % 2
    ease = np.where(sick == 1, rng.beta(1.2, 0.8, patients), rng.beta(1.6, 0.4, patients))
    group = np.repeat(np.arange(patients), images)
    y = sick[group]
    return y, np.where(rng.random(len(y)) < ease[group], y, 1 - y), group


def test_stratified_and_clustered_interval_covers():
    rng = np.random.default_rng(15)
    found = []
    for seed in range(EXPERIMENTS):
        y, guess, group = sick_and_well(rng)
        found.append(bootstrap(metrics.accuracy, y, guess, groups=group, strata=y, n=600, seed=seed))
    assert 0.90 <= covered(found, 0.7) <= 0.98
    assert found[0].n == 40


@pytest.mark.parametrize("stratified", [False, True])
def test_clustered_difference_covers_where_the_plain_one_does_not(stratified):
    """Two models that are as good as each other on average, but each has patients of its own that it finds hard."""
    rng = np.random.default_rng(16)
    by_patient, by_image = [], []
    for seed in range(EXPERIMENTS):
        y, a, group = sick_and_well(rng)
        _, b, _ = sick_and_well(rng)
        strata = y if stratified else None
        given = {"n": 600, "seed": seed, "strata": strata}
        by_patient.append(paired_bootstrap(metrics.accuracy, y, a, b, groups=group, **given))
        by_image.append(paired_bootstrap(metrics.accuracy, y, a, b, **given))
    assert 0.90 <= covered(by_patient, 0.0) <= 0.98
    assert covered(by_image, 0.0) < 0.85
    assert 0.02 <= np.mean([one.p < 0.05 for one in by_patient]) <= 0.10


def test_fast_paths_equal_the_loop():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 4, 80)
    scores = rng.dirichlet(np.ones(4), 80)
    for metric in (metrics.accuracy, metrics.mean_auc, metrics.macro_f1, metrics.log_loss):
        slow = bootstrap(lambda a, b, metric=metric: metric(a, b), y, scores, n=60)
        fast = bootstrap(metric, y, scores, n=60)
        assert np.allclose([slow.value, slow.low, slow.high], [fast.value, fast.low, fast.high], rtol=1e-6)


def test_vector_metrics_give_one_interval_each():
    rng = np.random.default_rng(6)
    y = (rng.random((90, 3)) < 0.4).astype(float)
    y[:, 2] = 0
    scores = rng.random((90, 3)) + 0.4 * y
    found = bootstrap(metrics.auc_each, y, scores, n=200)
    alone = bootstrap(metrics.mean_auc, y[:, :1], scores[:, :1], n=200)
    assert (found[0].low, found[0].high) == (alone.low, alone.high)
    assert math.isnan(found[2].low) and "undefined in 200 of 200 draws" in found[2].note


def test_two_thousand_draws_of_fourteen_labels_are_quick():
    rng = np.random.default_rng(7)
    y = (rng.random((300, 14)) < 0.15).astype(np.float32)
    scores = rng.random((300, 14)) + 0.3 * y
    start = time.process_time()
    interval = bootstrap(metrics.mean_auc, y, scores)
    assert time.process_time() - start < 3
    assert interval.low < interval.value < interval.high


def test_draws_depend_on_the_seed_only(monkeypatch):
    rng = np.random.default_rng(8)
    y = rng.integers(0, 3, 70)
    guess = np.where(rng.random(70) < 0.6, y, 0)
    first = bootstrap(metrics.accuracy, y, guess, seed=3)
    assert first == bootstrap(metrics.accuracy, y, guess, seed=3)
    assert first != bootstrap(metrics.accuracy, y, guess, seed=4)
    monkeypatch.setattr(resampling, "_BLOCK", 70 * 64)
    assert first == bootstrap(metrics.accuracy, y, guess, seed=3)


def test_levels_nest():
    rng = np.random.default_rng(9)
    y = rng.integers(0, 2, 100)
    guess = np.where(rng.random(100) < 0.7, y, 1 - y)
    wide, narrow = bootstrap(metrics.accuracy, y, guess, level=0.99), bootstrap(metrics.accuracy, y, guess, level=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_all_right_gets_the_binomial_interval():
    y = np.arange(50) % 5
    interval = bootstrap(metrics.accuracy, y, y)
    assert interval.high == 1 and np.isclose(interval.low, 0.025 ** (1 / 50))
    assert str(interval) == "1.000 [0.929, 1.000] (exact binomial: all 50 right)"
    wrong = bootstrap(metrics.accuracy, y, (y + 1) % 5, groups=np.arange(50) // 5)
    assert wrong.low == 0 and np.isclose(wrong.high, 1 - 0.025 ** (1 / 10)) and wrong.n == 10


def test_no_interval_is_said_not_invented():
    y = np.array([[1.0], [0.0], [0.0], [1.0]])
    perfect = bootstrap(metrics.mean_auc, y, y)
    assert perfect.value == 1 and math.isnan(perfect.low) and "same in every draw" in str(perfect)
    undefined = bootstrap(metrics.mean_auc, np.zeros((5, 1)), np.random.default_rng(0).random((5, 1)))
    assert math.isnan(undefined.value) and undefined.note == "undefined on these cases"
    one = bootstrap(metrics.accuracy, np.arange(6), np.array([0, 1, 2, 3, 0, 0]), groups=["p"] * 6)
    assert one.note == "one independent unit: no interval"


def test_draws_with_one_class_are_left_out():
    y = np.array([[1.0]] + [[0.0]] * 29)  # a third of all draws has no positive
    scores = np.append(0.8, np.linspace(0, 1, 29))[:, None]
    interval = bootstrap(metrics.mean_auc, y, scores)
    assert 0.5 < interval.low < interval.value < interval.high <= 1


def test_errors():
    with pytest.raises(DataError, match="groups has 2 entries for 3 cases"):
        bootstrap(metrics.accuracy, np.arange(3), np.arange(3), groups=[1, 2])
    with pytest.raises(DataError, match="group 'a' lies in several strata"):
        bootstrap(metrics.accuracy, np.arange(2), np.arange(2), groups=["a", "a"], strata=[0, 1])
    with pytest.raises(DataError, match="no cases"):
        bootstrap(lambda y: 0.0, np.zeros(0))


def test_paired_interval_is_narrower_and_finds_the_better_model():
    rng = np.random.default_rng(10)
    y = rng.integers(0, 2, 400)
    hard = rng.random(400) < 0.3
    b = np.where(hard, 1 - y, y)
    a = np.where(hard & (rng.random(400) < 0.15), y, b)  # a mends some of b's errors
    found = paired_bootstrap(metrics.accuracy, y, a, b)
    alone = bootstrap(metrics.accuracy, y, a)
    assert found.low > 0 and found.p < 0.01 and found.a - found.b == found.value
    assert found.high - found.low < alone.high - alone.low
    back = paired_bootstrap(metrics.accuracy, y, b, a)
    assert np.allclose([back.value, back.low, back.high, back.p], [-found.value, -found.high, -found.low, found.p])


def test_paired_p_is_uniform_when_models_are_equal():
    rng = np.random.default_rng(11)
    p = []
    for seed in range(200):
        y = (rng.random((80, 1)) < 0.4).astype(float)
        signal = rng.normal(size=(80, 1)) + y
        a, b = signal + rng.normal(size=(80, 1)), signal + rng.normal(size=(80, 1))
        p.append(paired_bootstrap(metrics.mean_auc, y, a, b, n=400, seed=seed).p)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert 0.4 < np.mean(p) < 0.6


def test_paired_p_agrees_with_the_interval():
    rng = np.random.default_rng(12)
    agree = 0
    for seed in range(100):
        y = rng.integers(0, 2, 60)
        a, b = (np.where(rng.random(60) < q, y, 1 - y) for q in (0.85, 0.72))
        found = paired_bootstrap(metrics.accuracy, y, a, b, n=500, seed=seed)
        agree += (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert agree >= 95  # a quantile lies between two draws of a discrete statistic, a p-value counts draws


def test_the_same_predictions_do_not_differ():
    y = np.arange(20) % 3
    found = paired_bootstrap(metrics.accuracy, y, y * 0, y * 0)
    assert found.value == 0 and found.p == 1 and math.isnan(found.low)


def test_mean_interval_is_students():
    from scipy import stats

    values = [0.81, 0.84, 0.79]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert np.allclose([found.low, found.high], [low, high]) and found.n == 3
    one = mean_interval([0.8])
    assert one.value == 0.8 and math.isnan(one.low) and str(one) == "0.800 (one seed: no interval)"
    with pytest.raises(DataError, match="one finite value per seed"):
        mean_interval([0.8, float("nan")])
