"""The probe reaches scikit-learn's optimum for every penalty, picks on validation only, and survives hard data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import linear, logistic, metrics
from vitkit.evaluate.linear import Settings
from vitkit.evaluate.logistic import solve

FEW = (1e-4, 1e-2, 1.0)


@pytest.fixture(scope="module")
def digits():
    """Digits behind random rectified features: 384 of very unequal variance, some nearly the same."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    hidden = (x / 4 - 1) @ (rng.normal(size=(64, 384)) / 8) + 0.5 * rng.normal(size=384)
    order = rng.permutation(len(y))
    x = (np.maximum(hidden, 0) * rng.lognormal(size=384) + 3).astype(np.float32)[order]
    return x[:600], y[order][:600], x[600:1000], y[order][600:1000]


def blobs(n, dim=12, classes=3, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (np.random.default_rng(7).normal(size=(classes, dim))[y] + spread * rng.normal(size=(n, dim))), y


def labels(x, classes=4, seed=0, unknown=0.2):
    rng = np.random.default_rng(seed)
    y = (x @ rng.normal(size=(x.shape[1], classes)) + 2 * rng.normal(size=(len(x), classes)) > 1).astype(np.float32)
    y[rng.random(y.shape) < unknown] = np.nan
    return y


def standard(x, like):
    deviation = like.std(0)
    return (x - like.mean(0)) / np.where(deviation > 0, deviation, 1)


def objective(probe, x, y, penalty):
    """Mean loss + penalty / 2 |w|^2 in standardised features, from the folded weights."""
    logits = torch.tensor(probe.logits(x))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y)).item()
    return loss + penalty / 2 * ((probe.weight * x.std(0)) ** 2).sum()


def sklearn_fit(x, y, penalty, tol=1e-9):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (penalty * len(x)), tol=tol, max_iter=10_000).fit(standard(x, x), y)


@pytest.mark.parametrize("penalty", (1e-3, 0.03, 1.0, 30.0))
def test_softmax_probe_reaches_sklearns_optimum(digits, penalty):
    x, y, test_x, _ = digits
    x64, test64 = x.astype(float), test_x.astype(float)
    probe = linear.fit(x, y, settings=Settings(penalties=(penalty,)))
    theirs = sklearn_fit(x64, y, penalty)
    loss = -theirs.predict_log_proba(standard(x64, x64))[np.arange(len(y)), y].mean()
    assert abs(objective(probe, x64, y, penalty) / (loss + penalty / 2 * (theirs.coef_**2).sum()) - 1) < 1e-5
    assert np.abs(probe.scores(test_x) - theirs.predict_proba(standard(test64, x64))).max() < 5e-3
    assert np.mean(probe.scores(test_x).argmax(1) == theirs.predict(standard(test64, x64))) > 0.995
    assert probe.converged


def test_predictions_equal_sklearns_on_well_conditioned_data():
    x, y = blobs(200)
    test = blobs(300, seed=1)[0]
    for probe in linear.path(x, y, settings=Settings(penalties=FEW)):
        theirs = sklearn_fit(x, y, probe.chosen)
        assert np.array_equal(probe.scores(test).argmax(1), theirs.predict(standard(test, x)))
        assert np.abs(probe.scores(test) - theirs.predict_proba(standard(test, x))).max() < 2e-3


def test_every_penalty_of_the_grid_is_solved_to_1e_5(digits):
    x, y = digits[0][:150], digits[1][:150]
    x64 = x.astype(float)
    quick = linear.path(x, y)
    exact = linear.path(x, y, settings=Settings(tolerance=1e-11, max_iter=5000))
    for a, b in zip(quick, exact, strict=True):
        assert a.converged and b.converged
        gap = objective(a, x64, y, a.chosen) / objective(b, x64, y, a.chosen) - 1
        assert -1e-8 < gap < 1e-5, a.chosen


@pytest.mark.parametrize("penalty", FEW)
def test_sigmoid_probe_reaches_sklearns_optimum_without_unknown_labels(penalty):
    from sklearn.linear_model import LogisticRegression

    x, _ = blobs(250)
    y = labels(x)
    probe = linear.fit(x, y, settings=Settings(penalties=(penalty,)))
    assert probe.task == "multi" and probe.converged
    for c in range(4):
        known = ~np.isnan(y[:, c])
        model = LogisticRegression(C=1 / (penalty * known.sum()), tol=1e-9, max_iter=10_000)
        model.fit(standard(x, x)[known], y[known, c])
        assert np.abs(probe.scores(x)[:, c] - model.predict_proba(standard(x, x))[:, 1]).max() < 2e-3


