"""`vitkit evaluate` and `vitkit embed`: nothing is chosen on scored images, files agree, pages load nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vitkit
from vitkit.data import read
from vitkit.errors import ConfigError, DataError
from vitkit.run import gallery, measure
from vitkit.settings import Machine

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 4}
MODEL = {
    "model": "VisionTransformer",
    "arch_kwargs": TINY,
    "pretrained": False,
    "image_size": 12,
    "quiet": True,
    "accelerator": "cpu",
}
SIZES = {"train": 36, "val": 18, "test": 24}


def pictures(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise whose brightness depends on the class, uint8 (N, 12, 12)."""
    level = np.array([60, 120, 180])[labels][:, None, None]
    return np.clip(level + rng.normal(0, 30, (len(labels), 12, 12)), 0, 255).astype(np.uint8)


def blobs(path: Path, *, shuffle: str = "", without: tuple[str, ...] = (), groups: bool = False) -> str:
    """An .npz of three classes with splits; `shuffle` permutes the labels of one split."""
    rng = np.random.default_rng(0)
    content, owners = {}, []
    for split, n in SIZES.items():
        labels = np.arange(n) % 3
        x = pictures(labels, rng)
        if split not in without:
            y = np.roll(labels, 1) if split == shuffle else labels
            content |= {f"x_{split}": x, f"y_{split}": y}
            owners += [f"{split}-{i // 3}" for i in range(n)]
    if groups:
        content["group"] = np.array(owners)
    np.savez(path, **content)
    return str(path)


