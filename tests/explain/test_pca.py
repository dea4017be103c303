"""One basis for a gallery, its colours, foreground, and neighbours of patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.test_tokens import FAMILIES, images, make
from vitkit import tokens
from vitkit.errors import ConfigError, DataError
from vitkit.explain import pca


def draws(*sizes, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(4, 0.5, dim)
    return [torch.randn(*size, dim, generator=generator) * scale + 3 for size in sizes]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_normed_patch_tokens(name):
    vit, x = make(name), images((64, 112))
    with torch.no_grad():
        found = pca.features(vit, x)
        want = tokens.dense(vit, tokens.encode(vit, x)).map.permute(0, 2, 3, 1)
    assert found.shape == (2, 4, 7, 48) and torch.equal(found, want)
    assert not torch.equal(pca.features(vit, x, pca.Settings(layer=0)), found)


def test_one_basis_for_pictures_of_several_sizes_is_scikit_learns():
    from sklearn.decomposition import PCA

    parts = draws((4, 7), (5, 5), (3, 9))
    basis = pca.fit(parts)
    rows = torch.cat([part.flatten(0, 1) for part in parts]).double().numpy()
    want = PCA(3).fit(rows)
    assert np.allclose(basis.explained, want.explained_variance_ratio_, atol=1e-10)
    assert np.allclose(np.abs(basis.axes.numpy()), np.abs(want.components_.T), atol=1e-8)
    assert np.allclose(np.abs(basis.project(parts[1])), np.abs(want.transform(parts[1].flatten(0, 1))).reshape(5, 5, 3))
    largest = basis.axes.gather(0, basis.axes.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_equal_features_get_equal_colours_in_every_picture():
    parts = draws((4, 7), (5, 5))
    parts[1][2, 3] = parts[0][1, 1]
    basis = pca.fit(parts)
    first, second = pca.colours([basis.project(part) for part in parts])
    assert first.dtype == torch.uint8 and first.shape == (4, 7, 3) and second.shape == (5, 5, 3)
    assert torch.equal(first[1, 1], second[2, 3])
    both = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    assert (both.amin(0) == 0).all() and (both.amax(0) == 255).all()


def test_the_foreground_is_what_keeps_from_the_edges():
    parts = draws((8, 8), (6, 10), seed=1)
    for part in parts:
        part[2:5, 2:6, 0] -= 40
    basis = pca.fit(parts)
    projected = [basis.project(part) for part in parts]
    masks = pca.foreground(projected)
    for mask in masks:
        want = torch.zeros_like(mask)
        want[2:5, 2:6] = True
        assert torch.equal(mask, want)
    coloured = pca.colours(projected, masks)
    assert all((one[~mask] == 0).all() for one, mask in zip(coloured, masks, strict=True))


def test_otsu_divides_two_groups():
    values = torch.cat([torch.randn(50) * 0.1, torch.randn(20) * 0.1 + 5])
    assert 1 < pca.otsu(values) < 4
    assert pca.otsu(torch.ones(5)) == 1


def test_nearest_patches_are_those_of_highest_cosine():
    rows = torch.cat([part.flatten(0, 1) for part in draws((6, 6), (4, 4))])
    similarity, index = pca.nearest(rows, rows[:3], k=5)
    unit = torch.nn.functional.normalize(rows, dim=1)
    want = (unit[:3] @ unit.T).sort(1, descending=True)
    assert torch.equal(index, want.indices[:, :5]) and torch.allclose(similarity, want.values[:, :5])
    assert index[:, 0].tolist() == [0, 1, 2]


def test_compact_features_keep_cosines():
    rows = draws((300,), dim=32)[0]
    small, kept = pca.compact(rows, 32)
    assert small.dtype == torch.int8 and kept == pytest.approx(1)
    unit = torch.nn.functional.normalize(rows, dim=1)
    whole, approximate = unit @ unit.T, small.float() @ small.float().T / 127**2
    assert (whole - approximate).abs().max() < 0.02
    fewer, less = pca.compact(rows, 4)
    assert fewer.shape == (300, 4) and 0.3 < less < 1


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match=r"components is 0\n  fix: a positive number"):
        pca.Settings(components=0)
    with pytest.raises(DataError, match=r"components of 1 patches\n  fix: at least two"):
        pca.fit([torch.zeros(1, 4)])
    with pytest.raises(ConfigError, match=r"2 components make no colours"):
        pca.colours([torch.zeros(2, 2, 2)])
