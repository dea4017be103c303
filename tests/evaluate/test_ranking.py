"""Ranks over data sets: Friedman and Nemenyi as published, no false alarms, and a picture that says what was found."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from vitkit.errors import DataError
from vitkit.evaluate.ranking import rank
from vitkit.run.ranking_chart import add_ranking, ranking_chart
from vitkit.run.report import Report


def scores(gaps, n=12, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    hard = rng.random(n)
    return {name: hard + gap + noise * rng.normal(size=n) for name, gap in gaps.items()}


def test_ranks_and_friedman_by_hand():
    given = {"a": [3, 9, 4, 7], "b": [2, 8, 4, 1], "c": [1, 9, 2, 3]}
    found = rank(given)
    assert dict(zip(found.names, found.ranks, strict=True)) == {"a": 1.25, "b": 2.375, "c": 2.375}
    assert dict(zip(found.names, found.wins, strict=True)) == {"a": 4, "b": 1, "c": 1}
    wanted = stats.friedmanchisquare(*given.values())
    assert found.statistic == pytest.approx(wanted.statistic) and found.p == pytest.approx(wanted.pvalue)


def test_the_critical_difference_of_the_papers_example():
    """Demsar 2006: four models, 14 data sets: 1.25."""
    assert rank(scores(dict.fromkeys("abcd", 0.0), n=14)).critical == pytest.approx(1.25, abs=0.005)


@pytest.mark.parametrize(("models", "q"), [(3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_values_of_the_table(models, q):
    found = rank(scores({f"m{i}": 0.0 for i in range(models)}, n=20))
    assert found.critical == pytest.approx(q * math.sqrt(models * (models + 1) / 120), rel=5e-4)


def test_pairwise_p_agrees_with_the_critical_difference():
    found = rank(scores({"a": 0.3, "b": 0.1, "c": 0.09, "d": 0.0}))
    ranks = np.array(found.ranks)
    apart = np.abs(ranks[:, None] - ranks) > found.critical
    assert ((found.p_pairs < 0.05) == apart).all() and found.names[0] == "a"
    assert found.wins[0] == 12 and found.ranks[0] == 1
    assert "ranks best over 12 data sets" in found.verdict and "is better than" in found.verdict


def test_no_false_alarms():
    alarms = []
    for seed in range(200):
        found = rank(scores(dict.fromkeys("abcd", 0.0), n=12, seed=seed))
        alarms.append((found.p_pairs < 0.05).any())
    assert np.mean(alarms) <= 0.08


def test_lower_is_better_turns_the_order():
    given = scores({"a": 0.3, "b": 0.0, "c": 0.6})
    assert rank(given, higher_is_better=False).names == tuple(reversed(rank(given).names)) == ("b", "a", "c")


def test_groups_of_models_that_cannot_be_told_apart():
    found = rank(scores({"a": 1.0, "b": 0.99, "c": 0.0, "d": -0.01}, n=30))
    assert found.alike == ((0, 1), (2, 3))
    assert rank(scores(dict.fromkeys("abc", 0.0), n=2)).alike == ((0, 2),)


def test_equal_scores_are_said():
    found = rank({name: [0.5] * 6 for name in "abc"})
    assert math.isnan(found.p) and found.ranks == (2, 2, 2) and "they all score alike" in found.verdict
    assert found.wins == (6, 6, 6)


def test_what_cannot_be_ranked_is_named():
    with pytest.raises(DataError, match=r"2 models to rank\n  fix: rank three or more"):
        rank({"a": [1, 2], "b": [2, 1]})
    with pytest.raises(DataError, match="1 data sets to rank models over"):
        rank({name: [1.0] for name in "abc"})
    with pytest.raises(DataError, match="b has no score on data set 1"):
        rank({"a": [1, 2], "b": [1, math.nan], "c": [3, 4]})
    with pytest.raises(DataError, match="different numbers of scores"):
        rank({"a": [1, 2], "b": [1], "c": [3, 4]})


def test_the_picture():
    found = rank(scores({"<a>": 0.3, "b": 0.1, "c": 0.09, "a rather long name of a model": 0.0}))
    drawn = str(ranking_chart(found, title="Ranks"))
    assert drawn.count("<svg") == 2 and "&lt;a&gt;" in drawn and "<a>" not in drawn
    assert f"critical difference {found.critical:.2f}" in drawn
    numbers = [float(n) for n in re.findall(r'[xy][12]?="(-?[\d.]+)"', drawn)]
    assert min(numbers) >= 0 and max(numbers) <= 760
    assert drawn.count("cannot be told apart") == 2 * len(found.alike)
    report = Report("R")
    add_ranking(report, "Ranks", found)
    assert "Bars join models" in report.html() and "ranks best" in report.html()


def test_a_long_critical_difference_is_cut():
    assert "longer than the axis" in str(ranking_chart(rank(scores(dict.fromkeys("abc", 0.0), n=2))))