def multi(folder: Path) -> str:
    """A table of pictures with two labels each, some unknown."""
    from PIL import Image

    rng = np.random.default_rng(1)
    rows = ["path,bright,left,patient,split"]
    for i in range(60):
        bright, left = i % 2, (i // 2) % 2
        picture = np.full((12, 12), 80 + 80 * bright) + rng.normal(0, 20, (12, 12))
        picture[:, :6] += 60 * left
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
        split = "train" if i < 30 else "val" if i < 40 else "test"
        rows.append(f"{i:02d}.png,{bright},{'' if i % 10 == 7 else left},p{i // 2},{split}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "labels.csv")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return blobs(tmp_path_factory.mktemp("data") / "blobs.npz")


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "eval"
    return out, vitkit.evaluate(**MODEL, data=data, out=str(out))


def outside(page: str) -> list[str]:
    """Addresses in a page, but for the name of SVG's namespace."""
    return [
        one for one in re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", page) if one != "http://www.w3.org/2000/svg"
    ]


# ---------------------------------------------------------------- evaluate


def test_protocols_score_the_test_split_with_intervals(evaluated):
    _, found = evaluated
    assert list(found) == ["knn", "linear"]
    for entry in found.values():
        assert entry["name"] == "accuracy" and entry["n"] == 24 and entry["split"] == "test"
        assert entry["value"] == entry["accuracy"] > 0.8
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
        assert entry["picked_on"] == "validation" and entry["seconds"] > 0
        assert {"balanced_accuracy", "macro_f1", "mean_auc", "log_loss", "calibration_error"} <= entry.keys()
    assert re.fullmatch(r"k=\d+", found["knn"]["chosen"]) and found["linear"]["chosen"].startswith("penalty=")


def test_nothing_is_written_without_out(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vitkit.evaluate(**MODEL, data=data, protocols="knn")
    assert list(tmp_path.iterdir()) == []


def test_files_of_an_evaluation(evaluated, capsys):
    import pandas as pd

    out, found = evaluated
    results = json.loads((out / "results.json").read_text())
    assert results["trained_on"] == 36 and results["protocols"]["knn"]["value"] == found["knn"]["value"]
    assert len(results["protocols"]["linear"]["curve"]) == 17 and results["images_per_second"] > 0
    for protocol, entry in found.items():
        frame = pd.read_csv(out / f"predictions_{protocol}.csv", dtype={"label": str, "predicted": str})
        assert len(frame) == 24 and (frame.label == frame.predicted).mean() == pytest.approx(entry["accuracy"])
    assert vitkit.Passport.read(out).arch == "VisionTransformer"
    page = (out / "report.html").read_text()
    assert "k nearest neighbours" in page and "penalty" in page and "Confusion, linear probe" in page
    assert outside(page) == []


def test_the_same_command_takes_features_from_the_cache(evaluated, data, monkeypatch):
    out, found = evaluated

    def never(*args):
        raise AssertionError("features were computed again")

    monkeypatch.setattr("vitkit.tokens.feature", never)
    again = vitkit.evaluate(**MODEL, data=data, out=str(out))
    assert {k: v["value"] for k, v in again.items()} == {k: v["value"] for k, v in found.items()}
    assert json.loads((out / "results.json").read_text())["images_per_second"] is None


def test_another_evaluation_does_not_replace_it(evaluated, data):
    out, _ = evaluated
    with pytest.raises(ConfigError, match=r"(?s)holds another run.*k: auto -> 3") as caught:
        vitkit.evaluate(**MODEL, data=data, out=str(out), k=3)
    assert "fix: choose another --out" in str(caught.value)


@pytest.mark.parametrize(("shuffled", "without"), [("test", ()), ("val", ("test",))])
def test_labels_of_scored_images_select_nothing(tmp_path, shuffled, without):
    """Their permutation changes scores only: not what is chosen, nor what is predicted."""
    straight = blobs(tmp_path / "straight.npz", without=without)
    turned = blobs(tmp_path / "turned.npz", without=without, shuffle=shuffled)
    seen = []
    for name, spec in (("a", straight), ("b", turned)):
        found = vitkit.evaluate(**MODEL, data=spec, out=str(tmp_path / name))
        assert all(entry["split"] == shuffled for entry in found.values())
        seen.append(found)
    for protocol in ("knn", "linear"):
        a, b = (json.loads((tmp_path / n / "results.json").read_text())["protocols"][protocol] for n in "ab")
        assert a["chosen"] == b["chosen"] and a["curve"] == b["curve"] and a["value"] != b["value"]
        tables = [(tmp_path / n / f"predictions_{protocol}.csv").read_text().splitlines() for n in "ab"]
        cut = [[row.split(",", 2)[2] for row in table] for table in tables]
        assert cut[0] == cut[1]


def test_without_a_test_split_the_choice_is_made_in_the_training_images(tmp_path):
    found = vitkit.evaluate(**MODEL, data=blobs(tmp_path / "b.npz", without=("test",)))
    assert found["linear"]["picked_on"] == "cross-validation" and found["linear"]["split"] == "val"
    assert found["knn"]["picked_on"].startswith("the training images")


def test_given_k_and_few_labels_are_used(data, tmp_path):
    found = vitkit.evaluate(**MODEL, data=data, k=2, protocols="knn", labels_per_class=4, out=str(tmp_path / "e"))
    assert found["knn"]["chosen"] == "k=2" and found["knn"]["picked_on"] == "nothing: it was given"
    assert json.loads((tmp_path / "e" / "results.json").read_text())["trained_on"] == 12


def test_several_labels_and_patients(tmp_path):
    found = vitkit.evaluate(**MODEL, data=multi(tmp_path), out=str(tmp_path / "e"))
    assert found["linear"]["name"] == "mean_auc" and found["linear"]["n"] == 20
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Each label" in page and "bootstrap over whole groups" in page and "10 groups" in page


def test_groups_widen_nothing_else_but_are_drawn_whole(tmp_path):
    from vitkit.evaluate import statistics

    calls = []
    real = statistics.bootstrap

    def spy(*args, **kwargs):
        calls.append(kwargs.get("groups"))
        return real(*args, **kwargs)

    statistics.bootstrap = spy
    try:
        vitkit.evaluate(**MODEL, data=blobs(tmp_path / "g.npz", groups=True), protocols="knn")
    finally:
        statistics.bootstrap = real
    assert len(np.unique(calls[0])) == 8


def test_a_model_trained_on_other_splits_of_the_data_is_cautioned(data):
    images = read(data, say=lambda text: None)
    vit = vitkit.load("VisionTransformer", pretrained=False, arch_kwargs=TINY, image_size=12, say=None).vit
    record = {"method": "adapt.full", "data": {"name": images.name, "fingerprint": images.fingerprint}}
    vit.passport.lineage = [record]
    assert measure.overlap_with_training(vit, images) == []
    vit.passport.lineage = [{**record, "data": {"name": images.name, "fingerprint": "other"}}]
    (text,) = measure.overlap_with_training(vit, images)
    assert text.startswith("adapt.full trained this model on other splits")


def test_groups_in_several_splits_are_cautioned(tmp_path, capsys):
    content = dict(np.load(blobs(tmp_path / "a.npz", groups=True)))
    content["group"][:] = "p"
    np.savez(tmp_path / "b.npz", **content)
    given = {**MODEL, "quiet": False, "data": str(tmp_path / "b.npz"), "out": str(tmp_path / "o")}
    vitkit.evaluate(**given, protocols="knn")
    said = json.loads((tmp_path / "o" / "results.json").read_text())["cautions"]
    assert "1 group (patient, slide) is in several splits, e.g. p in train" in said[0]
    assert "caution: 1 group" in capsys.readouterr().err


def test_nothing_to_score_is_said(tmp_path):
    with pytest.raises(DataError, match="no labelled test or validation images to score"):
        spec = blobs(tmp_path / "b.npz", without=("val", "test"))
        vitkit.evaluate(**MODEL, data=spec, val_fraction=0.0, test_fraction=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 2}, r"devices is 2, and vitkit evaluate runs in one process\n  fix: leave devices out"),
        ({"precision": "bf16"}, r"computes features in float32\n  fix: leave precision out"),
        (
            {"protocols": "knn,lienar"},
            r"there is no protocol 'lienar'\n  fix: did you mean linear\? protocols: knn, linear, mlknn",
        ),
    ],
)
def test_settings_that_do_not_apply_are_refused(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        vitkit.evaluate(**{**MODEL, **settings}, data=data)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="accelerator is cuda, but torch finds no such device"):
        measure.device_of(Machine(accelerator="cuda"), "evaluate")
    assert measure.device_of(Machine(), "evaluate").type in ("cpu", "mps")


