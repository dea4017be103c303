"""Deletion, insertion and randomised weights as they are defined, and known answers where a model makes them known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.test_tokens import close, images, make
from vitkit.errors import ConfigError
from vitkit.explain import attention, faithfulness, grad_cam
from vitkit.explain.shared import predict


def straightforward(vit, image, saliency, target, rows):
    """One image, one step at a time, pixel lists: the definition (RISE, with a blurred start for insertion)."""
    height, width = image.shape[1:]
    pixels = torch.nn.functional.interpolate(saliency[None, None], (height, width), mode="bilinear")[0, 0].flatten()
    order = pixels.sort(descending=True, stable=True).indices
    blur = faithfulness.blurred(image[None])[0]
    found = {}
    for kind, start, end in (("deletion", image, torch.zeros_like(image)), ("insertion", blur, image)):
        current, curve = start.clone(), []
        for first in range(0, height * width + rows * width, rows * width):
            curve.append(float(predict(vit, current[None])[0, target]))
            where = order[first : first + rows * width]
            current.flatten(1)[:, where] = end.flatten(1)[:, where]
        found[kind] = curve
    return found


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_curves_are_the_definitions(rows):
    vit, x = make("plain"), images((64, 48), 2)
    maps = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(3))
    maps[0, 1] = 0.5  # ties
    target = torch.tensor([1, 4])
    found = faithfulness.curves(vit, x, {"one": maps}, target, rows=rows, batch_size=7)["one"]
    for i in range(2):
        want = straightforward(vit, x[i], maps[i], int(target[i]), rows)
        for kind in ("deletion", "insertion"):
            assert len(want[kind]) == -(-64 // rows) + 1
            assert np.allclose(getattr(found, kind)[i], want[kind], atol=1e-6), kind


def test_areas_are_trapezoids():
    curve = torch.tensor([[1.0, 0.5, 0.25, 0.0]])
    assert faithfulness.area(curve).item() == pytest.approx(np.trapezoid(curve[0], dx=1 / 3))
    curves = faithfulness.Curves(curve, 1 - curve)
    assert torch.allclose(curves.gap, 1 - 2 * curves.deletion_area)


class Corner(torch.nn.Module):
    """Stands for a classifier that looks at one corner only."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def scores(self, x):
        bright = x[:, 0, :16, :16].mean((1, 2)) * 6
        return torch.stack([bright, 3 - bright], 1)


def test_a_map_that_is_right_beats_random_and_reversed_ones(monkeypatch):
    vit = make("plain")
    corner = Corner(vit)
    monkeypatch.setattr("vitkit.tokens.logits", lambda model, x: corner.scores(x))
    x = torch.ones(3, 3, 64, 64) + 0.1 * images((64, 64), 3)
    right = torch.zeros(3, 4, 4)
    right[:, 0, 0] = 1
    maps = {"right": right, "wrong": -right, "random": faithfulness.random_maps(3, (4, 4), seed=1)}
    found = faithfulness.curves(vit, x, maps, rows=4)
    assert (found["right"].deletion_area < 0.2).all() and (found["wrong"].deletion_area > 0.8).all()
    assert (found["right"].gap > found["random"].gap).all() and (found["random"].gap > found["wrong"].gap).all()


def test_the_predicted_class_is_followed_by_default_and_sigmoids_for_several_labels():
    vit, x = make("plain"), images((64, 64))
    maps = {"a": torch.rand(2, 4, 4)}
    best = predict(vit, x).argmax(1)
    by_default, given = (faithfulness.curves(vit, x, maps, t, rows=16)["a"] for t in (None, best))
    assert torch.equal(by_default.deletion, given.deletion)
    several = faithfulness.curves(vit, x, maps, best, rows=16, task="multi")["a"]
    assert torch.allclose(several.deletion[:, 0], predict(vit, x, "multi")[torch.arange(2), best])


def test_progress_counts_every_image_that_is_run():
    vit, x, seen = make("plain"), images((64, 64), 3), []
    maps = {"a": torch.rand(3, 4, 4), "b": torch.rand(3, 4, 4)}
    faithfulness.curves(vit, x, maps, rows=16, batch_size=4, progress=seen.append)
    assert sum(seen) == faithfulness.forwards(3, (64, 64), 2, 16) == 3 * (1 + 2 * 2 * 3)


