"""Known displacements are found again; the joint basis is one for both volumes; MIND ignores brightness."""

from __future__ import annotations

import pytest
import torch

from vitkit.dense import registration
from vitkit.errors import ConfigError, DataError


def blobs(seed=0, shape=(16, 24, 24)):
    """A smooth random texture (S, H, W)."""
    x = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(3):
        x = torch.nn.functional.avg_pool3d(x, 3, stride=1, padding=1)
    return (x / x.std())[0, 0]


def test_a_shift_is_found_and_undone():
    fixed = blobs()
    moving = fixed.roll((2, -3, 4), (0, 1, 2))
    for steps, most in ((0, 0.8), (60, 0.3)):
        field = registration.register(fixed[None], moving[None], grid=2, window=3, steps=steps)
        middle = field[:, 5:-5, 6:-6, 6:-6].mean((1, 2, 3))
        assert (middle - torch.tensor([2.0, -3.0, 4.0])).abs().max() < most
    inner = (slice(5, -5), slice(6, -6), slice(6, -6))
    before, after = (float((m - fixed)[inner].square().mean()) for m in (moving, registration.warp(moving, field)))
    assert after < 0.02 * before


def test_nothing_to_do_stays_nothing():
    fixed = blobs()
    field = registration.register(fixed[None], fixed[None], grid=2, window=2, steps=20)
    assert field.abs().mean() < 0.1
    labels = (fixed > 1).to(torch.uint8)
    assert torch.equal(registration.warp(labels, torch.zeros_like(field), labels=True), labels)
    assert torch.allclose(registration.warp(fixed, torch.zeros_like(field)), fixed, atol=1e-5)


def test_joint_basis():
    a, b = torch.randn(5, 8, 3, 4), torch.randn(7, 8, 3, 4) + 1
    f, m = registration.joint_pca(a, b, 3)
    assert f.shape == (3, 5, 3, 4) and m.shape == (3, 7, 3, 4)
    rows = torch.cat([f.flatten(1), m.flatten(1)], 1)
    assert torch.allclose(rows.mean(1), torch.zeros(3), atol=1e-5)
    spread = torch.cov(rows, correction=0)
    assert spread.diagonal().mean() == pytest.approx(1.0, abs=1e-4)
    assert (spread - torch.diag(spread.diagonal())).abs().max() < 1e-4
    assert (spread.diagonal().diff() <= 1e-6).all()
    again, _ = registration.joint_pca(a, a, 8)
    distance = (a[0, :, 0, 0] - a[3, :, 2, 1]).norm() / (a[1, :, 0, 0] - a[2, :, 1, 1]).norm()
    kept = (again[:, 0, 0, 0] - again[:, 3, 2, 1]).norm() / (again[:, 1, 0, 0] - again[:, 2, 1, 1]).norm()
    assert kept == pytest.approx(float(distance), rel=1e-4)


def test_mind_is_about_structure():
    x = blobs()
    found = registration.mind(x)
    assert found.shape == (6, *x.shape) and found.max() <= 1.0 + 1e-6 and found.min() >= 0
    assert torch.allclose(found, registration.mind(3 * x + 7), atol=1e-3)
    assert torch.isfinite(registration.mind(torch.zeros(4, 4, 4))).all()


def test_what_is_wrong_is_said():
    x = torch.zeros(2, 4, 4, 4)
    with pytest.raises(DataError, match="resampled to one shape"):
        registration.register(x, x[:, 1:])
    with pytest.raises(ConfigError, match="window 0"):
        registration.register(x, x, window=0)
    with pytest.raises(ConfigError, match="dims is 9 of 2 channels"):
        registration.joint_pca(torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2), 9)
    with pytest.raises(DataError, match="of one model"):
        registration.joint_pca(torch.randn(3, 2, 2, 2), torch.randn(3, 4, 2, 2), 1)
