"""Several views of each video, one prediction: what `vitkit predict RUN VIDEOS --clips 5 --crops 3` runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkit.data.video_views import test_views
from vitkit.errors import ConfigError
from vitkit.run.batches import evaluation_batches
from vitkit.settings import Machine


@torch.no_grad()
def mean_scores(model: Any, images: Any, clips: int, crops: int, batch_size: int, workers: int) -> Tensor:
    """Class probabilities (N, C): softmax (sigmoid for many labels) of every view, then their mean over the views.

    The views of a video go through the model one after the other, so that memory is that of `batch_size` clips.
    """
    preprocess = model.passport.preprocess
    if preprocess.kind != "video":
        raise ConfigError(
            f"clips and crops are for models of videos, and this one takes {preprocess.kind}s", fix="leave them out"
        )
    view = test_views(preprocess, segments=clips, crops=crops)
    several = (model.passport.task or "single") != "single"
    rows = []
    for batch in evaluation_batches(images, view, Machine(batch_size=batch_size, workers=workers)):
        scores = [model(one).float() for one in batch["image"].unbind(1)]
        rows.append(torch.stack([s.sigmoid() if several else s.softmax(1) for s in scores]).mean(0).cpu())
    return torch.cat(rows) if rows else torch.zeros(0, len(model.classes))
