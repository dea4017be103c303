"""Planted artefacts are found at their true size, and features that hold nothing score chance."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitkit import tokens
from vitkit.data.images import Images, Masks
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.evaluate import cleanliness, patch_probes
from vitkit.evaluate.cleanliness import Settings, before_after, limit_of, measure
from vitkit.evaluate.feature_maps import picture, prepared
from vitkit.evaluate.patch_views import patch_features
from vitkit.passport import Passport, Preprocess

GRID, WIDTH = (6, 8), 24
SIZE = (48, 64)
SMALL = Settings(images=16, shown=2)


class Store:
    """Pictures in memory."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def name(self, row: int) -> str:
        return f"memory[{row}]"

    def stamp(self, row: int) -> str:
        return str(row)

    def raw(self, row: int) -> None:
        return None

    def array(self, row: int) -> np.ndarray:
        return self.pixels[row]


def pictures(count: int = 32, masks: np.ndarray | None = None, **more) -> Images:
    """Noise with one bright rectangle each, 48 x 64; `masks` (count, 48, 64)."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 90, (count, *SIZE, 3), dtype=np.uint8)
    for one in pixels:
        top, left = rng.integers(0, 24), rng.integers(0, 32)
        one[top : top + 24, left : left + 32] += 150
    found = masks if masks is not None else (pixels.mean(-1) > 150).astype(np.uint8)
    given = {"split": np.array(["train", "test"] * (count // 2)), "group": None, **more}
    return Images(
        name="noise", task="mask", classes=["background", "rectangle"], labels=None, store=Store(pixels),
        rows=np.arange(count), names=[str(i) for i in range(count)], masks=Masks(Store(found)), **given,
    )  # fmt: skip


class Stub(nn.Module):
    """Stands in for a trunk that is no ViT: features are a function of each patch's pixels, plus what is planted."""

    def __init__(self, noise: float = 0.0, code: float = 0.0, outliers: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.code, self.outliers, self.noise = code, outliers, noise
        axes = torch.from_numpy(patch_probes.coordinates(GRID)).float()  # (N, 2)
        directions = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
        self.where = (axes @ directions).T.reshape(1, WIDTH, *GRID)
        self.passport = Passport("stub", {}, Preprocess(image_size=SIZE))

    def forward_intermediates(self, x, indices, intermediates_only):
        out = self.conv(x) + self.code * self.where
        if self.noise:  # a function of the pixels, so that the same picture gives the same features
            each = [
                torch.randn(out[0].shape, generator=torch.Generator().manual_seed(int(one.sum() * 999))) for one in x
            ]
            out = self.noise * torch.stack(each) + 0.0 * out
        out.flatten(2)[:, :, : self.outliers] *= 20
        return [out]


@pytest.fixture(scope="module")
def images() -> Images:
    return pictures()


def test_planted_outliers_are_counted_exactly(images):
    found = measure(Stub(noise=1.0, outliers=3), images, settings=SMALL)
    assert found.figures["high_norm"].value == pytest.approx(3 / 48, abs=0.006)  # a few normal norms pass the limit
    assert found.figures["norm_ratio"].value > 15
    flagged = found.norms > found.limits[0]
    assert flagged[:, :3].all() and flagged[:, 3:].mean() < 0.006
    clean = measure(Stub(noise=1.0), images, settings=SMALL)
    assert clean.figures["high_norm"].value < 0.006


def test_a_position_code_is_read_whatever_the_content(images):
    found = measure(Stub(code=3.0), images, settings=SMALL)
    assert found.figures["position"].value > 0.9 and found.figures["position_rolled"].value > 0.9
    none = measure(Stub(), images, settings=SMALL)
    assert abs(none.figures["position_rolled"].value) < 0.1


def test_random_features_score_chance(images):
    found = measure(Stub(noise=1.0), images, settings=SMALL)
    for key in ("position", "position_rolled", "position_pixels"):
        assert abs(found.figures[key].value) < 0.1, key
    always_background = float(
        np.mean([[1 - (m := images.mask(int(i)).numpy().mean()), m] for i in range(1, 32, 2)]) / 2
    )
    assert found.figures["linear_iou"].value < always_background + 0.25
    assert found.figures["neighbour_iou"].value < 0.5


def test_features_that_show_the_mask_segment_it(images):
    found = measure(Stub(), images, settings=SMALL)
    assert found.figures["linear_iou"].value > 0.75 and found.figures["neighbour_iou"].value > 0.75


def test_position_that_only_the_content_shows_is_told_apart():
    """Every picture bright at the top: a patch's pixels give its row away, and rolling takes that away again."""
    one = pictures()
    one.store.pixels[:] = (np.linspace(0, 200, SIZE[0])[None, :, None, None] + one.store.pixels / 10).astype(np.uint8)
    found = {key: figure.value for key, figure in measure(Stub(), one, settings=SMALL).figures.items()}
    assert found["position"] > 0.4 and found["position_pixels"] > 0.4
    assert found["position_rolled"] < 0.15


def test_before_and_after_share_images_and_limits(images):
    found = before_after(Stub(code=3.0), Stub(), images, settings=SMALL, names=("dirty", "clean"))
    assert found.figures["high_norm"][1] == 0.0
    change = found.differences["position_rolled"]
    assert change.value < -0.7 and change.high < -0.5 and change.n == 16
    table = found.tables[0]
    assert table["columns"] == ["figure", "dirty", "clean", "difference", "95 % interval", "better"]
    assert all(len(row) == 6 for row in table["rows"])
    assert [row[0] for row in table["rows"]][-1].startswith("for scale")
    assert "16 scored images, 48 patches each" in table["note"]
    assert "position code" in found.verdict and " to " in found.verdict
    assert len(found.pictures) == 2 and len(found.pictures[0]) == 5 == len(found.columns)
    for shown, caption in found.pictures[0]:
        assert shown.dtype == np.uint8 and shown.ndim == 3 and caption


def test_both_models_are_held_against_the_first_ones_limit(images):
    found = before_after(Stub(noise=1.0, outliers=3), Stub(noise=0.5), images, settings=SMALL)
    before, after = found.figures["high_norm"]
    assert before >= 3 / 48 and after == 0.0
    again = before_after(Stub(noise=1.0, outliers=3), Stub(noise=0.5), images, settings=SMALL)
    assert again.figures == found.figures


def test_a_scale_that_the_final_norm_takes_away_makes_no_outliers(images):
    from ..test_tokens import make

    vits = [make("plain") for _ in range(2)]
    for vit in vits:
        vit.passport = Passport("vit", {}, Preprocess(image_size=(64, 64)))
    vits[1].blocks[-1].register_forward_hook(lambda module, given, out: 7.0 * out)
    found = before_after(*vits, images, settings=SMALL)
    for key in ("high_norm", "high_norm_raw", "norm_ratio"):
        assert found.figures[key][0] == pytest.approx(found.figures[key][1], abs=1e-4), key
    assert found.figures["high_norm_raw"][0] > 0


def test_a_model_against_itself_changes_nothing(images):
    found = before_after(Stub(code=1.0), Stub(code=1.0), images, settings=SMALL)
    assert all(one.value == 0.0 for one in found.differences.values())


def test_groups_stay_whole_where_splits_are_missing():
    group = np.repeat(np.arange(8), 4).astype(str)
    images = pictures(split=np.array(["train"] * 32), group=group)
    fit, test = cleanliness.choose(images, 64, 0)
    assert len(fit) + len(test) == 32 and not set(group[fit]) & set(group[test])
    fit, test = cleanliness.choose(images, 5, 1)
    assert len(fit) == len(test) == 5


@pytest.mark.parametrize("value", [0, 1])
def test_masks_that_cover_nothing_or_everything_give_a_note(value):
    images = pictures(masks=np.full((32, *SIZE), value, np.uint8))
    found = measure(Stub(), images, settings=SMALL)
    assert "linear_iou" not in found.figures and "position" in found.figures
    assert f"all masks of the fitted images show class {value} only" in found.table()["note"]


def test_unknown_pixels_belong_to_no_class():
    masks = np.zeros((2, *SIZE), np.uint8)
    masks[:, :, 32:] = 1
    masks[0, :24] = 255
    labels = patch_probes.patch_labels(masks, GRID)
    assert (labels[0, : 3 * 8] == -1).all() and set(labels[0, 24:]) == {0, 1} and (labels[1] >= 0).all()
    unknown = pictures(masks=np.full((32, *SIZE), 255, np.uint8))
    note = measure(Stub(), unknown, settings=SMALL).table()["note"]
    assert "show nothing known only" in note


def test_an_ignored_value_becomes_unknown():
    from dataclasses import replace

    images = pictures()
    masks = replace(images.masks, ignore=1)
    found = measure(Stub(), replace(images, masks=masks), settings=SMALL)
    assert "show class 0 only" in found.table()["note"]


def test_the_limit_is_the_median_plus_robust_deviations():
    norms = np.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert limit_of(norms, 3.0) == pytest.approx(3 + 3 * 1.4826 * 1.0)
    share = np.random.default_rng(0).normal(10, 1, 400_000)
    assert (share > limit_of(share, 3.0)).mean() == pytest.approx(0.00135, abs=3e-4)


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, **kwargs}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **kwargs)
    model.passport = Passport("vit_tiny_patch16_224", {}, Preprocess(image_size=(32, 32)))
    return model.train()