def test_more_features_than_images_is_the_same_problem():
    x, y = blobs(60, dim=300)
    x += np.random.default_rng(0).normal(size=x.shape)
    probe = linear.fit(x, y, settings=Settings(penalties=(0.1,)))
    theirs = sklearn_fit(x, y, 0.1)
    assert np.allclose(probe.weight * x.std(0), theirs.coef_, atol=1e-3 * np.abs(theirs.coef_).max())
    test = blobs(100, dim=300, seed=1)[0]
    assert np.abs(probe.scores(test) - theirs.predict_proba(standard(test, x))).max() < 1e-3


def test_penalties_do_not_influence_each_other():
    x, y = blobs(80)
    y = labels(x, classes=3)
    for task in (y, blobs(80)[1]):
        together = linear.path(x, task, settings=Settings(penalties=FEW, tolerance=1e-10))
        for probe in together:
            alone = linear.fit(x, task, settings=Settings(penalties=(probe.chosen,), tolerance=1e-10))
            assert np.allclose(alone.weight, probe.weight, rtol=1e-3, atol=1e-3 * np.abs(probe.weight).max())


def test_penalties_that_do_not_fit_the_cache_take_turns(monkeypatch):
    x, y = blobs(50)
    settings = Settings(penalties=FEW, tolerance=1e-10)
    whole = linear.path(x, y, settings=settings)
    monkeypatch.setitem(logistic._BATCH, "cpu", 50 * 3)
    for a, b in zip(whole, linear.path(x, y, settings=settings), strict=True):
        assert np.allclose(a.weight, b.weight, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- choosing


def test_validation_picks_the_penalty(digits):
    x, y, val_x, val_y = digits
    probe = linear.fit(x[:80], y[:80], val_x, val_y, n_classes=10)
    assert probe.picked_on == "validation" and len(probe.curve) == 17
    best = max(value for _, value in probe.curve)
    assert probe.chosen == max(p for p, value in probe.curve if value == best)
    assert metrics.accuracy(val_y, probe.scores(val_x)) == best
    every = linear.path(x[:80], y[:80], n_classes=10)
    found = [metrics.accuracy(val_y, p.scores(val_x)) for p in every]
    assert np.abs(np.array(found) - [value for _, value in probe.curve]).max() <= 0.01
    assert best >= max(found) - 0.0051


def test_a_validation_set_that_says_nothing_is_not_used():
    x, _ = blobs(40)
    y = labels(x, unknown=0)
    probe = linear.fit(x, y, x[:5], np.ones((5, 4)))
    assert probe.chosen == 0.03 and probe.picked_on == "no validation possible: the penalty nearest to 1 / N"


def test_ties_go_to_the_strongest_penalty():
    x = np.array([[-3.0], [-2.9], [3.0], [3.1]])
    y = np.array([0, 0, 1, 1])
    probe = linear.fit(x, y, x, y)
    assert probe.chosen == 100.0 and metrics.accuracy(y, probe.scores(x)) == 1


def test_multi_label_probe_is_picked_by_mean_auc():
    x, _ = blobs(120)
    y = labels(x)
    probe = linear.fit(x[:60], y[:60], x[60:], y[60:])
    value = dict(probe.curve)[probe.chosen]
    assert value == max(v for _, v in probe.curve)
    assert metrics.mean_auc(y[60:], probe.scores(x[60:])) == value


def test_validation_never_trains_unless_asked():
    x, y = blobs(60)
    val = blobs(60, seed=1)
    settings = Settings(penalties=FEW, tolerance=1e-10)
    picked = linear.fit(x, y, *val, settings=settings)
    alone = linear.fit(x, y, settings=Settings(penalties=(picked.chosen,), tolerance=1e-10))
    assert np.allclose(picked.weight, alone.weight, rtol=1e-4, atol=1e-6)
    refit = linear.fit(x, y, *val, settings=Settings(penalties=FEW, tolerance=1e-10, refit=True))
    both = linear.fit(np.concatenate([x, val[0]]), np.concatenate([y, val[1]]),
                      settings=Settings(penalties=(picked.chosen,), tolerance=1e-10))  # fmt: skip
    assert refit.chosen == picked.chosen and np.allclose(refit.weight, both.weight, rtol=1e-4, atol=1e-6)


def test_cross_validation_picks_without_a_validation_set(digits):
    x, y, test_x, test_y = digits
    settings = Settings(penalties=(1e-5, 1e-3, 0.1, 10.0), folds=3)
    probe = linear.fit(x[:150], y[:150], n_classes=10, settings=settings)
    assert probe.picked_on == "cross-validation" and len(probe.curve) == 4
    again = linear.fit(x[:150], y[:150], n_classes=10, settings=settings)
    assert probe.chosen == again.chosen and np.array_equal(probe.weight, again.weight)
    every = linear.path(x[:150], y[:150], n_classes=10, settings=settings)
    tested = [metrics.accuracy(test_y, p.scores(test_x)) for p in every]
    assert metrics.accuracy(test_y, probe.scores(test_x)) > max(tested) - 0.03


def test_cross_validation_does_not_see_through_groups():
    rng = np.random.default_rng(0)
    patients = rng.normal(size=(30, 40))
    x = np.repeat(patients, 4, axis=0) + 0.01 * rng.normal(size=(120, 40))
    y = np.repeat(rng.integers(0, 2, 30), 4)  # labels are noise: only recognising the patient helps
    settings = Settings(penalties=(1e-3, 0.1, 10.0))
    naive = linear.fit(x, y, settings=settings)
    honest = linear.fit(x, y, groups=np.repeat(np.arange(30), 4), settings=settings)
    assert max(v for _, v in naive.curve) > 0.95
    assert max(v for _, v in honest.curve) < 0.75


def test_one_image_a_class_cannot_be_validated():
    x, _ = blobs(4)
    probe = linear.fit(x, np.arange(4))
    assert probe.curve == [] and "no class occurs twice" in probe.picked_on and probe.chosen == 0.3
    assert metrics.accuracy(np.arange(4), probe.scores(x)) == 1


def test_folds_are_stratified_grouped_and_repeatable():
    y = np.repeat([0, 1, 2], [50, 20, 5])
    fold = linear.folds(y)
    counts = np.array([[((fold == k) & (y == c)).sum() for c in range(3)] for k in range(5)])
    assert (counts == [10, 4, 1]).all()
    assert np.array_equal(fold, linear.folds(y)) and not np.array_equal(fold, linear.folds(y, seed=1))
    group = np.arange(75) // 3
    grouped = linear.folds(y, group)
    assert all(len(set(grouped[group == g])) == 1 for g in range(25))
    assert np.bincount(grouped).max() - np.bincount(grouped).min() <= 6
    assert linear.folds(np.arange(4)).max() == 0
    assert linear.folds(np.array([0, 0, 0, 1])).max() == 2


def test_folds_spread_rare_labels():
    rng = np.random.default_rng(0)
    y = (rng.random((100, 3)) < [0.6, 0.3, 0.05]).astype(float)
    y[:, 2] = 0
    y[:5, 2] = 1
    fold = linear.folds(y)
    assert sorted(fold[:5]) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- hard data


def test_constant_and_huge_columns_are_harmless():
    x, y = blobs(100)
    clean = linear.fit(x, y, settings=Settings(penalties=(0.01,), tolerance=1e-10))
    constant = np.full((100, 2), 1e6, dtype=np.float32) * [1, 1.1]
    noisy = np.hstack([x * 1e5 + 1e6, constant, np.zeros((100, 1))])
    probe = linear.fit(noisy, y, settings=Settings(penalties=(0.01,), tolerance=1e-10))
    assert np.allclose(probe.scores(noisy), clean.scores(x), atol=1e-5)
    test = noisy.copy()
    test[:, 12] *= 2  # a column that was constant in training says nothing
    assert np.allclose(probe.scores(test).argmax(1), clean.scores(x).argmax(1))


def test_features_without_information_give_class_frequencies():
    probe = linear.fit(np.ones((10, 3)), np.repeat([0, 1], [7, 3]), settings=Settings(penalties=(0.1,)))
    assert np.allclose(probe.scores(np.ones((1, 3))), [0.7, 0.3], atol=1e-4)


def test_separable_classes_stay_finite():
    x = np.concatenate([np.full((20, 2), -5.0), np.full((20, 2), 5.0)])
    y = np.repeat([0, 1], 20)
    for probe in linear.path(x, y):
        assert np.isfinite(probe.weight).all() and metrics.accuracy(y, probe.scores(x)) == 1 and probe.converged


def test_classes_without_training_images_get_probability_zero():
    x, y = blobs(60)
    probe = linear.fit(x, y * 2, n_classes=6, settings=Settings(penalties=(0.1,)))
    scores = probe.scores(x)
    assert scores.shape == (60, 6) and (scores[:, [1, 3, 5]] == 0).all() and np.allclose(scores.sum(1), 1)
    dense = linear.fit(x, y, settings=Settings(penalties=(0.1,)))
    assert np.allclose(scores[:, ::2], dense.scores(x))
    only = linear.fit(x, np.full(60, 3), n_classes=5)
    assert (only.scores(x).argmax(1) == 3).all()


def test_labels_that_never_vary_get_their_smoothed_frequency():
    x, _ = blobs(50)
    y = labels(x)
    y[:, 1], y[:, 2], y[:, 3] = 0, 1, np.nan
    scores = linear.fit(x, y).scores(x)
    assert (
        np.allclose(scores[:, 1], 0.5 / 51) and np.allclose(scores[:, 2], 50.5 / 51) and np.allclose(scores[:, 3], 0.5)
    )
    assert scores[:, 0].std() > 0.01


def test_unlabelled_rows_do_not_train():
    x, y = blobs(60)
    settings = Settings(penalties=(0.1,), tolerance=1e-10)
    more = linear.fit(np.vstack([x + 100, x]), np.append(np.full(60, -1), y), settings=settings)
    assert np.allclose(more.weight, linear.fit(x, y, settings=settings).weight)


def test_linear_layer_is_the_same_classifier():
    x, y = blobs(60)
    probe = linear.fit(x, y)
    layer = probe.linear()
    assert np.allclose(layer(torch.tensor(x, dtype=torch.float32)).detach().numpy(), probe.logits(x), atol=1e-4)


def test_solver_says_when_it_ran_out_of_steps():
    x, y = blobs(100)
    z = torch.tensor(standard(x, x))
    found = solve(z, torch.tensor(y), [1e-6, 100.0], max_iter=3)
    assert found.converged.tolist() == [False, True] and found.weight.shape == (2, 3, 12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_step_beyond_the_number_range_is_shortened(dtype):
    x, y = blobs(60)
    z = torch.tensor(standard(x, x)).to(dtype)
    problem = logistic._Softmax(z, torch.tensor(y))
    problem.take(torch.tensor([0.1], dtype=dtype))
    w = problem.start()
    problem.begin(w)
    direction = -1e6 * logistic._gradient(problem, w)
    direction[..., -1] -= 1e5  # the same for all classes: no change, but every exponential underflows
    t, change = logistic._step_length(problem, w, direction, logistic._dot(logistic._gradient(problem, w), direction))
    assert 0 < t.item() < 1 and torch.isfinite(change).all() and change.item() < 0


def test_threads_and_random_state_are_left_alone():
    x, y = blobs(40)
    before = torch.get_num_threads(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    linear.fit(x, y)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1]) and (np.random.get_state()[1] == before[2]).all()


def test_errors():
    x, y = blobs(10)
    with pytest.raises(ConfigError, match="must be positive"):
        Settings(penalties=(0.0,))
    with pytest.raises(ConfigError, match="folds is 1"):
        Settings(folds=1)
    with pytest.raises(DataError, match="10 training features but 9 labels"):
        linear.fit(x, y[1:])
    with pytest.raises(DataError, match="no validation image has a label"):
        linear.fit(x, y, x, np.full(10, -1))
    with pytest.raises(DataError, match=r"validation data \(features \(10, 11\)"):
        linear.fit(x, y, x[:, 1:], y)
    with pytest.raises(DataError, match="training label 9 but only 3 classes"):
        linear.fit(x, np.arange(10), n_classes=3)
    with pytest.raises(DataError, match=r"1 rows of the training features are not finite \(first: row 4\)"):
        broken = x.copy()
        broken[4, 2] = np.inf
        linear.fit(broken, y)
    with pytest.raises(DataError, match=r"test features have shape \(12,\)"):
        linear.fit(x, y).scores(x[0])
    with pytest.raises(DataError, match="3 groups for 10 training images"):
        linear.fit(x, y, groups=[1, 2, 3])
