"""VPT: what cannot be loaded is named."""

from __future__ import annotations

import pytest
import torch

from tests.test_tokens import make
from vitkit.adapt import vpt
from vitkit.errors import ConfigError


def test_official_prompts_that_do_not_fit_are_named():
    vit = vpt.inject(make("plain"), vpt.Settings(prompts=2))
    table = {f"embeddings.{index}": torch.rand(1, 2, vit.embed_dim) for index in range(len(vit.blocks))}
    vpt.load_official(vit, table)
    assert all(torch.equal(block.prompts, table[f"embeddings.{index}"]) for index, block in enumerate(vit.blocks))
    with pytest.raises(ConfigError, match=r"embeddings.0 is \(1, 3, \d+\)\n  fix: prompts=3"):
        vpt.load_official(vit, {**table, "embeddings.0": torch.rand(1, 3, vit.embed_dim)})
    del table["embeddings.1"]
    with pytest.raises(ConfigError, match=r"the checkpoint has no embeddings\.1"):
        vpt.load_official(vit, table)
