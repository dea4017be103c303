"""`vitkit explain` end to end on tiny models: what is written, what the page holds, and what is refused in which words."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import vitkit
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.explain import attention, grad_cam, pca
from vitkit.run import explain_figures, explaining
from vitkit.run.folder import RunFolder

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "num_classes": 3}
CLASSES = ["blue", "green", "red"]


def colour_folder(path, sizes=((32, 32),), count=4):
    """Class folders of noisy pictures in which one channel is bright."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(reversed(CLASSES)):
        (path / name).mkdir(parents=True)
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            picture = rng.integers(0, 90, (height, width, 3))
            picture[..., channel] += 120
            Image.fromarray(picture.astype(np.uint8)).save(path / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return colour_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A weights file with a head of three classes that has learnt nothing."""
    from safetensors.torch import save_file

    where = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    torch.manual_seed(0)
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=32, **TINY)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(vit.state_dict(), where)
    config = {"img_size": 32, **{key: TINY[key] for key in ("patch_size", "num_heads")}}
    (where.parent / "config.json").write_text(json.dumps({"architecture": "VisionTransformer", **config}))
    return str(where)


@pytest.fixture(scope="module")
def explained(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "explained"
    return out, vitkit.explain(model, str(folder), out=str(out), images=6, quiet=True)


def page_data(out) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page(out), re.DOTALL)[1])


def page(out) -> str:
    return (out / "explain.html").read_text()


def unpacked(text, dtype=np.uint8):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_it_returns_and_writes_its_figures(explained):
    out, found = explained
    assert found["report"] == str(out / "explain.html") and found["images"] == 6
    assert set(found["kinds"]) == {"attention", "rollout", "grad_cam", "random"}
    results = json.loads((out / "results.json").read_text())
    assert results["verdict"] == found["verdict"] and "6 images" in found["verdict"]
    for kind in ("attention", "rollout", "grad_cam"):
        entry = results["kinds"][kind]
        rows = [one["scores"] for one in results["images"]]
        for key in ("insertion", "deletion"):
            assert entry[key] == pytest.approx(np.mean([row[kind][key] for row in rows]))
        gaps = [[row[k]["insertion"] - row[k]["deletion"] for row in rows] for k in (kind, "random")]
        assert entry["ahead"] == pytest.approx(np.mean(np.subtract(*gaps)), abs=1e-9)
        assert entry["ahead_low"] <= entry["ahead"] <= entry["ahead_high"]
        assert -1 <= entry["correlation_all"] <= 1
    assert 0 < sum(results["explained_variance"]) <= 1 and results["patches"] == 6 * 16


def test_maps_are_those_of_the_functions(explained, folder, model):
    out, _ = explained
    results = json.loads((out / "results.json").read_text())
    maps = np.load(out / "maps.npz")
    vit = _vit(model)
    for i, one in enumerate(results["images"]):
        pixels = np.array(Image.open(folder / one["name"]).convert("RGB").resize((32, 32)))
        x = vit.passport.preprocess.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        assert np.allclose(maps[f"{i:03d}.attention"], attention.saliency(vit, x)[0], atol=1e-6)
        assert np.allclose(maps[f"{i:03d}.rollout"], attention.rollout(vit, x)[0], atol=1e-6)
        cls = int(one["predicted"])
        want = grad_cam.saliency(vit, x, torch.tensor([cls]))[0]
        assert np.allclose(maps[f"{i:03d}.grad_cam.{cls}"], want, atol=1e-5)
        assert set(one["maps"]) == {key for key in maps.files if key.startswith(f"{i:03d}.")}


def _vit(model):
    return vitkit.weights.load(model, num_classes=None, say=None).eval()


def test_the_page_is_one_file_that_loads_nothing(explained):
    text = page(explained[0])
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in text
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
    assert "prefers-color-scheme: dark" in text and "<table>" in text


def test_the_page_holds_maps_colours_and_features(explained, model):
    out, _ = explained
    data, maps = page_data(out), np.load(out / "maps.npz")
    assert [len(data[key]) for key in ("items", "grids", "pca", "front")] == [6, 6, 6, 6] and data["grids"][0] == [4, 4]
    results = json.loads((out / "results.json").read_text())["images"]
    for item, one in zip(data["items"], results, strict=True):
        assert item["name"] == one["name"] and item["top"][0][0] == one["predicted"]
        for entry, name in zip(item["maps"], one["maps"], strict=True):
            values = maps[name]
            span = values.max() - values.min()
            want = np.zeros(16) if not span else np.round(255 * (values - values.min()) / span).flatten()
            assert np.array_equal(unpacked(entry["map"]), want) and entry["flat"] == (span == 0)
    assert unpacked(data["pca"][0]).shape == (48,) and unpacked(data["front"][0]).shape == (64,)
    features = unpacked(data["features"], np.int8).reshape(-1, data["dims"])
    assert features.shape == (96, 24) and np.abs(features).max() > 60


def test_clicked_patches_find_what_the_features_find(explained, folder, model):
    """The page's int8 features rank patches nearly as the model's own do."""
    out, _ = explained
    data, vit = page_data(out), _vit(model)
    small = unpacked(data["features"], np.int8).reshape(-1, data["dims"]).astype(float)
    small /= np.linalg.norm(small, axis=1, keepdims=True)
    rows = []
    for item in data["items"]:
        pixels = torch.from_numpy(np.array(Image.open(folder / item["name"]))).permute(2, 0, 1)[None]
        rows.append(pca.features(vit, vit.passport.preprocess.normalise(pixels)).flatten(0, 2))
    similarity, _ = pca.nearest(torch.cat(rows), torch.cat(rows)[:5], k=96)
    assert np.allclose(np.sort(small[:5] @ small.T)[:, ::-1], similarity, atol=0.02)


def test_the_same_command_gives_the_same_page(explained, folder, model):
    out, _ = explained
    before = page(out)
    vitkit.explain(model, str(folder), out=str(out), images=6, quiet=True)
    assert page(out) == before
    with pytest.raises(ConfigError, match=r"(?s)holds another run.*images: 6 -> 5"):
        vitkit.explain(model, str(folder), out=str(out), images=5, quiet=True)


def test_mixed_sizes_are_resized_aloud(tmp_path, model, capsys):
    data = colour_folder(tmp_path / "mixed", sizes=((40, 56), (33, 70)))
    vitkit.explain(model, str(data), out=str(tmp_path / "o"), sanity="off", maps="attention")
    said = capsys.readouterr().err
    assert (
        "images: of 2 sizes, resized and cropped to 32 x 32 by the model's preprocessing (--native keeps their own)"
        in said
    )


def test_native_keeps_sizes_cropped_to_whole_patches_and_batches_by_size(tmp_path, model, capsys, monkeypatch):
    data = colour_folder(tmp_path / "mixed", sizes=((40, 56), (33, 70)))
    batches = []
    real = attention.saliency

    def spy(vit, x, target, settings):
        batches.append(tuple(x.shape))
        return real(vit, x, target, settings)

    monkeypatch.setattr(attention, "saliency", spy)
    out = tmp_path / "o"
    vitkit.explain(model, str(data), out=str(out), native=True, images=12, sanity="quick", maps="attention")
    assert sorted(batches[:2]) == [(6, 3, 32, 64), (6, 3, 40, 56)]
    said = capsys.readouterr().err
    assert "own size, edges cropped to whole patches (2 sizes, batched by size)" in said
    grids = sorted(map(tuple, page_data(out)["grids"]))
    assert grids == [(4, 8)] * 6 + [(5, 7)] * 6
    assert {one.shape for one in np.load(out / "maps.npz").values()} == {(4, 8), (5, 7)}


def test_native_refuses_what_is_too_small_or_too_large(tmp_path, model, capsys, monkeypatch):
    Image.fromarray(np.zeros((5, 50, 3), np.uint8)).save(tmp_path / "thin.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "good.png")
    monkeypatch.setattr(explaining, "MOST_PATCHES", 64)
    found = vitkit.explain(model, str(tmp_path), out=str(tmp_path / "o"), native=True, sanity="off", maps="attention")
    said = capsys.readouterr().err
    assert found["images"] == 1 and "thin.png: a picture of 50 x 5 pixels is smaller than a patch (8, 8)" in said
    monkeypatch.setattr(explaining, "MOST_PATCHES", 63)
    with pytest.raises(DataError, match=r"good.png: a picture of 64 x 64 pixels has 64 patches, more than 63"):
        vitkit.explain(model, str(tmp_path), out=str(tmp_path / "p"), native=True, sanity="off", maps="attention")
    assert "left out: " in capsys.readouterr().err


def test_one_file_is_explained(folder, model, tmp_path):
    found = vitkit.explain(model, str(folder / "red" / "0.png"), out=str(tmp_path / "o"), quiet=True)
    assert found["images"] == 1 and "ahead_low" not in found["kinds"]["grad_cam"]
    assert ", 1 image)" in found["verdict"]


def test_unreadable_files_are_named_and_left_out(tmp_path, model, capsys):
    colour_folder(tmp_path / "d", count=1)
    (tmp_path / "d" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    out = tmp_path / "o"
    vitkit.explain(model, str(tmp_path / "d"), out=str(out), sanity="off", maps="attention")
    assert "left out: " in (said := capsys.readouterr().err) and "broken.png" in said
    assert "3, 1 could not be read" in page(out)


def test_names_cannot_break_out_of_the_page(tmp_path, model):
    for i in range(2):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(tmp_path / f"<b>{i}.png")
    out = tmp_path / "o"
    vitkit.explain(model, str(tmp_path), out=str(out), sanity="off", quiet=True)
    assert "<b>" not in page(out) and page_data(out)["items"][0]["name"].endswith("<b>0.png")


def test_without_a_head_attention_and_patches_are_shown(tmp_path, folder, capsys):
    kwargs = {key: value for key, value in TINY.items() if key not in ("patch_size", "num_classes")}
    base = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "arch_kwargs": kwargs,
        "image_size": 32,
        "patch_size": 8,
    }
    vit = vitkit.weights.load(
        base["model"], pretrained=False, arch_kwargs=kwargs, image_size=32, patch_size=8, say=None
    )
    vitkit.weights.save_run(tmp_path / "run", vit)
    out = tmp_path / "o"
    found = vitkit.explain(str(tmp_path / "run"), str(folder), out=str(out), images=3)
    assert "no classification head: attention and patches are shown" in capsys.readouterr().err
    assert set(found["kinds"]) == {"attention", "rollout"} and "without figures" in found["verdict"]
    assert "correlation_all" in found["kinds"]["rollout"] and "insertion" not in found["kinds"]["rollout"]
    with pytest.raises(ConfigError, match=r"cannot give Grad-CAM maps\n  fix: a model with a classification head"):
        vitkit.explain(str(tmp_path / "run"), str(folder), out=str(tmp_path / "p"), maps="grad_cam", quiet=True)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """A run that was adapted to the folder, so that it knows names of classes."""
    kwargs = {key: value for key, value in TINY.items() if key not in ("patch_size", "num_classes")}
    out = tmp_path_factory.mktemp("runs") / "linear"
    settings = {"arch_kwargs": kwargs, "image_size": 32, "patch_size": 8, "pretrained": False, "epochs": 1}
    vitkit.adapt(
        "linear", model="vit_tiny_patch16_224", data=str(folder), out=str(out), batch_size=4, quiet=True, **settings
    )
    return str(out)


def test_a_run_is_asked_about_classes_by_name_on_its_own_test_images(adapted, folder, tmp_path, capsys):
    out = tmp_path / "o"
    vitkit.explain(adapted, str(folder), out=str(out), classes="red,GREEN", sanity="off")
    results = json.loads((out / "results.json").read_text())
    assert results["facts"]["images"].endswith("of the test split of colours")
    assert {one["label"] for one in results["images"]} <= set(CLASSES)
    for one in results["images"]:
        asked = {CLASSES.index(one["predicted"]), 2, 1}
        assert {name.partition("grad_cam.")[2] for name in one["maps"] if "grad_cam" in name} == {str(c) for c in asked}
    roles = {entry["cls"]: entry["role"] for entry in page_data(out)["items"][0]["maps"] if "cls" in entry}
    assert set(roles) >= {"red", "green"} and "predicted" in roles.values()


def test_by_default_the_true_class_stands_beside_the_predicted_one(adapted, folder, tmp_path):
    out = tmp_path / "o"
    vitkit.explain(adapted, str(folder), out=str(out), sanity="off", maps="grad_cam", quiet=True)
    for item in page_data(out)["items"]:
        classes = [entry["cls"] for entry in item["maps"]]
        assert classes == list(dict.fromkeys([item["top"][0][0], item["label"]]))
        assert item["right"] == (item["top"][0][0] == item["label"])


def test_full_figures_have_a_step_a_pixel_row_and_reversed_controls(adapted, folder, tmp_path):
    found = vitkit.explain(
        adapted, str(folder), out=str(tmp_path / "o"), images=2, sanity="full", maps="grad_cam", quiet=True
    )
    scores = json.loads((tmp_path / "o" / "results.json").read_text())["images"][0]["scores"]
    assert set(scores) == {"grad_cam", "reversed grad_cam", "random"}
    assert set(found["kinds"]) == {"grad_cam", "reversed grad_cam", "random"}
    assert "Grad-CAM, reversed" in page(tmp_path / "o") and "one pixel row a step" in page(tmp_path / "o")


def test_several_labels_are_followed_by_their_own_probability(adapted, folder, tmp_path, monkeypatch):
    from vitkit.run import batches

    real = batches.open_model

    def multi(*args, **kwargs):
        vit = real(*args, **kwargs)
        vit.passport.task = "multi"
        return vit

    monkeypatch.setattr(explaining, "open_model", multi)
    vitkit.explain(adapted, str(folder), out=str(tmp_path / "o"), images=2, maps="attention", quiet=True)
    top = page_data(tmp_path / "o")["items"][0]["top"]
    assert sum(p for _, p in top) != pytest.approx(1, abs=0.01)


def test_a_model_with_class_prompts_shows_its_own_maps_and_traits(folder, tmp_path):
    from vitkit.data.transforms import eval_view
    from vitkit.explain import prompt_cam

    kwargs = {key: value for key, value in TINY.items() if key not in ("patch_size", "num_classes")}
    settings = {"arch_kwargs": kwargs, "image_size": 32, "patch_size": 8, "pretrained": False, "epochs": 1}
    run, out = str(tmp_path / "run"), tmp_path / "o"
    vitkit.explain(
        "prompt_cam", model="vit_tiny_patch16_224", data=str(folder), out=run, batch_size=4, quiet=True, **settings
    )
    found = vitkit.explain(run, str(folder), out=str(out), classes="red", quiet=True)
    assert set(found["kinds"]) == {"attention", "rollout", "grad_cam", "prompt_cam", "random"}
    vit, results = _vit(run), json.loads((out / "results.json").read_text())
    maps = np.load(out / "maps.npz")
    for i, one in enumerate(results["images"]):
        pixels = eval_view(vit.passport.preprocess)(
            torch.from_numpy(np.array(Image.open(folder / one["name"]))).permute(2, 0, 1)
        )
        want = prompt_cam.saliency(vit, vit.passport.preprocess.normalise(pixels[None]), torch.tensor([2]))[0]
        assert np.allclose(maps[f"{i:03d}.prompt_cam.2"], want, atol=1e-5)
    assert "<h2>Traits</h2>" in page(out) and "What tells “red”" in page(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"classes": "gren"},
            r"there is no class 'gren'\n  fix: did you mean green or red\? classes: blue, green, red",
        ),
        ({"classes": "zebra"}, r"there is no class 'zebra'\n  fix: classes: blue, green, red"),
        ({"maps": "atention"}, r"there is no map 'atention'\n  fix: maps: attention, rollout, grad_cam, prompt_cam"),
        (
            {"maps": "prompt_cam"},
            r"cannot give Prompt-CAM maps\n  fix: train class prompts first: vitkit explain prompt_cam",
        ),
        ({"images": 0}, r"images is 0\n  fix: a positive number"),
        ({"layer": 3}, r"layer 3 does not exist\n  fix: the ViT has blocks 0..2"),
        ({"head": 3}, r"head 3 does not exist\n  fix: the block has heads 0..2"),
        ({"head": -4, "maps": "rollout"}, r"head -4 does not exist"),
        ({"maps": ()}, r"maps names no map\n  fix: maps: attention"),
        ({"batch_size": 0}, r"batch_size is 0\n  fix: 1 or more"),
        ({"discard": 1.5}, r"discard is 1.5"),
        ({"out": ""}, r"out is empty, and vitkit explain writes its page"),
        ({"devices": 2}, r"vitkit explain runs in one process"),
    ],
)
def test_settings_that_do_not_fit_are_refused(adapted, folder, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        vitkit.explain(adapted, str(folder), quiet=True, **{"out": str(tmp_path / "o"), **settings})
    assert not (tmp_path / "o").exists(), "a refused command leaves nothing in the way of the corrected one"


def test_settings_that_change_nothing_are_said(adapted, folder, tmp_path, capsys):
    settings = {"images": 1, "sanity": "off", "maps": "grad_cam", "workers": 0}
    vitkit.explain(adapted, str(folder), out=str(tmp_path / "a"), head=1, fusion="max", **settings)
    said = capsys.readouterr().err
    assert "head is for attention maps, and none is drawn: it changes nothing" in said
    assert "fusion is for attention rollout maps" in said and "discard" not in said
    vitkit.explain(
        adapted, str(folder), out=str(tmp_path / "b"), classes="red", head=1, **{**settings, "maps": "attention"}
    )
    said = capsys.readouterr().err
    assert (
        "classes are asked about by Grad-CAM and Prompt-CAM maps, and none is drawn" in said and "head is" not in said
    )


def test_a_model_that_is_no_vit_is_refused(folder, tmp_path):
    with pytest.raises(WeightsError, match=r"(?i)resnet18.*ViT|VisionTransformer"):
        vitkit.explain("resnet18", str(folder), out=str(tmp_path / "o"), pretrained=False, quiet=True)


def test_runs_without_a_vit_are_refused_with_the_model_named(adapted, folder, tmp_path):
    where = {name: str(tmp_path / name) for name in ("features", "page", "begun", "o")}
    vitkit.embed(model=adapted, data=str(folder), out=where["features"], quiet=True)
    vitkit.explain(adapted, str(folder), out=where["page"], images=1, sanity="off", quiet=True)
    for name, verb in (("features", "embed"), ("page", "explain")):
        words = rf"{name} is a run of vitkit {verb}, and there is no ViT in it\n  fix: .*: {re.escape(adapted)}"
        with pytest.raises(WeightsError, match=words):
            vitkit.explain(where[name], str(folder), out=where["o"], quiet=True)
    begun = RunFolder(where["begun"])
    begun.claim({"model": adapted}, "adapt.linear")
    begun.release()
    (tmp_path / "begun" / "last.ckpt").write_bytes(b"a checkpoint to resume from")
    with pytest.raises(WeightsError, match=r"begun has not saved its model yet\n  fix: .* resumes it"):
        vitkit.explain(where["begun"], str(folder), out=where["o"], quiet=True)


def test_numbered_classes_and_imagenet_names():
    from vitkit.run.class_names import ClassNames

    class Passport:
        classes, base = None, {"kind": "file"}

    class Vit:
        passport, num_classes = Passport, 1000

    said = []
    names = ClassNames.of(Vit, said.append)
    assert said == ["the weights do not name their 1000 classes: ImageNet-1k's names are used"]
    assert names.names[1] == "goldfish" and names.index("Carassius auratus") == 1 and names.index("n01443537") == 1
    assert names.find(["great_white_shark", "1"]) == [2, 1]
    with pytest.raises(ConfigError, match=r"did you mean goldfish"):
        names.find(["goldfihs"])
    Passport.classes, Vit.num_classes = ["a_b", "A", "a", "a b"], 4  # the spelling of each is its own
    names = ClassNames.of(Vit, said.append)
    assert [names.index(name) for name in Passport.classes] == [0, 1, 2, 3] and names.find(["A", " A_B"]) == [1, 3]
    Passport.classes = None
    assert ClassNames.of(Vit, said.append).names == ["0", "1", "2", "3"]


def test_verdicts_in_words():
    say = explain_figures.verdict_of
    ahead = {"ahead": 0.2, "ahead_low": 0.1, "ahead_high": 0.3}
    assert say({**ahead, "correlation_all": 0.1, "correlation_top": 0.2}) == "more faithful than random"
    assert "shows the image more than the model" in say({**ahead, "correlation_all": 0.9})
    assert "blind to the head and the last block" in say({**ahead, "correlation_all": 0.1, "correlation_top": 0.99})
    assert say({"ahead": 0.1, "ahead_low": -0.1, "ahead_high": 0.3}) == "not shown to be more faithful than random"
    assert say({"ahead": -0.2, "ahead_low": -0.3, "ahead_high": -0.1}) == "less faithful than random"
    assert say({"ahead": -0.2}) == "not ahead of random maps, on too few pictures to tell"
    assert explain_figures.number(-0.001) == "0.00" and explain_figures.number(-0.01) == "-0.01"
    random = {"gap": 0.1}
    best = {"rollout": {**ahead, "gap": 0.3}, "grad_cam": {**ahead, "ahead": 0.4, "gap": 0.5}, "random": random}
    words = "insertion minus deletion 0.50, random maps 0.10, 9 images"
    assert (
        explain_figures.headline(best, 9) == f"Grad-CAM is the most faithful here ({words}): more faithful than random."
    )
    weak = {"rollout": {"ahead": 0.01, "ahead_low": -0.2, "ahead_high": 0.2, "gap": 0.11}, "random": random}
    assert explain_figures.headline(weak, 9).startswith(
        "No map is shown to be more faithful than a random one; the closest is"
    )
    assert say({"correlation_all": 0.0}).startswith("not scored: the model has no classes")