def test_progress_says_how_fast(capsys):
    with measure.Counter(100, every=0.0) as counter:
        step = counter.at("train")
        step(50, 60)
        step(60, 60)
        counter.at("test")(40, 40)
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"features of train images: 50 of 100, [\d,]+ images/s, \d+ s left", lines[0])
    assert re.match(r"features of 100 images at [\d,]+ images/s", lines[-1])
    with measure.Counter(1, quiet=True) as counter:
        counter.at("train")(1, 1)
    assert capsys.readouterr().err == ""


def test_a_callers_random_numbers_are_left_alone(data):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    vitkit.evaluate(**MODEL, data=data, protocols="knn")
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- embed


@pytest.fixture(scope="module")
def embedded(data, tmp_path_factory) -> tuple[Path, np.ndarray]:
    out = tmp_path_factory.mktemp("runs") / "embed"
    return out, vitkit.embed(**MODEL, data=data, out=str(out))


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_features_names_and_passport_are_written(embedded, data):
    import pandas as pd

    out, x = embedded
    assert x.shape == (78, 24) and x.dtype == np.float32
    assert np.array_equal(np.load(out / "features.npy"), x)
    frame = pd.read_csv(out / "images.csv", dtype=str)
    images = read(data, say=lambda text: None)
    assert list(frame.name) == images.names and list(frame.split) == list(images.split)
    assert list(frame.label) == [images.classes[i] for i in images.labels]
    model = vitkit.load("VisionTransformer", pretrained=False, arch_kwargs=TINY, image_size=12, say=None)
    assert np.allclose(model.embed(data), x, atol=1e-6)
    assert vitkit.Passport.read(out).preprocess == model.passport.preprocess


def test_the_gallery_is_one_file_that_loads_nothing(embedded):
    import base64
    import hashlib

    out, _ = embedded
    page = (out / "gallery.html").read_text()
    assert outside(page) == []
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in page
    found = page_data(page)
    assert found["total"] == 78 and len(found["points"]["i"]) == 78 and len(found["asked"]) == 78
    assert [one["name"] for one in found["colours"]] == ["label", "split"]
    assert all(picture["u"].startswith("data:image/") for picture in found["pictures"].values())


