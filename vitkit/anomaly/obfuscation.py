"""What is hidden and what is left of it: attention to masks, masks to mosaics, the mosaic's scale, random masks.

Source: Park et al., "Visual defect obfuscation based self-supervised anomaly detection", Scientific Reports 14:18872, 2024
(arXiv 2310.04010 v2), and what its first author's later work says of it; DINO's mass rule from facebookresearch/dino.

Pictures are (B, C, H, W) in [0, 1]; masks bool, True = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import ConfigError

QUARTILE = 0.674  # deviations above the mean where a normal distribution has its third quartile
SCALES = (2, 4, 8, 16, 32)  # cells that `choose_scale` tries
COARSEST = 32  # cells along the shorter side of the scale taken without a choice: 8 pixels at 256


def salient(attention: Tensor, rule: str = "sigma", amount: float = QUARTILE) -> Tensor:
    """Mask (..., h, w) of an attention map (..., h, w).

    "sigma": above the map's own mean by more than `amount` deviations; "percentile": the `amount` largest share of places;
    "mass": the fewest places that hold the share `amount` of all attention. A map without any contrast hides nothing.
    """
    flat = attention.flatten(-2)
    if rule == "sigma":
        level = flat.mean(-1, keepdim=True) + amount * flat.std(-1, keepdim=True, correction=0)
        # A constant map has deviations of rounding only.
        contrast = flat.amax(-1, keepdim=True) - flat.amin(-1, keepdim=True) > 1e-6 * flat.abs().amax(-1, keepdim=True)
        return ((flat > level) & contrast).unflatten(-1, attention.shape[-2:])
    values, order = flat.sort(dim=-1)
    if rule == "mass":
        kept = (values / values.sum(-1, keepdim=True)).cumsum(-1) > 1 - amount
    elif rule == "percentile":
        places = flat.shape[-1]
        kept = torch.arange(places, device=flat.device).expand_as(order) >= places - round(amount * places)
    else:
        raise ConfigError(f"there is no mask rule {rule!r}", fix="sigma, percentile or mass")
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, attention.shape[-2:])


def enlarge(values: Tensor, size: Sequence[int], mode: str = "nearest") -> Tensor:
    """(B, heads, h, w) to `size`, by repeating ("nearest") or between centres ("bilinear")."""
    options = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(values, size=tuple(size), mode=mode, **options)


def mosaic(x: Tensor, scale: int) -> Tensor:
    """Each cell of `scale` x `scale` pixels becomes its mean; 1 changes nothing."""
    height, width = x.shape[2:]
    if scale < 1 or height % scale or width % scale:
        raise ConfigError(f"a mosaic of {scale} pixels on {height} x {width}", fix="a divisor of height and width")
    if scale == 1:
        return x
    return F.interpolate(F.avg_pool2d(x, scale), scale_factor=float(scale), mode="nearest")


def obfuscate(x: Tensor, mask: Tensor, scale: int | None) -> Tensor:
    """`x` with what `mask` (B, 1, H, W) hides replaced by its mosaic of `scale`; None: by nothing (0)."""
    return torch.where(mask, x.new_zeros(()) if scale is None else mosaic(x, scale), x)


def usual_scale(size: Sequence[int]) -> int:
    """The scale that is taken where none was chosen: 8 pixels at 256, in proportion elsewhere, a divisor of both sides."""
    wanted = max(1, min(size) // COARSEST)
    return max(s for s in range(1, wanted + 1) if all(side % s == 0 for side in size))


def scales_for(size: Sequence[int]) -> list[int]:
    """Those of `SCALES` that divide both sides and leave at least two cells along each."""
    return [s for s in SCALES if all(side % s == 0 and side >= 2 * s for side in size)]


def paste(images: Tensor, donors: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Synthetic defects: into each picture a patch of its donor (other picture, other place), centred somewhere in `mask`
    (B, 1, H, W). Sides are 1/12 to 1/4 of the picture. Returns pictures and masks (B, 1, H, W) of what was pasted."""
    out, region = images.clone(), torch.zeros_like(mask)
    height, width = images.shape[2:]

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low + 1), (), generator=generator))

    for i in range(len(images)):
        h, w = (draw(max(2, side // 12), side // 4 + 1) for side in (height, width))
        places = mask[i, 0].nonzero()
        if not len(places):
            places = torch.ones_like(mask[i, 0]).nonzero()
        y, x = places[draw(0, len(places))].tolist()
        top, left = min(max(0, y - h // 2), height - h), min(max(0, x - w // 2), width - w)
        from_top, from_left = draw(0, height - h + 1), draw(0, width - w + 1)
        out[i, :, top : top + h, left : left + w] = donors[i, :, from_top : from_top + h, from_left : from_left + w]
        region[i, :, top : top + h, left : left + w] = True
    return out, region


def choose_scale(images: Tensor, mask: Tensor, seed: int = 0) -> tuple[int, list[dict[str, float]]]:
    """The mosaic's scale from normal pictures alone, and a row for each scale that was tried.

    What a mosaic takes away from the hidden region is e = mean |x - mosaic(x, s)| there. A scale is good where e of pictures
    with a pasted patch stands out from e of the same pictures without: the gap of the means in deviations of the normal ones.
    Small scales leave defects in the hint, large ones lose so much of normal structure that defects drown in it.
    """
    tried = scales_for(images.shape[2:])
    if len(tried) < 2 or len(images) < 2:
        return usual_scale(images.shape[2:]), []
    pasted, _ = paste(images, images.roll(1, 0), mask, torch.Generator().manual_seed(seed))
    share = mask.flatten(1).float().mean(1)
    shown = share > 0
    rows = []
    for scale in tried:
        normal, defect = (_lost(x, mask, scale)[shown] for x in (images, pasted))
        spread = float(normal.std(correction=0)) if len(normal) else 0.0
        gap = float((defect - normal).mean()) / spread if spread > 0 else 0.0
        rows.append({"scale": scale, "normal": _mean(normal), "pasted": _mean(defect), "gap": gap})
    best = max(rows, key=lambda row: row["gap"])
    return (int(best["scale"]) if best["gap"] > 0 else usual_scale(images.shape[2:])), rows


def _lost(x: Tensor, mask: Tensor, scale: int) -> Tensor:
    """(B,) mean absolute change of the hidden pixels."""
    change = (x - mosaic(x, scale)).abs().mean(1, keepdim=True) * mask
    return change.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


def random_cells(seeds: Tensor, size: Sequence[int], cell: int, parts: int) -> Tensor:
    """RIAD's masks (B, parts, H, W): cells of `cell` pixels dealt at random into `parts` disjoint sets, each one a mask; a
    function of each picture's seed (B,)."""
    rows, columns = (-(-side // cell) for side in size)
    masks = []
    for seed in seeds.tolist():
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(int(seed) % (2**63)))
        masks.append((order % parts).view(rows, columns))
    which = torch.stack(masks).repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, : size[0], : size[1]]
    return (which.unsqueeze(1) == torch.arange(parts).view(1, -1, 1, 1)).to(seeds.device)
