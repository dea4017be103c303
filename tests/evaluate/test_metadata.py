"""Metadata columns: how they are read, ridge regression against scikit-learn, honest choice, and the chance level."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import vitkit
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.metadata import Settings, measure, parse, shuffled
from vitkit.evaluate.ridge import correlation, mae, r2, ridge

from ..run.test_measure import outside
from ..run.test_protocols_masks import MODEL


def cells(*texts):
    return [(text,) if text else () for text in texts]


def test_columns_are_read_as_numbers_or_classes():
    age = parse("age", cells("058Y", "7", "", "61.5", "n/a", "80", "3", "12", "44"))
    assert age.kind == "number" and age.values[0] == 58 and np.isnan(age.values[[2, 4]]).all()
    sex = parse("sex", cells("M", "F", "unknown", "F"))
    assert sex.kind == "class" and sex.classes == ("F", "M") and sex.values.tolist() == [1, 0, -1, 0]
    assert parse("grade", cells("0", "1", "2", "1")).kind == "class"
    assert parse("grade", cells("0", "1", "2", "1"), "number").kind == "number"
    assert parse("age", cells("30", "40", "50", "60", "70", "80"), "class").kind == "class"
    with pytest.raises(DataError, match=r"column 'age' holds 'old', which is no number[\s\S]*age:class"):
        parse("age", cells("4", "old"), "number")
    with pytest.raises(ConfigError, match=r"age:numbr[\s\S]*age:number, age:class"):
        parse("age", cells("4"), "numbr")
    with pytest.raises(DataError, match=r"image 2 has several values \(4, 5\)"):
        parse("age", [("4",), ("4", "5")])
    with pytest.raises(DataError, match="holds no value"):
        parse("age", cells("", "NA"))


@pytest.mark.parametrize("shape", [(60, 9), (20, 35)])
def test_ridge_is_scikit_learns_for_every_penalty_and_target(shape):
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    n, d = shape
    x, vx, tx = (rng.normal(3, 5, (m, d)) for m in (n, 15, 11))
    x[:, 2] = 7.0  # never varies
    vx[:, 2], tx[:, 2] = 7.0, 7.0
    y, vy = rng.normal(size=(n, 3)), rng.normal(size=(15, 3))
    penalties = (0.01, 0.3, 10.0)
    said, chosen, errors = ridge(x, y, vx, vy, tx, penalties)
    scale = StandardScaler().fit(x)
    for j in range(3):
        models = [Ridge(alpha=p * n, solver="cholesky").fit(scale.transform(x), y[:, j]) for p in penalties]
        want = [np.square(m.predict(scale.transform(vx)) - vy[:, j]).mean() for m in models]
        assert np.allclose(errors[:, j], want, rtol=1e-6)
        best = int(np.argmin(want))
        assert chosen[j] == penalties[best]
        assert np.allclose(said[:, j], models[best].predict(scale.transform(tx)), rtol=1e-6)
    both = np.concatenate([x, vx])
    scale = StandardScaler().fit(both)
    again = ridge(x, y, vx, vy, tx, penalties, refit=True)[0][:, 0]
    model = Ridge(alpha=chosen[0] * len(both)).fit(scale.transform(both), np.concatenate([y, vy])[:, 0])
    assert np.allclose(again, model.predict(scale.transform(tx)), rtol=1e-6)


def test_scores_of_numbers():
    y, said = np.array([1.0, 2, 3, 6]), np.array([1.0, 2, 4, 5])
    assert np.isclose(r2(y, said), 1 - 2 / 14) and mae(y, said) == 0.5
    assert np.isclose(correlation(y, said), np.corrcoef(y, said)[0, 1])
    assert r2(y, np.full(4, 3.0)) == 0 and np.isnan(r2(np.ones(3), np.ones(3))) and np.isnan(correlation(y, y * 0))


def patients(seed=0, signal=2.0, n=60, each=4):
    """Features, ages and sexes of `n` patients with `each` images; age and sex are constant within a patient."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n), each)
    age, sex = rng.uniform(20, 80, n), rng.integers(0, 2, n)
    x = rng.normal(size=(n, 12))[group] + 0.3 * rng.normal(size=(n * each, 12))  # patients look like themselves
    x[:, 0] += signal * (age[group] - 50) / 17
    x[:, 1] += signal * (2 * sex[group] - 1)
    split = np.array(["train", "val", "test"])[np.searchsorted([0.6, 0.75], np.arange(n) / n, side="right")][group]
    texts = {"age": cells(*(f"{a:.1f}" for a in age[group])), "sex": cells(*("FM"[s] for s in sex[group]))}
    return x, {name: parse(name, column) for name, column in texts.items()}, split, group


@pytest.mark.parametrize("folds", [0, 5])
@pytest.mark.parametrize("name", ["age", "sex"])
def test_what_is_there_is_found_and_what_is_not_is_not(name, folds):
    settings = Settings(folds=folds, permutations=30)
    x, columns, split, group = patients()
    found = measure(x, columns[name], split, group, settings)
    main = found.metrics[found.main]
    assert main.low <= main.value <= main.high and main.value > 0.6 and found.p == 1 / 31
    assert found.main == {"age": "r2", "sex": "mean_auc"}[name]
    assert len(found.rows) == (240 if folds else 60) and (found.rows == np.sort(found.rows)).all()
    x, columns, split, group = patients(signal=0.0)
    nothing = measure(x, columns[name], split, group, settings)
    assert nothing.p > 0.05
    assert nothing.metrics[nothing.main].value < {"age": 0.1, "sex": 0.75}[name]