def test_neighbours_in_the_gallery_are_the_most_similar_others(embedded):
    out, x = embedded
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    near = page_data((out / "gallery.html").read_text())["near"]
    for i, found in near.items():
        wanted = np.sort(similarity[int(i)])[::-1][:12]
        assert int(i) not in [j for j, _ in found]
        assert np.allclose([s for _, s in found], wanted, atol=6e-4)


def test_a_folder_without_labels_is_embedded(tmp_path, capsys):
    from PIL import Image

    for i in range(5):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(tmp_path / f"<b>{i}.png")
    x = vitkit.embed(**MODEL, data=str(tmp_path), out=str(tmp_path / "out"))
    assert x.shape == (5, 24)
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert "<b>0.png" not in page and page_data(page)["items"]["0"][0].endswith("<b>0.png")
    assert [one["name"] for one in page_data(page)["colours"]] == ["split"]
    assert "nearest neighbour</dt>" not in page
    assert (tmp_path / "out" / "images.csv").read_text().splitlines()[0] == "name,split,label,group"


def test_embed_needs_somewhere_to_write(data):
    with pytest.raises(
        ConfigError, match=r"out is empty, and vitkit embed writes its features\n  fix: --out embeddings"
    ):
        vitkit.embed(**MODEL, data=data, out="")


def test_duplicates_across_splits_come_first(tmp_path):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    x[1], x[30] = x[0] * 2, x[5] + 1e-4  # (0, 1) within train; (5, 30) across
    labels = np.arange(40) % 2
    np.savez(tmp_path / "d.npz", x=pictures(labels, rng), y=labels, split=np.array(["train"] * 20 + ["test"] * 20))
    images = read(str(tmp_path / "d.npz"), say=lambda text: None)
    found = gallery.write(tmp_path / "g.html", images, x, title="t", facts={})
    twins = page_data((tmp_path / "g.html").read_text())
    assert found["twins"] == 2 and [t[:2] for t in twins["twins"]] == [[5, 30], [0, 1]]
    assert [t[3] for t in twins["twins"]] == [True, False]
    assert twins["twinNote"].startswith("2 pairs are more than 0.99 alike (cosine), among all 40 images")
    same = gallery._twin_note([(0, 1, 1.0), (2, 3, 1.0)], 8, 8)
    assert "hardly tells these images apart" in same
    assert gallery._twin_note([], 8, 8).startswith("No two images are more than 0.99 alike")


def test_principal_axes_are_scikit_learns():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(50, 6)) @ np.diag([5, 3, 1, 1, 1, 1])
    found, explained = gallery.principal_axes(x.astype(np.float32))
    pca = PCA(2).fit(x)
    assert np.allclose(np.abs(found), np.abs(pca.transform(x)), atol=1e-4)
    assert np.allclose(explained, pca.explained_variance_ratio_, atol=1e-6)
    flat, nothing = gallery.principal_axes(np.ones((4, 1), np.float32))
    assert flat.shape == (4, 2) and not flat.any() and nothing == (0.0, 0.0)


def test_shown_images_are_spread_over_labels(tmp_path, monkeypatch):
    labels = np.array([0] * 90 + [1] * 8 + [2] * 2)
    np.savez(tmp_path / "s.npz", x=pictures(labels, np.random.default_rng(0)), y=labels)
    images = read(str(tmp_path / "s.npz"), say=lambda text: None)
    rows = gallery.spread(images, 12, seed=0)
    assert len(rows) == 12 and np.bincount(images.labels[rows]).tolist() == [5, 5, 2]
    assert np.array_equal(rows, gallery.spread(images, 12, seed=0))
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    monkeypatch.setattr(gallery, "MOST_PICTURES", 40)
    monkeypatch.setattr(gallery, "MOST_COMPARED", 50)
    monkeypatch.setattr(gallery, "MOST_POINTS", 30)
    gallery.write(tmp_path / "g.html", images, x, title="t", facts={})
    found = page_data((tmp_path / "g.html").read_text())
    assert len(found["pictures"]) <= 40 and 1 <= len(found["asked"]) < 12
    assert "among 50 of 100 images" in found["twinNote"] and len(found["points"]["i"]) < 50
