"""DINOv3 medical benchmark: a frozen ViT on images, volumes, slides and masks, and its linear head as published.

Paper: Liu et al., "Does DINOv3 Set a New Medical Vision Standard? Benchmarking 2D and 3D Classification, Segmentation, and
Registration", arXiv 2509.06467, 2025. No code of the benchmark is public; the backbone is facebookresearch/dinov3.

What happens, and where: images: one linear layer on the class token, binary cross-entropy, 50 epochs of batches of 1024 at a
rate of 5e-3 (`fit` here; `evaluate.linear` is the exact optimum). Volumes: slices through the 2-D trunk, their mean
(`evaluate.pooling`), then `linear` or `knn` (k = 20). Slides: mean token of each tile, gated attention (`evaluate.mil`).
Masks: a light decoder (`evaluate.segment`); of volumes, a 3-D decoder over stacked maps (`dense.volume_segment`).
Neurons: affinities, weighted squared error, VOI and adapted Rand error (`dense.affinity`). Registration: joint PCA, MIND,
convex search and Adam (`dense.registration`). Model size and resolution: `vitkit scaling`. Meta's checkpoints: `parts.dinov3`.

Differs from the paper: its text leaves open which token is pooled, the optimiser, k, and decoder widths; defaults here are
the class token, AdamW with weight decay 1e-4, k = 20 and 256 channels, all of them arguments. Left outside: Waterz (objects
are what affinities above a threshold connect) and the trained registration network. Averages of its tables that do not equal
the mean of their rows are not reproduced.

Cost: the trunk once over all images or slices; then seconds for heads, minutes for decoders.

    vitkit scaling --models dinov3_vits16.pth,dinov3_vitb16.pth --sizes 256,512 --data xrays/labels.csv --out scaling
    vitkit.evaluate(model="dinov3_vits16.pth", data="xrays/labels.csv", protocols="linear,knn", image_size=512)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vitkit.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Settings:
    """The benchmark's linear head on cached features."""

    lr: float = 5e-3
    """learning rate (paper: 0.005)"""
    batch_size: int = 1024
    """features a step (paper: 1024)"""
    epochs: int = 50
    """passes over the features (paper: 50)"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """not in the paper's text; sgd has momentum 0.9"""
    weight_decay: float = 1e-4
    """not in the paper's text"""
    standardise: bool = True
    """by mean and deviation of the training features; off = raw features"""
    seed: int = 0
    """order of the features"""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0:
            raise ConfigError(f"lr is {self.lr}, weight_decay {self.weight_decay}", fix="a rate above 0, decay from 0")
        if self.batch_size < 1 or self.epochs < 1:
            raise ConfigError(f"{self.epochs} epochs of batches of {self.batch_size}", fix="at least 1 of each")


@dataclass
class Head:
    """`weight` (C, D) and `bias` (C,) for raw features."""

    weight: np.ndarray
    bias: np.ndarray
    single: bool

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (M, C): of each label on its own, or for one label an image normalised to sum to 1."""
        import numpy as np
        from scipy.special import expit

        chances = expit(np.asarray(x, dtype=np.float64) @ self.weight.T + self.bias)
        return chances / np.maximum(chances.sum(1, keepdims=True), 1e-12) if self.single else chances


def fit(x: np.ndarray, y: np.ndarray, *, n_classes: int | None = None, settings: Settings = Settings()) -> Head:
    """Train on features (N, D) with labels (N,) of classes, -1 = unlabelled, or (N, C) of 0, 1 and NaN = unknown.

    Every class is a binary question, as the benchmark's loss has it. The last weights are kept; nothing is selected.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    x, y = np.asarray(x, dtype=np.float32), np.asarray(y)
    if x.ndim != 2 or len(x) != len(y) or not np.isfinite(x).all():
        raise ConfigError(f"features {x.shape} for labels {y.shape}", fix="finite features (N, D), one label row each")
    single = y.ndim == 1
    if single:
        x, y = x[y >= 0], y[y >= 0]
        y = np.eye(n_classes or int(y.max(initial=0)) + 1, dtype=np.float32)[y]
    mean, scale = np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
    if settings.standardise:
        mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    features = torch.from_numpy((x - mean) / scale)
    known = torch.from_numpy(~np.isnan(y))
    target = torch.from_numpy(np.nan_to_num(y).astype(np.float32))
    head = torch.nn.Linear(x.shape[1], y.shape[1])
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    given = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(head.parameters(), **given)
        if settings.optimizer == "adamw"
        else torch.optim.SGD(head.parameters(), momentum=0.9, **given)
    )
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(features), generator=order).split(settings.batch_size):
            each = F.binary_cross_entropy_with_logits(head(features[rows]), target[rows], reduction="none")
            loss = (each * known[rows]).sum() / known[rows].sum().clamp_min(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weight, bias = (p.detach().double().numpy() for p in (head.weight, head.bias))
    return Head(weight / scale, bias - weight @ (mean / scale), single)
