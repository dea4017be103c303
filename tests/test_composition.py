"""Every adaptation on every kind of ViT, through everything that vitkit does with a model."""

from __future__ import annotations

import pytest

from benchmarks import composition


@pytest.mark.parametrize("family", composition.FAMILIES)
@pytest.mark.parametrize("method", composition.METHODS)
def test_cell(method, family, tmp_path):
    found = composition.check(method, family, tmp_path)
    assert found == dict.fromkeys(composition.STEPS, "ok")
