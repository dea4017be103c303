"""Metrics against the authors' recorded numbers and scikit-learn, and where that fails: ties, gaps, one class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import metrics

FIXTURES = Path(os.environ.get("VITKIT_PARITY", Path(__file__).parents[1] / "parity" / "fixtures"))


@pytest.fixture
def single():
    rng = np.random.default_rng(0)
    y = rng.choice(6, 300, p=[0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    logits = rng.normal(size=(300, 6)) + 1.5 * np.eye(6)[y]
    return y, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.fixture
def multi():
    rng = np.random.default_rng(1)
    y = (rng.random((200, 5)) < [0.5, 0.3, 0.1, 0.7, 0.05]).astype(np.float32)
    return y, np.clip(np.round(rng.random((200, 5)) * 0.7 + 0.3 * y, 1), 0, 1)  # one decimal: many ties


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("thorax_mae.finetune*.safetensors")), ids=lambda p: p.name)
def test_auc_equals_the_authors_protocol(path):
    recorded = load_file(path)
    labels, scores = recorded["in.auc_labels"], recorded["in.auc_scores"]
    assert np.allclose(metrics.auc_each(labels, scores), recorded["out.auc_each"], rtol=2e-6, atol=0)
    assert np.isclose(metrics.mean_auc(labels, scores), recorded["out.auc_mean"], rtol=2e-6)


def test_the_recorded_protocol_was_found():
    assert list(FIXTURES.glob("thorax_mae.finetune*.safetensors")), f"no thorax_mae.finetune fixture in {FIXTURES}"


def test_single_label_metrics_equal_sklearn(single):
    from sklearn import metrics as sk

    y, scores = single
    predicted = scores.argmax(1)
    assert metrics.accuracy(y, scores) == sk.accuracy_score(y, predicted)
    assert np.isclose(metrics.balanced_accuracy(y, scores), sk.balanced_accuracy_score(y, predicted))
    assert np.isclose(metrics.macro_f1(y, scores), sk.f1_score(y, predicted, average="macro"))
    assert np.isclose(metrics.log_loss(y, scores), sk.log_loss(y, scores, labels=range(6)))
    assert np.isclose(metrics.mean_auc(y, scores), sk.roc_auc_score(y, scores, multi_class="ovr", average="macro"))
    assert (metrics.confusion(y, scores) == sk.confusion_matrix(y, predicted, labels=range(6))).all()


def test_multi_label_metrics_equal_sklearn(multi):
    from sklearn import metrics as sk

    y, scores = multi
    each = [sk.roc_auc_score(y[:, c], scores[:, c]) for c in range(5)]
    assert np.allclose(metrics.auc_each(y, scores), each, rtol=1e-12)
    precision = [sk.average_precision_score(y[:, c], scores[:, c]) for c in range(5)]
    assert np.allclose(metrics.average_precision_each(y, scores), precision, rtol=1e-12)
    assert np.isclose(metrics.mean_average_precision(y, scores), np.mean(precision))
    assert np.isclose(metrics.macro_f1(y, scores), sk.f1_score(y, scores >= 0.5, average="macro"))
    loss = np.mean([sk.log_loss(y[:, c], scores[:, c]) for c in range(5)])
    assert np.isclose(metrics.log_loss(y, scores), loss)


@pytest.mark.parametrize("bins", (10, 15))
def test_calibration_error_equals_its_definition(single, bins):
    y, scores = single
    confidence, right = scores.max(1), scores.argmax(1) == y
    expected = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert np.isclose(metrics.calibration_error(y, scores, bins), expected)


def test_multi_label_calibration_of_honest_and_boastful_scores():
    rng = np.random.default_rng(2)
    p = rng.random((20_000, 2))
    y = (rng.random(p.shape) < p).astype(float)
    assert metrics.calibration_error(y, p) < 0.02
    assert metrics.calibration_error(y, (p > 0.5).astype(float)) > 0.2


def test_unknown_labels_take_no_part(multi):
    y, scores = multi
    holes = y.copy()
    hidden = np.random.default_rng(3).random(y.shape) < 0.3
    holes[hidden] = np.nan
    for c in range(5):
        known = ~hidden[:, c]
        alone = (y[known, c : c + 1], scores[known, c : c + 1])
        assert metrics.auc_each(holes, scores)[c] == metrics.auc_each(*alone)[0]
        assert metrics.average_precision_each(holes, scores)[c] == metrics.average_precision_each(*alone)[0]
        masked = np.where(np.arange(5) == c, holes, np.nan)
        assert np.isclose(metrics.log_loss(masked, scores), metrics.log_loss(*alone))
        assert np.isclose(metrics.macro_f1(masked, scores), metrics.macro_f1(*alone))
        assert np.isclose(metrics.calibration_error(masked, scores), metrics.calibration_error(*alone))


def test_unlabelled_images_take_no_part(single):
    y, scores = single
    extra, more = np.append(y, [-1, -1]), np.vstack([scores, scores[:2]])
    for name, value in metrics.summary("single", extra, more).items():
        assert np.isclose(value, metrics.summary("single", y, scores)[name]), name
    assert metrics.confusion(extra, more).sum() == len(y)


def test_a_class_with_one_label_value_scores_zero_and_leaves_the_mean():
    y = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, np.nan]])
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4], [0.7, 0.5, 0.5], [0.1, 0.2, 0.9]])
    assert metrics.auc_each(y, scores).tolist() == [1, 0, 0]
    assert metrics.mean_auc(y, scores) == 1


def test_a_class_that_is_always_wrong_scores_zero_and_stays_in_the_mean():
    y, scores = np.array([[1, 0], [0, 1]]), np.array([[0.1, 0.1], [0.9, 0.9]])
    assert metrics.auc_each(y, scores).tolist() == [0, 1]
    assert metrics.mean_auc(y, scores) == 0.5


def test_nothing_to_measure_is_nan():
    y, scores = np.array([-1, -1]), np.full((2, 2), 0.5)
    assert all(np.isnan(v) for v in metrics.summary("single", y, scores).values())
    nothing = np.full((2, 3), np.nan)
    assert all(np.isnan(v) for v in metrics.summary("multi", nothing, np.full((2, 3), 0.5)).values())
    assert np.isnan(metrics.mean_auc(np.zeros((3, 2)), np.random.default_rng(0).random((3, 2))))


def test_auc_depends_on_the_order_of_scores_only(multi):
    y, scores = multi
    before = metrics.auc_each(y, scores)
    assert np.array_equal(before, metrics.auc_each(y, np.exp(3 * scores) - 100))
    assert np.allclose(1 - before, metrics.auc_each(y, -scores))
    assert np.allclose(metrics.auc_each(y, np.full_like(scores, 0.5)), 0.5)


SINGLE_ONLY = (metrics.accuracy, metrics.balanced_accuracy, metrics.quadratic_kappa, metrics.cohen_kappa)
OF_LABELS = [m for m in metrics.WEIGHTED if m.__module__ == metrics.__name__]  # survival registers its own
CASES = [(m, t) for m in OF_LABELS for t in ("single", "multi") if t == "single" or m not in SINGLE_ONLY]


@pytest.mark.parametrize(("metric", "task"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_weights_count_as_repetitions(metric, task, single, multi):
    y, scores = single if task == "single" else multi
    weights = np.random.default_rng(4).integers(0, 4, (len(y), 7)).astype(np.float32)
    found = metrics.WEIGHTED[metric](y, scores, weights)
    for draw in range(7):
        rows = np.repeat(np.arange(len(y)), weights[:, draw].astype(int))
        assert np.allclose(found[..., draw], metric(y[rows], scores[rows]), rtol=1e-6)


def test_kappas_equal_sklearn_and_ignore_unlabelled(single):
    from sklearn.metrics import cohen_kappa_score

    y, scores = single
    known, found = y >= 0, scores.argmax(1)
    for metric, weights in ((metrics.quadratic_kappa, "quadratic"), (metrics.cohen_kappa, None)):
        want = cohen_kappa_score(y[known], found[known], weights=weights)
        assert np.isclose(metric(y, scores), want) and np.isclose(metric(y, found), want)
    linear = cohen_kappa_score(y[known], found[known], weights="linear")
    assert not np.isclose(metrics.quadratic_kappa(y, scores), linear)
    assert metrics.quadratic_kappa(np.arange(4), np.arange(4)) == 1
    assert np.isnan(metrics.quadratic_kappa(np.zeros(4, int), np.zeros(4, int)))


def test_dice_and_iou_equal_sklearn():
    from sklearn.metrics import f1_score, jaccard_score

    random = np.random.default_rng(0)
    y, found = random.integers(0, 3, (4, 9, 7)), random.integers(0, 3, (4, 9, 7))
    y[1, :4] = 255  # unknown pixels
    each = [((t != 0)[t != 255], (f != 0)[t != 255]) for t, f in zip(y, found, strict=True)]
    assert np.isclose(metrics.dice(y, found), np.mean([f1_score(t, f) for t, f in each]))
    assert np.isclose(metrics.iou(y, found), np.mean([jaccard_score(t, f) for t, f in each]))
    nothing = np.zeros((2, 3, 3), int)
    assert metrics.dice(nothing, nothing) == 1 and metrics.iou(nothing, nothing + 1) == 0
    assert np.isnan(metrics.dice(nothing[:0], nothing[:0]))
    with pytest.raises(DataError, match=r"masks \(2, 3, 3\) and predictions \(2, 3\) do not fit"):
        metrics.dice(nothing, nothing[:, 0])


def test_predicted_classes_serve_as_scores(single):
    y, scores = single
    assert metrics.accuracy(y, scores.argmax(1)) == metrics.accuracy(y, scores)
    assert (metrics.confusion(y, scores.argmax(1), 6) == metrics.confusion(y, scores)).all()


def test_summary_starts_with_the_main_metric(single, multi):
    assert next(iter(metrics.summary("single", *single))) == metrics.main_metric("single") == "accuracy"
    assert next(iter(metrics.summary("multi", *multi))) == metrics.main_metric("multi") == "mean_auc"
    assert all(type(v) is float for v in metrics.summary("multi", *multi).values())


def test_errors_say_what_is_wrong(single, multi):
    y, scores = single
    with pytest.raises(ConfigError, match="task 'mask' has no metrics"):
        metrics.main_metric("mask")
    with pytest.raises(DataError, match=r"labels \(300,\) and scores \(299, 6\) do not fit"):
        metrics.accuracy(y, scores[1:])
    with pytest.raises(DataError, match="label 5 has no column among 5 scores"):
        metrics.accuracy(y, scores[:, :5])
    with pytest.raises(DataError, match=r"not probabilities that sum to one(.|\n)*softmax"):
        metrics.log_loss(y, scores * 2)
    with pytest.raises(DataError, match="not probabilities between 0 and 1"):
        metrics.log_loss(multi[0], multi[1] + 5)
    with pytest.raises(DataError, match=r"1 cases are not finite \(first: case 7\)"):
        broken = scores.copy()
        broken[7, 0] = np.nan
        metrics.accuracy(y, broken)
    with pytest.raises(DataError, match="must be 0, 1 or NaN"):
        metrics.mean_auc(multi[0] * 2, multi[1])
    with pytest.raises(DataError, match="class 5 occurs but n_classes is 4"):
        metrics.confusion(y, scores.argmax(1), 4)