def test_a_vit_is_measured_at_its_own_size_and_comes_back_as_it_was(images):
    model = vit()
    model.blocks[0].eval()
    found = measure(model, images, settings=Settings(images=4, shown=1, batch_size=3))
    assert found.grid == (4, 4) and found.raw is not None and "high_norm_raw" in found.figures
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    x = prepared(model, picture(model, images, 1, (32, 32)), False)
    with torch.no_grad():
        want = tokens.encode(model.eval(), x[None])
    got, norms, _ = patch_features(model, x[None])
    assert torch.allclose(got, want.patches)
    assert torch.allclose(norms, tokens.encode(model, x[None], norm=False).patches.norm(dim=-1))


def test_norms_before_the_final_norm_exist_only_where_there_is_one(images):
    bare = vit()
    bare.norm, bare.fc_norm = nn.Identity(), nn.Identity()
    assert measure(bare, images, settings=Settings(images=4, shown=0)).raw is None


def test_what_cannot_be_measured_says_why(images):
    with pytest.raises(DataError, match=r"3 images are too few to fit on some and score others\n.*at least 4"):
        measure(Stub(), images.subset([0, 1, 2]), settings=SMALL)
    with pytest.raises(ConfigError, match=r"images is 2\n.*at least 4"):
        Settings(images=2)
    with pytest.raises(ConfigError, match="sigmas is 0"):
        Settings(sigmas=0)
    broken = vit()
    broken.norm.weight.data.fill_(float("nan"))
    with pytest.raises(WeightsError, match=r"features that are not finite, in the batch that begins with memory\["):
        measure(broken, images, settings=SMALL)
    with pytest.raises(ConfigError, match=r"\(30, 64\) is not a multiple of the patch size"):
        measure(vit(), images, size=(30, 64), settings=SMALL)
    with pytest.raises(WeightsError, match=r"into \(4, 4\) and \(2, 2\) patches"):
        before_after(vit(), vit(patch_size=16), images, settings=SMALL)
    video = vit()
    video.passport.preprocess = Preprocess(image_size=(4, 32, 32), kind="video")
    with pytest.raises(ConfigError, match="takes videos"):
        measure(video, images, settings=SMALL)


