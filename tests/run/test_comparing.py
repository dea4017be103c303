"""`vitkit compare`: verdicts are paired on common test images and say what they rest on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vitkit
from vitkit.errors import ConfigError
from vitkit.run import comparing
from vitkit.run.folder import RunFolder


def make_run(
    path: Path, predicted, truth, *, names=None, task="single", groups=None, kind="adapt.linear", finished=True, **config
) -> Path:  # fmt: skip
    """A finished run whose predictions are given: class numbers (single), or probabilities (N, C) (multi)."""
    names = names or [f"{i}.png" for i in range(len(truth))]
    folder = RunFolder(path, say=lambda text: None)
    with folder:
        folder.claim({"data": "photos", "epochs": 3, **config}, kind)
        for step in (1, 2):
            folder.log({"step": step, "epoch": float(step), "loss": 1.0 / step, "val_accuracy": 0.5 + 0.1 * step})
        frame = pd.DataFrame({"image": names})
        if task == "single":
            frame["label"], frame["predicted"] = [f"c{i}" for i in truth], [f"c{i}" for i in predicted]
            for c in range(2):
                frame[f"p(c{c})"] = (np.asarray(predicted) == c).astype(float)
        else:
            frame["label"] = [
                "|".join(f"{'?' if np.isnan(v) else ''}l{c}" for c, v in enumerate(row) if v != 0) for row in truth
            ]
            frame["predicted"] = ""
            for c in range(np.shape(truth)[1]):
                frame[f"p(l{c})"] = np.asarray(predicted)[:, c]
        frame.to_csv(path / "predictions.csv", index=False)
        if groups is not None:
            pd.DataFrame({"name": names, "split": "test", "label": "", "group": groups}).to_csv(
                path / "splits.csv", index=False
            )
        value = float(np.mean(np.asarray(predicted) == truth)) if task == "single" else 0.5
        metric = {"name": "accuracy", "value": value, "low": None, "high": None, "n": len(names), "split": "test"}
        if finished:
            folder.finish({"verb": "adapt", "task": task, "metrics": [metric], "verdict": "done"})
    return path


def answers(n: int, right: float, seed: int = 0, truth=None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n) if truth is None else truth
    wrong = rng.random(n) > right
    return np.where(wrong, 1 - truth, truth), truth


def test_a_better_run_is_called_better_with_its_interval(tmp_path):
    weak, truth = answers(205, 0.6)
    strong, _ = answers(205, 0.95, seed=1, truth=truth)
    a, b = make_run(tmp_path / "a", weak, truth, epochs=3), make_run(tmp_path / "b", strong, truth, epochs=9)
    found = vitkit.compare(a, b)
    points = 100 * (np.mean(strong == truth) - np.mean(weak == truth))
    assert found["verdict"].startswith(f"{b} is better than {a} by {points:.1f} points of accuracy (95 % ")
    assert found["verdict"].endswith(", p < 0.001) on the same 205 test images.")
    (row,) = found["rows"]
    assert row["difference"] == pytest.approx(-points / 100) and row["high"] < 0 and row["n"] == 205
    assert found["report"] == tmp_path / "compare.html"
    page = found["report"].read_text()
    assert "is better than" in page and "Paired differences" in page
    assert "epochs" in page and "Settings that differ" in page and "<svg" in page


def test_a_difference_that_could_be_chance_is_called_that(tmp_path):
    first, truth = answers(60, 0.8)
    second, _ = answers(60, 0.8, seed=3, truth=truth)
    second[:2] = 1 - truth[:2]
    found = vitkit.compare(make_run(tmp_path / "a", first, truth), make_run(tmp_path / "b", second, truth))
    assert "the difference could be chance (95 % " in found["verdict"] and found["rows"][0]["p"] > 0.05


def test_equal_predictions_are_equal(tmp_path):
    first, truth = answers(30, 0.8)
    found = vitkit.compare(
        make_run(tmp_path / "a", first, truth), make_run(tmp_path / "b", first, truth), out=str(tmp_path / "c.html")
    )
    assert (
        f"{tmp_path / 'a'} and {tmp_path / 'b'} have the same accuracy on the same 30 test images" in found["verdict"]
    )
    assert found["report"] == tmp_path / "c.html" or str(found["report"]) == str(tmp_path / "c.html")


def test_only_common_images_with_one_label_are_compared(tmp_path):
    first, truth = answers(40, 0.7)
    second, _ = answers(40, 0.7, seed=2, truth=truth)
    other = truth.copy()
    other[12] = 1 - other[12]
    a = make_run(tmp_path / "a", first, truth)
    b = make_run(tmp_path / "b", second[10:], other[10:], names=[f"{i}.png" for i in range(10, 40)])
    found = vitkit.compare(a, b)
    assert found["rows"][0]["n"] == 29 and "on the 29 test images that both scored" in found["verdict"]
    assert "the test sets differ: 40 and 30 images, 30 in both" in found["verdict"]
    assert "1 labelled differently in the two runs is left out" in found["verdict"]


def test_predictions_that_do_not_give_the_reported_figure_are_noted(tmp_path):
    first, truth = answers(40, 0.7)
    a, b = make_run(tmp_path / "a", first, truth), make_run(tmp_path / "b", truth, truth)
    lines = (b / "predictions.csv").read_text().splitlines()
    (b / "predictions.csv").write_text("\n".join(lines[:1] + [row.replace("c0", "c9", 1) for row in lines[1:]]) + "\n")
    assert f"{b} reported 1.000, its stored predictions give" in vitkit.compare(a, b)["rows"][0]["note"]


def test_no_common_image_is_said(tmp_path):
    first, truth = answers(10, 0.7)
    b = make_run(tmp_path / "b", first, truth, names=[f"x{i}" for i in range(10)])
    found = vitkit.compare(make_run(tmp_path / "a", first, truth), b)
    assert "cannot be compared image by image: they have no test image in common." in found["verdict"]
    assert found["rows"][0]["difference"] is None and found["report"].is_file()


def test_patients_are_drawn_whole(tmp_path):
    """Ten pictures of each of 12 patients that stand or fall together: as good as 12 cases, not 120."""
    truth = np.zeros(120, dtype=int)
    owners = np.repeat(np.arange(12), 10)
    weak, strong = (owners < 4).astype(int), (owners < 2).astype(int)
    seen = []
    for kind, groups in (("loose", None), ("whole", [f"p{i}" for i in owners])):
        a = make_run(tmp_path / f"{kind}-a", strong, truth, groups=groups)
        b = make_run(tmp_path / f"{kind}-b", weak, truth, groups=groups)
        seen.append(vitkit.compare(a, b, out=str(tmp_path / "c.html"))["rows"][0])
    assert seen[0]["p"] < 0.05 < seen[1]["p"]
    assert seen[1]["high"] - seen[1]["low"] > 2 * (seen[0]["high"] - seen[0]["low"])


def test_several_labels_are_compared_by_auc_without_unknown_ones(tmp_path):
    from vitkit.evaluate import metrics

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (80, 2)).astype(float)
    truth[::7, 1] = np.nan
    good = np.clip(np.nan_to_num(truth) + rng.normal(0, 0.3, truth.shape), 0, 1)
    bad = rng.random(truth.shape)
    a = make_run(tmp_path / "a", good, truth, task="multi")
    b = make_run(tmp_path / "b", bad, truth, task="multi")
    found = vitkit.compare(a, b)
    row = found["rows"][0]
    assert row["metric"] == "mean_auc" and "points of mean AUC" in found["verdict"]
    assert row["a_value"] == pytest.approx(metrics.mean_auc(truth, good), abs=1e-9)
    assert row["b_value"] == pytest.approx(metrics.mean_auc(truth, bad), abs=1e-9)


def test_different_tasks_and_labels_are_not_compared(tmp_path):
    first, truth = answers(20, 0.7)
    labels = np.eye(2)[truth]
    a = make_run(tmp_path / "a", first, truth)
    b = make_run(tmp_path / "b", labels, labels, task="multi")
    assert "they solve different tasks (single and multi)" in vitkit.compare(a, b)["verdict"]
    c = make_run(tmp_path / "c", np.zeros((20, 3)), np.zeros((20, 3)), task="multi")
    assert "they predict different labels (l2 in one only)" in vitkit.compare(b, c)["verdict"]


def test_three_runs_are_ranked_with_corrected_p_values(tmp_path):
    truth = answers(150, 1.0)[1]
    runs = [
        make_run(tmp_path / name, answers(150, right, seed=i, truth=truth)[0], truth)
        for i, (name, right) in enumerate((("a", 0.6), ("b", 0.99), ("c", 0.9)), start=1)
    ]
    found = vitkit.compare(*runs)
    assert found["verdict"].startswith(f"{runs[1]} scores best. {runs[1]} is better than {runs[0]} by")
    assert found["verdict"].endswith("corrected for the number of pairs (Holm).")
    assert [(row["a"], row["b"]) for row in found["rows"]] == [
        (str(x), str(y)) for x, y in ((runs[0], runs[1]), (runs[0], runs[2]), (runs[1], runs[2]))
    ]


def test_holms_correction():
    pairs = [comparing.Pair("a", str(i), "", metric="accuracy", p=p) for i, p in enumerate((0.04, 0.01, 0.03))]
    assert [pair.p for pair in comparing.correct(pairs)] == pytest.approx([0.06, 0.03, 0.06])
    apart = [comparing.Pair("a", "b", name, metric="accuracy", p=0.04) for name in ("knn", "linear")]
    assert [pair.p for pair in comparing.correct(apart)] == [0.04, 0.04]


def test_runs_without_predictions_are_still_put_side_by_side(tmp_path):
    first, truth = answers(10, 0.7)
    a = make_run(tmp_path / "a", first, truth)
    b = make_run(tmp_path / "b", first, truth)
    (b / "predictions.csv").unlink()
    found = vitkit.compare(a, b)
    assert f"{b} predicted no test images" in found["verdict"] and "Settings that differ" in found["report"].read_text()


def test_evaluations_are_compared_by_protocol(tmp_path):
    truth = answers(40, 1.0)[1]
    runs = []
    for i, name in enumerate("ab", start=1):
        run = make_run(tmp_path / name, truth, truth, kind="evaluate")
        (run / "predictions.csv").rename(run / "predictions_knn.csv")
        other = make_run(tmp_path / f"{name}-other", answers(40, 0.7, seed=i, truth=truth)[0], truth)
        (other / "predictions.csv").rename(run / "predictions_linear.csv")
        runs.append(run)
    found = vitkit.compare(*runs)
    assert [row["protocol"] for row in found["rows"]] == ["knn", "linear"]
    assert "accuracy (linear)" in found["verdict"]
    trained = make_run(tmp_path / "c", truth, truth)
    assert [row["protocol"] for row in vitkit.compare(trained, runs[0])["rows"]] == ["knn", "linear"]
    for run, gone in zip(runs, ("knn", "linear"), strict=True):
        (run / f"predictions_{gone}.csv").unlink()
    assert "they followed different protocols" in vitkit.compare(*runs)["verdict"]


def test_what_is_no_finished_run_is_named(tmp_path):
    first, truth = answers(10, 0.7)
    a = make_run(tmp_path / "a", first, truth)
    with pytest.raises(ConfigError, match=r"nothing is not a run folder\n  fix: give the --out"):
        vitkit.compare(a, tmp_path / "nothing")
    b = make_run(tmp_path / "b", first, truth, finished=False)
    with pytest.raises(ConfigError, match=r"b is not finished\n  fix: the same command"):
        vitkit.compare(a, b)
    with pytest.raises(ConfigError, match="the same run is named twice"):
        vitkit.compare(a, a)
    c = make_run(tmp_path / "c", first, truth)
    (c / "predictions.csv").write_text("picture,answer\n1,2\n")
    with pytest.raises(ConfigError, match=r"predictions.csv cannot be read: no columns image, label and predicted"):
        vitkit.compare(a, c)
