"""The hash grid's geometry, and Adam on the rows of a table that a step touches."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import ConfigError
from vitkit.parts.hash_grid import Corners, grid_levels, total_entries
from vitkit.parts.row_adam import RowAdam


def test_the_papers_grid_has_the_sheets_resolutions():
    levels = grid_levels(16, 1024, 16, 20)
    assert [level.resolution for level in levels][-3:] == [589, 777, 1025]
    assert total_entries(levels) == 2_467_720
    assert [level.hashed for level in levels] == [False] * 15 + [True]
    assert grid_levels(16, 64, 1, 20)[0].resolution == 16


def test_a_dense_level_wraps_at_its_far_edge():
    levels = grid_levels(4, 4, 1, 10)  # scale 3: x = 1 lies at 3.5, its right corner in column 4 of 4
    rows, shares = Corners(levels)(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert rows[0, 0].tolist() == [3, 4, 7, 8] and shares[0, 0].tolist() == [0.25] * 4
    assert rows[1, 0].tolist() == [15, 0, 3, 4]  # past the table, back to its start


@pytest.mark.parametrize(
    ("base", "largest", "count", "log2"), [(1, 8, 2, 8), (16, 8, 2, 8), (4, 8, 0, 8), (4, 8, 2, 0)]
)
def test_impossible_grids_are_refused(base, largest, count, log2):
    with pytest.raises(ConfigError, match="a hash grid of"):
        grid_levels(base, largest, count, log2)


def test_rows_are_moved_as_dense_adam_moves_them():
    """Random rows, rates that change, pauses of up to 600 steps."""
    torch.manual_seed(0)
    start, target, steps = torch.randn(30, 3), torch.randn(30, 3), 700
    dense = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([dense], betas=(0.9, 0.99), eps=1e-15)
    lazy = RowAdam(start, steps=steps)
    for step in range(steps):
        rows = torch.randperm(30)[: 1 + step % 5]
        rows = rows[rows < 20] if step > 100 else rows
        noise = torch.randn(len(rows), 3)
        rate = 0.01 * min(1, step / 50) * (1 - step / steps)
        dense.grad = torch.zeros(30, 3).index_copy(0, rows, dense.detach()[rows] - target[rows] + noise)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        lazy.step(lazy.take(rows) - target[rows] + noise, rate)
    assert float((dense.detach() - start).abs().max()) > 0.3
    assert torch.allclose(lazy.settle(), dense, atol=2e-5)
