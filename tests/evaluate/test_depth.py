"""The linear depth probe: losses that vanish where they must, figures, and depth that is nowhere known."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.depth import DepthHead, depth_metrics, gradient_loss, sig_loss, with_class_token


def test_depth_probe():
    head = DepthHead(6, bins=8, upsample=4)
    features = with_class_token(torch.randn(2, 3, 4, 5), torch.randn(2, 3))
    depth = head(features)
    assert depth.shape == (2, 1, 16, 20) and 0.001 <= depth.min().item() <= depth.max().item() <= 10
    truth = depth.detach().clone()
    assert float(sig_loss(truth, truth)) == 0 == float(gradient_loss(truth, truth))
    perfect = depth_metrics(truth, truth)
    assert perfect["a1"] == 1 and perfect["rmse"] == perfect["silog"] == 0
    shifted = depth_metrics(truth * 1.2, truth)
    assert shifted["a1"] == 1 and abs(shifted["abs_rel"] - 0.2) < 1e-6 and shifted["silog"] < 1e-3


def test_depth_that_is_nowhere_known():
    nothing = torch.zeros(1, 1, 4, 4)
    with pytest.raises(DataError, match="no pixel of this batch has a known depth"):
        sig_loss(nothing + 1, nothing)
    with pytest.raises(DataError, match="no pixel has a depth between"):
        depth_metrics(nothing + 1, nothing)
    with pytest.raises(ConfigError, match="1 bins from"):
        DepthHead(4, bins=1)
