"""Position tables: fixed sine-cosine, and resampling by each author's rule."""

import math

import pytest
import torch
import torch.nn.functional as F

from vitkit.errors import WeightsError
from vitkit.parts.positions import is_sincos, resample_positions, sincos_2d, square_grid


def table(grid, dim=8, prefix=1, seed=0):
    return torch.randn(1, prefix + math.prod(grid), dim, generator=torch.Generator().manual_seed(seed))


def test_sincos_follows_its_formula():
    dim, grid = 8, (2, 3)
    out = sincos_2d(dim, grid)
    assert out.shape == (6, dim) and out.dtype == torch.float32
    for n in range(6):
        row, column = divmod(n, 3)
        expected = []
        for position in (column, row):  # the column comes first
            angles = [position * 10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert out[n].tolist() == pytest.approx(expected, abs=1e-7)


def test_sincos_prefix_rows_are_zero():
    out = sincos_2d(16, (4, 4), prefix=2)
    assert out.shape == (18, 16) and not out[:2].any() and torch.equal(out[2:], sincos_2d(16, (4, 4)))


def test_sincos_refuses_odd_widths():
    with pytest.raises(WeightsError, match="multiple of 4, got 6"):
        sincos_2d(6, (2, 2))


def test_fixed_tables_are_recognised():
    fixed = sincos_2d(32, (4, 4), prefix=1).unsqueeze(0)
    assert is_sincos(fixed, prefix=1) and is_sincos(fixed.half(), prefix=1)
    assert not is_sincos(table((4, 4), 32), prefix=1)
    assert not is_sincos(torch.zeros(1, 12, 32), prefix=1)  # 11 patches: no square


@pytest.mark.parametrize("rule", ["timm", "mae", "dinov2"])
def test_equal_grid_is_untouched_and_prefix_is_copied(rule):
    own = table((4, 6), prefix=2)
    assert resample_positions(own, (4, 6), prefix=2, rule=rule, old_grid=(4, 6)) is own
    out = resample_positions(own, (3, 8), prefix=2, rule=rule, old_grid=(4, 6))
    assert out.shape == (1, 2 + 24, 8) and torch.equal(out[:, :2], own[:, :2])
    # The same number of patches on a turned grid is another grid.
    assert not torch.equal(resample_positions(own, (6, 4), prefix=2, rule=rule, old_grid=(4, 6)), own)


def test_timm_rule_is_timms():
    from timm.layers import resample_abs_pos_embed

    own = table((7, 7))
    theirs = resample_abs_pos_embed(own, new_size=[4, 9], old_size=[7, 7], num_prefix_tokens=1)
    assert torch.equal(resample_positions(own, (4, 9), prefix=1, rule="timm"), theirs)


def test_dinov2_rule_uses_the_scale_factor():
    own = table((5, 5))
    maps = own[:, 1:].reshape(1, 5, 5, 8).permute(0, 3, 1, 2)
    theirs = F.interpolate(maps, scale_factor=(4.1 / 5, 6.1 / 5), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 24, 8)
    out = resample_positions(own, (4, 6), prefix=1, rule="dinov2")
    assert torch.equal(out[:, 1:], theirs)
    assert not torch.allclose(out, resample_positions(own, (4, 6), prefix=1, rule="mae"), atol=1e-3)


def test_dinov2_rule_reaches_every_size():
    for old in (3, 14, 16, 37):
        own = table((old, old), dim=1)
        for new in (1, 2, 7, 16, 33, 37, 50):
            assert resample_positions(own, (new, new + 1), prefix=1, rule="dinov2").shape[1] == 1 + new * (new + 1)


def test_precision_is_kept():
    own = table((4, 4)).half()
    assert resample_positions(own, (3, 3), prefix=1, rule="mae").dtype == torch.float16


def test_errors_name_the_rows_and_the_rule():
    with pytest.raises(WeightsError, match="23 patch rows does not fit a square grid"):
        resample_positions(torch.zeros(1, 24, 4), (2, 2), prefix=1, rule="mae")
    with pytest.raises(WeightsError, match=r"24 patch rows does not fit grid \(5, 5\)"):
        resample_positions(table((4, 6)), (2, 2), prefix=1, rule="mae", old_grid=(5, 5))
    with pytest.raises(WeightsError, match="unknown position rule 'clip'"):
        resample_positions(table((4, 4)), (2, 2), prefix=1, rule="clip")


def test_square_grid():
    assert (
        square_grid(196) == (14, 14) and square_grid(195) is None and square_grid(0) is None and square_grid(-3) is None
    )


def test_video_rule_goes_frame_by_frame_and_then_along_time():
    old = table((2, 2, 3), prefix=0)
    steps = old.reshape(2, 2, 3, 8).permute(0, 3, 1, 2)
    space = F.interpolate(steps, size=(4, 5), mode="bicubic", align_corners=False)
    lines = space.permute(1, 2, 3, 0).reshape(1, -1, 2)
    both = F.interpolate(lines, size=6, mode="linear", align_corners=False).reshape(8, 4, 5, 6).permute(3, 1, 2, 0)
    new = resample_positions(old, (6, 4, 5), prefix=0, rule="video", old_grid=(2, 2, 3))
    torch.testing.assert_close(new, both.reshape(1, -1, 8))
    only = resample_positions(old, (2, 4, 5), prefix=0, rule="video", old_grid=(2, 2, 3))
    torch.testing.assert_close(only, space.permute(0, 2, 3, 1).reshape(1, -1, 8))


def test_rules_know_how_many_axes_they_are_for():
    with pytest.raises(WeightsError, match="'timm' is for grids of 2 axes, and this has 3"):
        resample_positions(table((2, 2, 2), prefix=0), (2, 2, 3), prefix=0, rule="timm", old_grid=(2, 2, 2))
    with pytest.raises(WeightsError, match="one of timm, dinov2, mae"):
        resample_positions(table((2, 2)), (3, 3), prefix=1, rule="video", old_grid=(2, 2))
