"""`vitkit slides`: embed, evaluate, predict, from drawn slides to a saved ensemble, and what goes wrong on the way."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

import vitkit
from tests.data.test_slide import SIZE, tiled_tiff, tissue
from vitkit import weights
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.mil import protocols, store
from vitkit.evaluate.mil.bags import load_bags, read_bags
from vitkit.run import cli, slides

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = {"epochs": 6, "seeds": 2, "folds": 3, "lr": 0.03, "quiet": True}
DIM = 6


@pytest.fixture(scope="module")
def vit():
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    return weights.load(
        "vit_tiny_patch16_224",
        pretrained=False,
        arch_kwargs=kwargs,
        image_size=SIZE,
        patch_size=8,
        num_classes=0,
        seed=0,
        say=None,
    ).eval()


def features(folder, count=24, key="k", dim=DIM, seed=0, prefix="s", weak=False):
    """Feature files as `embed` writes them: a positive slide has one tile that stands out. Two slides a patient."""
    from vitkit.evaluate.mil.pictures import jpeg

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        tiles, label = int(rng.integers(4, 9)), number // 2 % 2
        x = rng.normal(size=(tiles, dim)).astype(np.float16)
        x[rng.integers(tiles), 0] += 0 if weak else 8 * label
        coords = np.array([(32 * (i % 4), 32 * (i // 4)) for i in range(tiles)], np.int32)
        facts = {"key": key, "stamp": "x", "side": 32.0, "mpp": 0.5, "slide": "a.svs", "size": [128, 96], "grid": 12}
        picture = np.frombuffer(jpeg(np.full((48, 64, 3), 230, np.uint8)), np.uint8)
        save_file(
            {"features": x, "coords": coords, "thumbnail": picture},
            folder / f"{prefix}{number:02d}.safetensors",
            {store._FORMAT: json.dumps(facts)},
        )
        rows.append((f"{prefix}{number:02d}.svs", "tumour" if label else "normal", f"{prefix}p{number // 2}"))
    return pd.DataFrame(rows, columns=["slide", "label", "patient"])


@pytest.fixture
def home(tmp_path):
    features(tmp_path / "f").to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def evaluate(home, **more):
    return vitkit.slides.evaluate(
        features=more.pop("features", home / "f"),
        labels=more.pop("labels", home / "labels.csv"),
        out=home / more.pop("out", "r"),
        **{**TRAIN, **more},
    )


# ---------------------------------------------------------------- embed


@pytest.fixture
def drawn(tmp_path):
    folder = tmp_path / "slides"
    (folder / "patient 1").mkdir(parents=True)
    tiled_tiff(folder / "patient 1" / "a.svs", [tissue(256, 192, (40, 30, 200, 160))], mpp=0.5)
    tiled_tiff(folder / "b.svs", [tissue(200, 150, (30, 20, 180, 130), seed=1)], mpp=0.5)
    return folder


def test_embedding_writes_features_a_table_and_a_page_and_resumes(tmp_path, drawn, vit, capsys):
    out = tmp_path / "f"
    found = vitkit.slides.embed(model=vit, data=drawn, out=out, workers=1)
    said = capsys.readouterr().err
    assert found.done == ["b", "a"] and "2 slides" in said and "0.5 um a pixel" in said
    table = pd.read_csv(out / "slides.csv")
    assert table.slide.tolist() == ["b", "a"] and (table.tiles > 0).all() and (table.tiles < table.of).all()
    page = (out / "slides.html").read_text()
    assert page.count("data:image/jpeg") == 2 and "http://" not in page and 'src="http' not in page
    slide = store.read_features(out / "a.safetensors")
    assert slide.placed and slide.size == (256, 192) and slide.thumbnail.shape == (192, 256, 3) and slide.mpp == 0.5
    (out / "a.safetensors").write_bytes((out / "a.safetensors").read_bytes()[:-40])  # cut short
    again = vitkit.slides.embed(model=vit, data=drawn, out=out, workers=1, quiet=True)
    assert again.done == ["a"] and again.skipped == ["b"]
    assert json.loads((out / "embedding.json").read_text())["mpp"] == 0.5


def test_another_tiling_never_replaces_features_by_accident(tmp_path, drawn, vit):
    out = tmp_path / "f"
    vitkit.slides.embed(model=vit, data=drawn, out=out, quiet=True)
    with pytest.raises(ConfigError, match=r"another model or tiling \(min_tissue 0\.6 -> 0\.3\)(.|\n)*--replace"):
        vitkit.slides.embed(model=vit, data=drawn, out=out, min_tissue=0.3, quiet=True)
    assert len(vitkit.slides.embed(model=vit, data=drawn, out=out, min_tissue=0.3, replace=True, quiet=True).done) == 2


def test_slides_without_resolution_or_tissue_are_listed_and_all_of_them_stop_the_run(tmp_path, drawn, vit, capsys):
    tiled_tiff(drawn / "no_mpp.svs", [tissue(200, 150)])
    tiled_tiff(drawn / "dpi.svs", [tissue(200, 150)], mpp=84.7)  # 300 dots an inch
    tiled_tiff(drawn / "glass.svs", [np.full((150, 200, 3), 243, np.uint8)], mpp=0.5)
    stored = vitkit.slides.embed(model=vit, data=drawn, out=tmp_path / "p", mpp=None, min_tissue=0, quiet=True)
    assert len(stored.done) == 5  # stored pixels need no resolution, and no tissue is sought
    found = vitkit.slides.embed(model=vit, data=drawn, out=tmp_path / "f", workers=1)
    assert set(found.bad) == {"no_mpp", "dpi", "glass"} and "left out: " in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "f" / "slides.csv").set_index("slide")
    assert "how many micrometres" in table.left_out["no_mpp"] and "how many micrometres" in table.left_out["dpi"]
    assert (
        "60% tissue" in table.left_out["glass"] and "could not be used" in (tmp_path / "f" / "slides.html").read_text()
    )
    only = tmp_path / "only"
    only.mkdir()
    tiled_tiff(only / "x.svs", [tissue(200, 150)])
    with pytest.raises(DataError, match=r"none of 1 slides could be used(.|\n)*--slide_mpp"):
        vitkit.slides.embed(model=vit, data=only, out=tmp_path / "g", quiet=True)
    assert vitkit.slides.embed(model=vit, data=only, out=tmp_path / "h", slide_mpp=0.5, quiet=True).done == ["x"]


def test_what_an_earlier_run_wrote_of_a_slide_that_cannot_be_used_now_is_removed(tmp_path, drawn, vit):
    out = tmp_path / "f"
    tiled_tiff(drawn / "c.svs", [tissue(200, 150, (50, 50, 110, 90), seed=1)], mpp=0.5)
    assert len(vitkit.slides.embed(model=vit, data=drawn, out=out, min_tissue=0.2, quiet=True).done) == 3
    found = vitkit.slides.embed(model=vit, data=drawn, out=out, min_tissue=0.95, replace=True, quiet=True)
    assert set(found.bad) == {"c"} and not (out / "c.safetensors").exists()
    assert read_bags(out).names == ["a", "b"]  # of one tiling


def test_a_dicom_slide_is_known_by_its_ending_in_any_case(tmp_path, vit):
    from vitkit.data.slide import dicom_slide, find_slides, open_slide

    (tmp_path / "s" / "one").mkdir(parents=True)
    (tmp_path / "s" / "one" / "A.DCM").write_bytes(b"")
    assert [path.name for path in find_slides(tmp_path / "s")] == ["one"]
    assert [path.name for path in dicom_slide(tmp_path / "s" / "one")] == ["A.DCM"]
    with pytest.raises(DataError, match=r"A\.DCM: cannot be read as a slide"):
        open_slide(tmp_path / "s" / "one")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_no_tiles_at_once_is_refused(tmp_path, drawn, vit, batch_size):
    with pytest.raises(ConfigError, match=f"batch_size is {batch_size}\n  fix: at least 1 tile"):
        vitkit.slides.embed(model=vit, data=drawn, out=tmp_path / "f", batch_size=batch_size, quiet=True)


def test_folders_of_tiles_are_put_together_where_names_say_their_places(tmp_path, vit):
    from PIL import Image

    for name, names in (("placed", ["t_0_0", "t_32_0", "t_0_32"]), ("loose", ["a", "b"])):
        (tmp_path / "s" / name).mkdir(parents=True)
        for seed, one in enumerate(names):
            Image.fromarray(tissue(SIZE, SIZE, (0, 0, SIZE, SIZE), seed)).save(tmp_path / "s" / name / f"{one}.png")
    vitkit.slides.embed(model=vit, data=tmp_path / "s", out=tmp_path / "f", quiet=True)
    placed, loose = (store.read_features(tmp_path / "f" / f"{n}.safetensors") for n in ("placed", "loose"))
    assert placed.placed and placed.side == 32 and placed.size == (64, 64) and not loose.placed
    assert (placed.thumbnail[-100:, -100:] > 250).all()  # no tile lies there
    assert (tmp_path / "f" / "slides.html").read_text().count("data:image/jpeg") == 2


# ---------------------------------------------------------------- evaluate and predict


def test_from_features_to_a_report_and_a_prediction(home, capsys):
    found = evaluate(home, heads="abmil,mean,max")
    assert [arm["name"] for arm in found["arms"]] == ["abmil", "mean", "max"] and len(found["pairs"]) == 3
    arm = found["arms"][0]
    score = arm["scores"]["cross-validation"]
    assert score["value"] > 0.8 and score["n"] == 12 and arm["models"] == 6 and len(arm["folds"]) == 3
    assert score["value"] == pytest.approx(np.mean(arm["folds"]))
    assert all(pair["p_holm"] >= pair["p"] for pair in found["pairs"])
    page = (home / "r" / "report.html").read_text()
    assert "Which differ?" in page and page.count("data:image/jpeg") == 12 and "after Holm" in page
    held = pd.read_csv(home / "r" / "predictions_cross-validation_abmil.csv")
    assert held.fold.nunique() == 3 and held.groupby("patient").fold.nunique().max() == 1
    new = features(home / "new", seed=5, prefix="n")
    table = vitkit.slides.predict(home / "r", home / "new", out=home / "p.csv", heatmaps=home / "maps")
    assert table.columns.tolist() == ["slide", "tiles", "p_normal", "p_tumour", "predicted", "spread"]
    assert (table.predicted.to_numpy() == new.label.to_numpy()).mean() > 0.8
    assert len(list((home / "maps").glob("*.png"))) == 24 and len(pd.read_csv(home / "p.csv")) == 24
    other = vitkit.slides.predict(home / "r", home / "new", head="mean")
    assert not np.allclose(other.p_tumour, table.p_tumour)
    assert cli.main(["slides", "predict", str(home / "r"), str(home / "new"), "--out", str(home / "q.csv")]) == 0
    assert (home / "q.csv").read_text() == (home / "p.csv").read_text()


def test_a_stopped_run_goes_on_and_a_finished_one_is_kept(home, monkeypatch, capsys):
    from vitkit.run import slides_evaluate

    real, calls = slides_evaluate._arm, []

    def stops(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(slides_evaluate, "_arm", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(home)
    monkeypatch.setattr(slides_evaluate, "_arm", real)
    first = (home / "r" / "heads" / "abmil.safetensors").stat().st_mtime_ns
    found = evaluate(home)
    assert (home / "r" / "heads" / "abmil.safetensors").stat().st_mtime_ns == first
    fresh = evaluate(home, out="fresh")
    assert [a["scores"] for a in found["arms"]] == [a["scores"] for a in fresh["arms"]]
    assert evaluate(home, quiet=False)["verdict"] == found["verdict"]
    assert "nothing to do" in capsys.readouterr().err
    table = pd.read_csv(home / "labels.csv")
    table.loc[[0, 2], "label"] = table.loc[[2, 0], "label"].to_numpy()
    table.to_csv(home / "labels.csv", index=False)
    with pytest.raises(ConfigError, match="other labels or features"):
        evaluate(home)


def test_nested_chooses_inside_and_an_external_cohort_is_scored_once(home):
    found = evaluate(
        home, nested=True, inner=2, folds=2, seeds=1, epochs=4, lr=(0.03, 0.003), heads="abmil", heatmaps=0
    )
    chosen = found["arms"][0]["chosen"]
    assert len(chosen) == 2 and all(1 <= one["epochs"] <= 4 and one["lr"] in (0.03, 0.003) for one in chosen)
    for name, seed in (("e1", 7), ("e2", 8)):
        features(home / "x", seed=seed, prefix=name).to_csv(home / f"{name}.csv", index=False)
    outside = {"external": f"{home / 'e1.csv'},{home / 'e2.csv'}", "external_features": home / "x", "out": "e"}
    found = evaluate(home, **outside)
    scores = found["arms"][0]["scores"]
    assert list(scores) == ["e1", "e2"] and scores["e1"]["n"] == 12 and found["arms"][0]["members_mean"]["e1"] > 0.6
    turned = pd.read_csv(home / "e1.csv")
    turned["label"] = turned.label.map({"normal": "tumour", "tumour": "normal"})
    turned.to_csv(home / "e1.csv", index=False)
    again = evaluate(home, **{**outside, "out": "t"})["arms"][0]
    assert again["chosen"] == found["arms"][0]["chosen"]  # nothing is chosen on it
    assert again["scores"]["e1"]["value"] == pytest.approx(1 - scores["e1"]["value"])


def test_encoders_whose_names_differ_by_a_sign_keep_their_own_heads(home):
    features(home / "vit-s").to_csv(home / "labels.csv", index=False)
    features(home / "vit_s", seed=3, weak=True)
    found = evaluate(home, features=[str(home / "vit-s"), str(home / "vit_s")], heads="max")
    good, weak = found["arms"]
    assert good["file"] == "heads/vit_s_max-1.safetensors" and weak["file"] == "heads/vit_s_max-2.safetensors"
    assert good["scores"] != weak["scores"] and len(list((home / "r" / "heads").glob("*.npz"))) == 2


def test_a_finished_page_is_drawn_again_for_another_number_of_heatmaps(home):
    first = evaluate(home, heads="abmil", heatmaps=2)
    heads = (home / "r" / "heads" / "abmil.safetensors").stat().st_mtime_ns
    again = evaluate(home, heads="abmil", heatmaps=0)
    assert first["verdict"] == again["verdict"] and "data:image/jpeg" not in (home / "r" / "report.html").read_text()
    assert (home / "r" / "heads" / "abmil.safetensors").stat().st_mtime_ns == heads
    assert (home / "r" / "summary.json").is_file()


@pytest.mark.parametrize("count", [0, -5])
def test_fewer_than_one_tile_a_slide_is_refused(home, count):
    with pytest.raises(ConfigError, match=f"max_tiles is {count}\n  fix: at least 1 tile of each slide"):
        evaluate(home, max_tiles=count)


def test_two_encoders_are_compared_on_the_same_slides_and_folds(home):
    features(home / "g", key="other", dim=4, seed=3, weak=True)
    found = evaluate(home, features=f"{home / 'f'},{home / 'g'}", heads="abmil,mean", epochs=12)
    assert [arm["name"] for arm in found["arms"]] == ["f abmil", "f mean", "g abmil", "g mean"]
    assert {(p["a"], p["b"]) for p in found["pairs"]} == {
        ("f abmil", "f mean"), ("f abmil", "g abmil"), ("f mean", "g mean"), ("g abmil", "g mean")
    }  # fmt: skip
    encoder = next(p for p in found["pairs"] if (p["a"], p["b"]) == ("f abmil", "g abmil"))
    assert encoder["cohorts"]["cross-validation"]["value"] > 0.2 and encoder["p"] < 0.05
    with pytest.raises(ConfigError, match="another encoder or tiling"):
        features(home / "n", key="third")
        vitkit.slides.predict(home / "r", home / "n")
    assert len(vitkit.slides.predict(home / "r", home / "g")) == 24  # the heads that fit these features


def test_survival_by_concordance_within_folds(home):
    table = features(home / "f", count=60)
    rng = np.random.default_rng(0)
    table["months"] = np.where(table.label == "tumour", 5, 20) + 5 * rng.random(60)
    table["died"] = (rng.random(60) < 0.8).astype(int)
    table.to_csv(home / "labels.csv", index=False)
    found = evaluate(home, label="months", event="died", heads="abmil", epochs=20, lr=3e-3)
    assert found["metric"] == "C-index" and found["arms"][0]["scores"]["cross-validation"]["value"] > 0.6
    assert vitkit.slides.predict(home / "r", home / "f").columns.tolist() == ["slide", "tiles", "risk", "spread"]


# ---------------------------------------------------------------- what goes wrong


def test_labels_and_features_that_do_not_match(home):
    table = pd.read_csv(home / "labels.csv")
    more = pd.concat([table, pd.DataFrame({"slide": ["zz"], "label": ["tumour"], "patient": ["pz"]})])
    more.to_csv(home / "more.csv", index=False)
    with pytest.raises(DataError, match=r"labels for 1 of 25 slides without features in .*: zz(.|\n)*missing=skip"):
        evaluate(home, labels=home / "more.csv")
    assert len(load_bags(home / "f", home / "more.csv", missing="skip")) == 24
    table.iloc[:20].to_csv(home / "few.csv", index=False)
    found = evaluate(home, labels=home / "few.csv", heads="mean", out="few")
    assert any("4 slides have features but no label" in text for text in found["cautions"])
    table.assign(patient=[None, *table.patient[1:]]).to_csv(home / "gap.csv", index=False)
    with pytest.raises(DataError, match=r"no patient for s00"):
        evaluate(home, labels=home / "gap.csv", out="gap")
    with pytest.raises(ConfigError, match="positive is tumor, which no slide is"):
        evaluate(home, positive="tumor", out="pos")
    assert load_bags(home / "f", home / "labels.csv", positive="normal").classes == ["tumour", "normal"]
    with pytest.raises(DataError, match="holds no slide features"):
        evaluate(home, features=home / "nowhere", out="no")


def test_names_and_patients_keep_their_zeros(home):
    for path in (home / "f").glob("*.safetensors"):
        path.rename(path.with_name(f"0{path.name[1:]}"))
    rows = [f"{n:03d},{'ab'[n // 2 % 2]},{n // 2:04d}" for n in range(24)]
    (home / "labels.csv").write_text("slide,label,patient\n" + "\n".join(rows) + "\n")
    bags = load_bags(home / "f", home / "labels.csv")
    assert bags.names[7] == "007" and bags.patients[7] == "0003"


def test_mixed_damaged_and_empty_features_are_named(home):
    features(home / "m", key="a")
    features(home / "m", key="b", count=2, prefix="s")
    with pytest.raises(DataError, match="mixes features of 2 encoders or tilings"):
        read_bags(home / "m")
    features(home / "w", key="a")
    features(home / "w", key="a", count=2, dim=3)
    with pytest.raises(DataError, match="mixes features of 2"):
        read_bags(home / "w")
    path = home / "f" / "s03.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"s03\.safetensors: not a file of slide features, or one that is cut short"):
        evaluate(home)
    facts = {"key": "k", "stamp": "x", "side": 1.0, "mpp": None, "slide": "a", "size": None, "grid": 0}
    empty = {"features": np.zeros((0, DIM), np.float16), "coords": np.zeros((0, 2), np.int32)}
    save_file({**empty, "thumbnail": np.zeros(1, np.uint8)}, path, {store._FORMAT: json.dumps(facts)})
    with pytest.raises(DataError, match=r"s03\.safetensors: a slide without a tile"):
        evaluate(home, out="e")


def test_folds_of_one_class_are_refused(home):
    table = pd.read_csv(home / "labels.csv")
    table["label"] = ["tumour"] * 4 + ["normal"] * 20
    table.to_csv(home / "labels.csv", index=False)
    with pytest.raises(DataError, match=r"'tumour' has slides of 2 patients, too few for 3 folds(.|\n)*at most 2"):
        evaluate(home)
    table["label"], table["patient"] = ["tumour", "normal"] * 12, ["p0"] * 20 + ["p1", "p2", "p3", "p4"]
    table.to_csv(home / "labels.csv", index=False)
    with pytest.raises(DataError, match=r"lacks a class|too few"):
        evaluate(home, folds=3, out="b")


def test_a_patient_in_both_cohorts_is_refused(home):
    with pytest.raises(DataError, match="12 patients are in the development and in the test"):
        evaluate(home, external=home / "labels.csv")


def test_settings_that_cannot_be(home, capsys):
    with pytest.raises(ConfigError, match=r"2 recipes to choose from(.|\n)*--nested"):
        evaluate(home, lr=(1e-3, 1e-4))
    with pytest.raises(ConfigError, match="did you mean abmil"):
        evaluate(home, heads="abmill")
    with pytest.raises(ConfigError, match="needs labels"):
        evaluate(home, labels=None)
    with pytest.raises(ConfigError, match="external_features without external"):
        evaluate(home, external_features=home / "f")
    assert cli.main(["slides", "evalute"]) == 2 and "did you mean evaluate" in capsys.readouterr().err
    assert cli.main(["slides", "predict", "r"]) == 2 and "got 1 names" in capsys.readouterr().err
    assert cli.main(["slides", "predict", "r", "f", "--head"]) == 2 and "needs a value" in capsys.readouterr().err
    assert cli.main(["slides", "predict", str(home), str(home / "f")]) == 2
    assert "no finished `vitkit slides evaluate`" in capsys.readouterr().err
    assert cli.main(["slides", "evaluate", "--labels", "x", "--out", "y"]) == 2
    assert "give --features FOLDER" in capsys.readouterr().err


def test_scores_of_different_folds_are_never_ranked_against_each_other():
    """Two folds, each in perfect order, one of them shifted: pooling would say .75."""
    from vitkit.evaluate.mil import inference

    y, fold = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    shifted = np.array([0.1, 0.2, 0.8, 0.9])
    assert inference.score(y, shifted) == 0.75 and inference.score(y, shifted, fold) == 1
    times = np.array([4.0, 2.0, 4.0, 2.0])
    assert inference.score(times, shifted) < 1 and inference.score(times, shifted, fold) == 1


def test_disagreeing_cohorts_speak_against_each_other():
    from vitkit.evaluate.mil.bags import Bags

    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    bags = Bags.of([torch.randn(2, 3)] * 60, y)
    good, bad = y + rng.normal(0, 0.5, 60), rng.normal(size=60)
    one, other = {"a": good, "b": bad}, {"a": bad, "b": good}
    agree = protocols.compare_arms({x: protocols.Cohort(bags, one) for x in "xy"}, [("a", "b")])[0]
    against = protocols.compare_arms(
        {"x": protocols.Cohort(bags, one), "y": protocols.Cohort(bags, other)}, [("a", "b")]
    )
    assert agree.p < 0.01 and against[0].p > 0.1 and against[0].corrected == against[0].p


@pytest.mark.parametrize("page", ["docs/slides.md", "docs/systems/phikon_v2.md", "vitkit/evaluate/phikon_v2.py"])
def test_commands_of_the_pages_are_understood(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*vitkit slides (embed|evaluate) --", line)]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        assert slides.settings_for(words[2], words[3:])