def test_one_constant_map_ranks_in_reading_order():
    rank = faithfulness.ranks(torch.zeros(1, 2, 2), (8, 6))
    assert torch.equal(rank.flatten(), torch.arange(48))


def test_randomising_deeper_contains_the_shallower_and_keeps_values():
    vit = make("plain")
    state = vit.state_dict()
    top, more, everything = (faithfulness.randomise(vit, depth, seed=2).state_dict() for depth in (1, 2, None))
    changed = {key for key, value in top.items() if not torch.equal(value, state[key])}
    assert {"head.weight", "norm.weight", "blocks.2.attn.qkv.weight"} <= changed
    assert not any(key.startswith(("blocks.0", "blocks.1", "patch_embed", "cls_token", "pos_embed")) for key in changed)
    assert all(torch.equal(top[key], more[key]) and torch.equal(top[key], everything[key]) for key in changed)
    assert not torch.equal(everything["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    for key, value in everything.items():
        assert torch.equal(value.flatten().sort().values, state[key].flatten().sort().values), key
    again = faithfulness.randomise(vit, None, seed=2).state_dict()
    assert all(torch.equal(everything[key], again[key]) for key in again)


def test_weight_check_tells_maps_of_the_model_from_maps_of_the_image():
    vit, x = make("plain"), images((64, 112), 4)

    def brightness(model, batch, target):
        return torch.nn.functional.avg_pool2d(batch.mean(1), 16)

    same = faithfulness.weight_check(vit, x, brightness)
    assert set(same) == {1, None} and all(
        torch.allclose(one, torch.ones(4, dtype=torch.float64)) for one in same.values()
    )
    cam = faithfulness.weight_check(vit, x, grad_cam.saliency, torch.tensor([0, 1, 2, 3]))
    assert cam[None].abs().mean() < 0.5
    early = attention.Settings(layer=0)
    first = faithfulness.weight_check(
        vit, x, lambda m, b, t: attention.saliency(m, b, t, early), depths=(0, 2, 3), maps=None
    )
    assert torch.allclose(first[2], torch.ones(4, dtype=torch.float64)) and (first[3] < 1).all()


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 4, generator=generator).relu() for _ in range(2))
    found = faithfulness.rank_correlation(a, b)
    assert np.allclose(found, [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)])
    assert torch.isnan(faithfulness.rank_correlation(torch.ones(1, 2, 2), torch.rand(1, 2, 2))).all()
    halves = [one.to(torch.bfloat16) for one in (a, b)]
    assert torch.equal(
        faithfulness.rank_correlation(*halves), faithfulness.rank_correlation(*(one.float() for one in halves))
    )


def test_the_blur_is_a_gaussian_of_eleven_pixels():
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    out = faithfulness.blurred(point)[0, 0]
    assert int((out > 0).sum()) == 121 and out.sum() == pytest.approx(1)
    assert out[15, 16] / out[15, 15] == pytest.approx(np.exp(-1 / 50), rel=1e-5)


def test_errors_say_what_to_do():
    vit, x = make("plain"), images((64, 64))
    with pytest.raises(ConfigError, match=r"rows is 0 for images 64 pixels high\n  fix: 1..64"):
        faithfulness.curves(vit, x, {}, rows=0)
    with pytest.raises(ConfigError, match=r"map a: shape \(1, 4, 4\)\n  fix: finite \(B, h, w\) for 2 images"):
        faithfulness.curves(vit, x, {"a": torch.zeros(1, 4, 4)})
    with pytest.raises(ConfigError, match="map a"):
        faithfulness.curves(vit, x, {"a": torch.full((2, 4, 4), torch.nan)})
    with pytest.raises(ConfigError, match=r"depth is 4\n  fix: 0..3 blocks, or None"):
        faithfulness.randomise(vit, 4)
    with pytest.raises(ConfigError, match="no classification head"):
        faithfulness.curves(make("plain", num_classes=0), x, {"a": torch.zeros(2, 4, 4)})


def test_batches_do_not_change_the_curves():
    vit, x = make("dinov3"), images((64, 96))
    maps = {"a": torch.rand(2, 4, 6)}
    one, many = (faithfulness.curves(vit, x, maps, rows=8, batch_size=size)["a"] for size in (1, 50))
    assert close(one.insertion, many.insertion, 1e-5) and close(one.deletion, many.deletion, 1e-5)
