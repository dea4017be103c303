"""Pixel AUROC and PRO against straightforward code; thresholds that keep their promise."""

from __future__ import annotations

import numpy as np
import pytest

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.localisation import pixel_auroc, pro, regions, threshold


def example(seed: int = 0):
    rng = np.random.default_rng(seed)
    masks, maps = [], []
    for i in range(4):
        mask = np.zeros((16, 20), bool)
        if i:
            mask[2:4, 3:5] = mask[8:15, 9:18] = True
        masks.append(mask)
        maps.append((rng.normal(size=mask.shape) + 1.2 * mask).astype(np.float32))
    return masks, maps


def slow_pro(masks, maps, limit=0.3) -> float:
    """Every value as a threshold, every region by itself, as the definition reads."""
    levels = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
    good = np.concatenate([m[~k] for m, k in zip(maps, masks, strict=True)])
    rates, overlaps = [0.0], [0.0]
    for level in levels:
        each = []
        for mask, found in zip(masks, maps, strict=True):
            numbers, n = regions(mask)
            each += [(found[numbers == k] >= level).mean() for k in range(1, n + 1)]
        rates.append(float((good >= level).mean()))
        overlaps.append(float(np.mean(each)))
    rates, overlaps = np.array(rates), np.array(overlaps)
    at = np.interp(limit, rates, overlaps)
    inside = rates < limit
    return float(np.trapezoid(np.append(overlaps[inside], at), np.append(rates[inside], limit)) / limit)


@pytest.mark.parametrize("seed", range(3))
def test_pro_is_the_definition(seed):
    masks, maps = example(seed)
    assert abs(pro(masks, maps) - slow_pro(masks, maps)) < 1e-9
    assert abs(pro(masks, maps, limit=0.05) - slow_pro(masks, maps, 0.05)) < 1e-9


def test_small_regions_count_as_much_as_large_ones():
    masks, _ = example()
    small = [np.where(regions(mask)[0] == 1, 1.0, 0.0) for mask in masks]
    large = [np.where(regions(mask)[0] == 2, 1.0, 0.0) for mask in masks]
    assert pixel_auroc(masks, small) < 0.6 < pixel_auroc(masks, large)
    assert abs(pro(masks, small) - pro(masks, large)) < 1e-9


def test_perfect_chance_and_undefined():
    masks, maps = example()
    perfect = [mask.astype(np.float32) for mask in masks]
    assert pixel_auroc(masks, perfect) == 1 and pro(masks, perfect) == 1
    same = [np.ones_like(found) for found in maps]
    assert pixel_auroc(masks, same) == 0.5 and abs(pro(masks, same) - 0.15) < 1e-9
    for fill in (False, True):
        assert (
            pixel_auroc([np.full((4, 4), fill)], [np.eye(4)]) is None
            and pro([np.full((4, 4), fill)], [np.eye(4)]) is None
        )
    with pytest.raises(ConfigError, match="PRO curve up to 0"):
        pro(masks, maps, limit=0)
    with pytest.raises(DataError, match="picture 0: a mask of"):
        pro([masks[0][:4]], [maps[0]])
    with pytest.raises(DataError, match="picture 1: the anomaly map holds"):
        pixel_auroc(masks[:2], [maps[0], maps[1] * np.nan])


def test_corners_touching_are_one_defect():
    assert regions(np.eye(3, dtype=bool))[1] == 1


def test_thresholds_keep_the_stated_rate():
    rng = np.random.default_rng(0)
    over = [float(rng.normal() > threshold(rng.normal(size=39), 0.1)[0]) for _ in range(4000)]
    assert 0.085 < np.mean(over) < 0.115
    assert threshold(np.arange(19), 0.05) == (18.0, 0.05)
    assert threshold(np.arange(4), 0.05) == (3.0, 0.2)  # too few to certify 5 %
    with pytest.raises(ConfigError, match="a false-alarm rate of 1"):
        threshold(np.arange(4), 1)
    with pytest.raises(DataError, match="scores of good parts"):
        threshold(np.array([np.nan]), 0.1)
