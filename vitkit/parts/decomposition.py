"""One image's features taken apart: a field over the image, a map over the places of the view, and a residual.

y = F(c) + G(a) + h(y): F, a hash grid and a small MLP, sees where in the image a patch lies (c); G, one vector a place, sees
where in the view it lies (a), whatever the picture; h, a small MLP, sees the raw feature. Many images are decomposed at
once, each with its own tables: a leading axis I everywhere, and losses summed over it, so that nothing mixes.

Source: Yang et al., "Denoising Vision Transformers", arXiv 2401.02957; Jiawei-Yang/Denoising-ViT (commit 82704df),
neural_feature_field.py, offline_denoiser.py, main_img_denoising.py. `Plan`'s defaults are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import WeightsError
from vitkit.parts.hash_grid import INITIAL, Corners, Level, mix, total_entries
from vitkit.parts.row_adam import RowAdam

RESIDUAL, SPARSITY = 0.1, 0.02  # weights of the residual's two losses
BETAS, EPS = (0.9, 0.99), 1e-15


@dataclass(frozen=True)
class Plan:
    """How a decomposition is fitted. `rows="touched"` updates the table's rows that a step used (RowAdam) and reads G by
    lookup; "dense" updates all, and reads G by interpolation at its nodes, which is the official arithmetic: rounding there
    gives a place's neighbours gradients of 1e-8, which an eps of 1e-15 makes visible in the fourth digit."""

    steps: int = 25_000
    pixels: int = 2048  # drawn a step and image, with replacement
    lr: float = 0.01
    min_lr: float = 0.001
    warmup: int = 2500
    freeze_after: float = 0.5  # share of the steps after which G stands still and h starts
    weight_decay: float = 1e-5  # L2, in the gradient
    rows: Literal["touched", "dense"] = "touched"

    def rate(self, step: int) -> float:
        """The learning rate of 0-based `step`."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * share))

    def frozen(self, step: int) -> bool:
        return step > int(self.freeze_after * self.steps)


class Decomposition(nn.Module):
    """F, G and h of `count` images with features of width `dim` on views of `grid` (h, w) patches.

    `seeds`: one for each image, so that what an image gets does not depend on which others are fitted beside it.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        levels: tuple[Level, ...],
        *,
        features: int = 8,
        count: int = 1,
        seeds: Sequence[int] | None = None,
    ):
        super().__init__()
        self.dim, self.grid, self.levels, self.features, self.count = dim, grid, levels, features, count
        self.entries = total_entries(levels)
        half, quarter, places = dim // 2, max(1, dim // 4), grid[0] * grid[1]
        sizes = ((half, len(levels) * features), (dim, half))
        inner = ((quarter, dim), (quarter, quarter), (dim, quarter))
        made: dict[str, list[Tensor]] = {}
        for seed in range(count) if seeds is None else seeds:
            generator = torch.Generator().manual_seed(seed)
            own = {"table": _uniform((self.entries, features), INITIAL, generator)}
            own["artifacts"] = 0.02 * torch.randn(places, dim, generator=generator)
            for name, layers in (("field", sizes), ("residual", inner)):
                for index, shape in enumerate(layers):  # nn.Linear's own initialisation
                    own[f"{name}_weight{index}"] = _uniform(shape, shape[1] ** -0.5, generator)
                    own[f"{name}_bias{index}"] = _uniform((1, shape[0]), shape[1] ** -0.5, generator)
            for name, value in own.items():
                made.setdefault(name, []).append(value)
        for name, values in made.items():
            self.register_parameter(name, nn.Parameter(torch.cat(values) if name == "table" else torch.stack(values)))

    def encode(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the (joint) table and weights, (I, N, L, 4), of coordinates (I, N, 2) in [0, 1]."""
        corners = self.__dict__.get("_corners")
        if corners is None or corners.scale.device != coords.device:
            corners = self.__dict__["_corners"] = Corners(self.levels, coords.device)
        rows, weights = corners(coords)
        first = self.entries * torch.arange(len(coords), device=coords.device)
        return rows + first.view(-1, 1, 1, 1), weights

    def field(self, coords: Tensor, table: Tensor | None = None) -> Tensor:
        """F (I, N, D) at coordinates (I, N, 2)."""
        return self.field_of(mix(self.table if table is None else table, *self.encode(coords)))

    def field_of(self, encoding: Tensor) -> Tensor:
        """F from encodings (I, N, L * features)."""
        hidden = torch.baddbmm(self.field_bias0, encoding, self.field_weight0.mT).relu()
        return torch.baddbmm(self.field_bias1, hidden, self.field_weight1.mT)

    def artifact(self, places: Tensor) -> Tensor:
        """G (I, N, D) at `places` (I, N), row * w + column of the view."""
        first = self.grid[0] * self.grid[1] * torch.arange(len(places), device=places.device).unsqueeze(-1)
        return F.embedding(places + first, self.artifacts.flatten(0, 1))

    def artifact_between(self, coords: Tensor) -> Tensor:
        """G (I, N, D) at any coordinates (I, N, 2) of the view, x first, in [-1, 1] from first to last patch."""
        table = self.artifacts.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.grid_sample(table, coords.unsqueeze(1), mode="bilinear", align_corners=True).squeeze(2).mT

    def residual(self, raw: Tensor) -> Tensor:
        """h (I, N, D) of raw features (I, N, D)."""
        x = torch.baddbmm(self.residual_bias0, raw, self.residual_weight0.mT).relu()
        x = torch.baddbmm(self.residual_bias1, x, self.residual_weight1.mT).relu()
        return torch.baddbmm(self.residual_bias2, x, self.residual_weight2.mT)

    def losses(self, raw: Tensor, field: Tensor, artifact: Tensor, *, second: bool) -> dict[str, Tensor]:
        """Every term (I,), already weighted, of raw features (I, N, D); `second`: the phase in which h learns."""
        explained = field + artifact
        residual = self.residual(raw) if second else None
        predicted = explained if residual is None else explained + residual.detach()
        found = {"l2": _mse(predicted, raw), "cosine": 1 - F.cosine_similarity(predicted, raw, dim=-1).mean(-1)}
        if residual is not None:
            found["residual"] = RESIDUAL * _mse(residual, (raw - explained).detach())
            found["sparsity"] = SPARSITY * residual.abs().mean((1, 2))
        return found

    def official_state(self, image: int = 0) -> dict[str, Tensor]:
        """Tensors of one image under the authors' names, `field.*` and `denoiser.*`."""
        table = self.table.view(self.count, -1)[image]
        artifacts = self.artifacts[image].T.reshape(1, self.dim, *self.grid)
        found = {"field.neural_field.params": table, "denoiser.shared_artifacts": artifacts}
        for official, own, number in (("field.mlp", "field", 2), ("denoiser.residual_predictor", "residual", 3)):
            for index in range(number):
                found[f"{official}.{2 * index}.weight"] = getattr(self, f"{own}_weight{index}")[image]
                found[f"{official}.{2 * index}.bias"] = getattr(self, f"{own}_bias{index}")[image, 0]
        return found

    @torch.no_grad()
    def load_official(self, tensors: dict[str, Tensor], image: int = 0) -> None:
        """Take one image's tensors under the authors' names; those of the field may come without the denoiser's."""
        own = self.official_state(image)
        odd = [n for n, v in tensors.items() if n not in own or own[n].shape != v.shape]
        odd += [n for n in own if n.startswith("field.") and n not in tensors]
        if odd:
            raise WeightsError(
                f"{len(odd)} tensors do not fit this decomposition, e.g. {odd[0]}",
                fix="the levels, features, width and grid that it was made with",
            )
        for name, value in tensors.items():
            if name == "denoiser.shared_artifacts":
                self.artifacts[image] = value[0].flatten(1).T
            else:
                own[name].copy_(value)


class Fit:
    """Fits a `Decomposition` to features (I, V, h, w, D) whose patches lie at coordinates (I, V, h, w, 2), x first.

    One `step()` at a time, so that the caller shows progress; `finish()` leaves all parameters up to date. `seeds`: of the
    pixels that each image draws.
    """

    def __init__(self, model: Decomposition, features: Tensor, coords: Tensor, plan: Plan, seeds: Sequence[int]):
        self.model, self.plan, self.now = model, plan, 0
        self.features, self.coords = features.flatten(1, 3), coords.flatten(1, 3)
        self.places = math.prod(model.grid)
        self.nodes = coordinates(model.grid, -1.0).flatten(0, 1).to(features.device)
        self.images = torch.arange(model.count, device=features.device).unsqueeze(-1)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.rows: RowAdam | None = None
        if plan.rows == "touched":
            self.rows = RowAdam(
                model.table.detach(), steps=plan.steps, betas=BETAS, eps=EPS, weight_decay=plan.weight_decay
            )
        others = [p for p in model.parameters() if self.rows is None or p is not model.table]
        self.adam = torch.optim.Adam(others, lr=plan.lr, betas=BETAS, eps=EPS, weight_decay=plan.weight_decay)

    def step(self, indices: Tensor | None = None) -> dict[str, Tensor]:
        """One step on pixels `indices` (I, N) of the flattened views (drawn by default); the losses (I,)."""
        model, plan = self.model, self.plan
        rate, second = plan.rate(self.now), plan.frozen(self.now)
        model.artifacts.requires_grad_(not second)
        if indices is None:
            indices = self.draw()
        raw, coords = self.features[self.images, indices].float(), self.coords[self.images, indices]
        rows, weights = model.encode(coords)
        table: Tensor = model.table
        if self.rows is not None:
            touched, rows = torch.unique(rows, return_inverse=True)
            table = self.rows.take(touched).requires_grad_()
        field = model.field_of(mix(table, rows, weights))
        places = indices % self.places
        artifact = model.artifact(places) if self.rows is not None else model.artifact_between(self.nodes[places])
        losses = model.losses(raw, field, artifact, second=second)
        self.adam.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros((), device=raw.device)).sum().backward()
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        if self.rows is not None:
            self.rows.step(table.grad, rate)  # type: ignore[arg-type]
        self.now += 1
        return {name: value.detach() for name, value in losses.items()}

    def draw(self) -> Tensor:
        count, pixels = self.features.shape[1], self.plan.pixels
        drawn = [torch.randint(count, (pixels,), generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.features.device)

    @torch.no_grad()
    def finish(self) -> Decomposition:
        if self.rows is not None:
            self.model.table.copy_(self.rows.settle())
        return self.model

    def run(self, tick: Callable[[dict[str, Tensor]], None] | None = None) -> Decomposition:
        """All steps that are left."""
        while self.now < self.plan.steps:
            losses = self.step()
            if tick is not None:
                tick(losses)
        return self.finish()


@torch.no_grad()
def field_maps(model: Decomposition, grid: tuple[int, int] | None = None) -> Tensor:
    """F (I, h, w, D) over the whole image: what stage 1 calls the denoised features."""
    grid = grid or model.grid
    coords = coordinates(grid).to(model.table.device).flatten(0, 1).expand(model.count, -1, -1)
    return model.field(coords).unflatten(1, grid)


def coordinates(grid: tuple[int, int], first: float = 0.0) -> Tensor:
    """Coordinates (h, w, 2), x first, of the whole image's patches from `first` to 1: both ends are the image's edges."""
    y, x = torch.meshgrid(torch.linspace(first, 1, grid[0]), torch.linspace(first, 1, grid[1]), indexing="ij")
    return torch.stack([x, y], -1)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2))