# ---------------------------------------------------------------- the verb

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MODEL = {"pretrained": False, "arch_kwargs": TINY, "image_size": 32, "patch_size": 8, "in_chans": 1, "quiet": True}


def test_the_verb_writes_a_report_of_one_model_or_two(tmp_path):
    import json

    import vitkit

    given = {"model": "vit_tiny_patch16_224", "data": "digits", "protocols": ("cleanliness",), **MODEL}
    found = vitkit.evaluate(**given, out=tmp_path / "one")
    assert {"high_norm", "high_norm_raw", "position", "position_rolled", "position_pixels"} <= set(found)
    assert found["position"]["n"] == 64 and found["position"]["low"] < found["position"]["high"]
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "content rolled" in page and "model: three components" in page
    both = vitkit.evaluate(**given, before="deit_tiny_patch16_224", out=tmp_path / "two")
    assert both["position"]["difference"] == pytest.approx(both["position"]["value"] - both["position"]["before"])
    written = json.loads((tmp_path / "two" / "results.json").read_text(encoding="utf-8"))
    assert written["before"] == "deit_tiny_patch16_224" and "before: norms" in (
        tmp_path / "two" / "report.html"
    ).read_text(encoding="utf-8")


def test_the_verb_refuses_what_does_not_go_together():
    import vitkit

    given = {"model": "vit_tiny_patch16_224", "data": "digits", **MODEL}
    with pytest.raises(ConfigError, match=r"cleanliness has a report of its own, and knn was asked for beside it"):
        vitkit.evaluate(**given, protocols=("cleanliness", "knn"))
    with pytest.raises(ConfigError, match=r"before is for the protocol cleanliness"):
        vitkit.evaluate(**given, before="deit_tiny_patch16_224")