def test_p_values_are_honest_where_patients_repeat():
    """No signal, six images a patient: the share of p <= 0.2 stays near 0.2, which shuffling single images would exceed."""
    small, naive = 0, 0
    for seed in range(30):
        x, columns, split, group = patients(seed, signal=0.0, n=30, each=6)
        small += measure(x, columns["age"], split, group, Settings(permutations=19)).p <= 0.2
        naive += measure(x, columns["age"], split, None, Settings(permutations=19)).p <= 0.2
    assert small <= 12
    assert naive >= small


def test_scored_values_choose_nothing():
    x, columns, split, group = patients()
    age = columns["age"]
    turned = age.values.copy()
    turned[split == "test"] = turned[split == "test"][::-1]
    other = type(age)("age", "number", turned)
    a, b = (measure(x, one, split, group, Settings(permutations=0)) for one in (age, other))
    assert a.chosen == b.chosen and np.array_equal(a.said, b.said) and not np.array_equal(a.truth, b.truth)


def test_shuffles_exchange_patients():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2, 3], [1, 3, 3, 5])
    out = shuffled(group.astype(float), group, rng)
    assert all(len(np.unique(out[group == g])) == 1 for g in range(4)) and len(out) == 12


def test_what_cannot_be_probed_says_why():
    x, columns, split, group = patients()
    with pytest.raises(ConfigError, match="metadata_folds is 2"):
        Settings(folds=2)
    with pytest.raises(ConfigError, match="permutations is -1"):
        Settings(permutations=-1)
    with pytest.raises(DataError, match=r"60 groups for 99 folds"):
        measure(x, columns["age"], split, group, Settings(folds=99))
    gone = np.where(split == "test", np.nan, columns["age"].values)
    with pytest.raises(DataError, match=r"0 known values to score[\s\S]*metadata_folds=5"):
        measure(x, type(columns["age"])("age", "number", gone), split, group)
    same = type(columns["age"])("age", "number", np.where(split == "train", 4.0, columns["age"].values))
    with pytest.raises(DataError, match="never varies among the training images"):
        measure(x, same, split, group)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """Grey pictures as bright as the patient is old, striped where the view is "side"."""
    folder = tmp_path_factory.mktemp("metadata")
    rng = np.random.default_rng(0)
    rows = ["image,patient,split,age,view,weight"]
    for i in range(48):
        age, side = 20 + i // 2 * 2, i % 2
        pixels = np.full((24, 24), 40 + 2 * age, float) + rng.normal(0, 4, (24, 24))
        pixels[::4] += 60 * side
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
        split = ("train", "train", "val", "test")[i // 2 % 4]
        rows.append(f"{i:02d}.png,p{i // 2},{split},{age if i != 5 else ''},{'side' if side else 'front'},{50 + i % 7}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "labels.csv")


def test_as_a_protocol(table, tmp_path):
    out = tmp_path / "run"
    more = {"metadata_columns": ("age", "view", "weight"), "permutations": 40}
    found = vitkit.evaluate(**MODEL, data=table, protocols="metadata", out=str(out), **more)
    assert list(found) == ["age", "view", "weight"]
    assert found["age"]["name"] == "r2" and found["view"]["name"] == "mean_auc" and found["age"]["split"] == "test"
    assert found["age"]["r2"] > 0.8 and found["age"]["p"] < 0.05 and found["age"]["n"] == 12
    assert found["age"]["mae"] < found["age"]["baseline_mae"] and found["view"]["mean_auc"] > 0.95
    page = (out / "report.html").read_text()
    assert outside(page) == [] and "predicted against true" in page and "whole groups" in page and "Holm" in page
    kept = json.loads((out / "results.json").read_text())
    assert len(kept["columns"]["age"]["shuffles"]) == 40
    lines = (out / "predictions_age.csv").read_text().splitlines()
    assert lines[0] == "image,true,predicted" and len(lines) == 13
    assert (out / "predictions_view.csv").read_text().startswith("image,true,predicted,p(front),p(side)")
    again = vitkit.evaluate(**MODEL, data=table, metadata_columns="age", permutations=0, metadata_folds=4)
    assert again["age"]["n"] == 47 and again["age"]["split"] == "folds" and "chance" not in again["age"]


def test_settings_that_do_not_go_together(table):
    for given, words in (
        ({"protocols": "metadata"}, r"needs columns[\s\S]*--metadata_columns age"),
        ({"protocols": "knn", "metadata_columns": "age"}, "is for the protocol metadata"),
        ({"protocols": "knn,metadata", "metadata_columns": "age"}, r"knn was asked for beside it[\s\S]*two commands"),
    ):
        with pytest.raises(ConfigError, match=words):
            vitkit.evaluate(**MODEL, data=table, **given)
    with pytest.raises(DataError, match=r"there is no column 'agee'[\s\S]*did you mean 'age'"):
        vitkit.evaluate(**MODEL, data=table, metadata_columns="agee")
    with pytest.raises(DataError, match="it is not a table"):
        vitkit.evaluate(**MODEL, data="digits", metadata_columns="age")


def test_too_few_shuffles_to_show_anything_are_a_caution(table, tmp_path):
    given = {**MODEL, "data": table, "metadata_columns": "age,view", "out": str(tmp_path / "run")}
    vitkit.evaluate(**given, permutations=20)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "20 shuffles cannot give p below 0.05 for 2 columns" in page and "--permutations 200" in page
