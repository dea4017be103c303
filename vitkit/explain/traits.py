"""Trait panels of a Prompt-CAM model: one picture a class, for people who know the images and not the model.

Source: the notebook and `utils/visual_utils.py` of Imageomics/Prompt_CAM, arXiv 2501.09333. A map is enlarged by cubic
interpolation, scaled to [0, 1], smoothed (9 x 9 pixels, sigma 1.7), coloured blue to red and laid half transparent over the
image. (The notebook mixes up red and blue of the photograph; here they are right.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.explain.class_heads import Ranking, rank, require_class_prompts
from vitkit.explain.shared import evaluating

KERNEL, SIGMA = 9, 1.7  # OpenCV's sigma for a kernel of 9
COLOURS = "jet"
EXAMPLES = 2  # images in a panel


def overlay(pixels: Tensor, maps: Tensor) -> np.ndarray:
    """Maps (B, h, w) over images (B, 1 or 3, H, W) in [0, 1] or uint8: uint8 (B, H, W, 3), RGB."""
    from matplotlib import colormaps

    if maps.ndim != 3:
        raise ConfigError(f"a map of shape {tuple(maps.shape)} cannot be laid over an image", fix="maps (B, h, w)")
    heat = _unit(F.interpolate(maps[:, None].float().cpu(), size=pixels.shape[-2:], mode="bicubic"))
    colours = colormaps[COLOURS](smooth(heat)[:, 0].numpy())[..., :3]
    mixed = 0.5 * colours + 0.5 * photographs(_unit(floats(pixels)))
    return (255 * mixed).round().astype(np.uint8)


def smooth(x: Tensor) -> Tensor:
    """A Gaussian of 9 x 9 pixels and sigma 1.7 over (B, 1, H, W), mirrored at the edges."""
    offsets = torch.arange(KERNEL) - KERNEL // 2
    line = torch.exp(-offsets.float().square() / (2 * SIGMA**2))
    line = line / line.sum()
    half = KERNEL // 2
    mode = "reflect" if min(x.shape[-2:]) > half else "replicate"
    x = F.pad(x, (half, half, half, half), mode=mode)
    return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))


def floats(pixels: Tensor) -> Tensor:
    """uint8 or floating pixels as float32 in [0, 1]."""
    return (pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()).cpu()


def photographs(pixels: Tensor) -> np.ndarray:
    """Images (B, C, H, W) as (B, H, W, 3): grey ones repeated, of other channel counts the first three."""
    rgb = pixels[:, :1].expand(-1, 3, -1, -1) if pixels.shape[1] < 3 else pixels[:, :3]
    return rgb.permute(0, 2, 3, 1).numpy()


def _unit(x: Tensor) -> Tensor:
    """Each of (B, ...) from its smallest to its largest value, 0 to 1."""
    low, high = (getattr(x.flatten(1), name)(1).view(-1, *[1] * (x.ndim - 1)) for name in ("amin", "amax"))
    return (x - low) / (high - low).clamp_min(1e-12)


def panels(
    vit: nn.Module, pixels: Tensor, classes: list[int], class_names: list[str], labels: Any, heads: int = 4
) -> list[tuple[str, np.ndarray]]:
    """One picture (title, uint8 (H, W, 3)) for each of `classes`: images of the class, where its most important heads
    look in them, and where the same heads look for the class that comes next.

    pixels: (B, C, H, W), uint8 or in [0, 1]; normalised here by the passport. labels: the true class of each image, None
    or -1 where unknown; None for all. Where no image has the label, those that the model finds most like the class.
    Raises ConfigError where the ViT has no class prompts or a class does not exist.
    """
    if heads < 1:
        raise ConfigError(f"heads is {heads}", fix="at least one")
    names = list(class_names)
    if len(require_class_prompts(vit).class_prompts) != len(names):
        raise ConfigError(f"{len(names)} class names for {len(vit.class_prompts)} classes", fix="a name for each class")
    known = [-1 if label is None else int(label) for label in ([None] * len(pixels) if labels is None else labels)]
    device = next(vit.parameters()).device
    images = vit.passport.preprocess.normalise(pixels.to(device))
    with torch.no_grad(), evaluating(vit):
        scores = torch.cat([tokens.logits(vit, part) for part in images.split(32)])
    found = []
    for one in classes:
        if not 0 <= one < len(names):
            raise ConfigError(f"class {one} does not exist", fix=f"the model has classes 0..{len(names) - 1}")
        rows = examples(scores, known, one)
        asked = [_Example(vit, images[i : i + 1], pixels[i : i + 1], scores[i], known[i], one, heads) for i in rows]
        found.append((f"What tells “{names[one]}”", _draw(asked, names, one, any(k == one for k in known))))
    return found


def examples(scores: Tensor, labels: list[int], one: int) -> list[int]:
    """The images to show for class `one`: of its label, correctly classified ones first, the surest first; of any label
    where there is none."""
    chance = scores.softmax(1)[:, one].tolist()
    right = (scores.argmax(1) == one).tolist()
    own = [i for i, label in enumerate(labels) if label == one] or list(range(len(labels)))
    return sorted(own, key=lambda i: (not right[i], -chance[i], i))[:EXAMPLES]


class _Example:
    """One image asked for class `one` and for the strongest other class."""

    def __init__(
        self, vit: Any, image: Tensor, pixels: Tensor, scores: Tensor, label: int, one: int, heads: int
    ) -> None:
        self.label, self.scores, self.one = label, scores, one
        self.multi = vit.passport.task == "multi"
        others = scores.clone()
        others[one] = -torch.inf
        self.other = int(others.argmax())
        ranking = rank(vit, image, one)
        self.heads = ranking.heads[0, :heads].tolist()
        self.sure = self.with_top(ranking)
        self.photo = photographs(floats(pixels))[0].clip(0, 1)
        self.own = overlay(pixels.expand(len(self.heads), -1, -1, -1), ranking.top_maps(heads)[0])
        self.rival: np.ndarray | None = None  # stays so where there is one class
        if self.other != one:
            maps = rank(vit, image, self.other).evidence.maps[0, self.heads]
            self.rival = overlay(pixels.expand(len(self.heads), -1, -1, -1), maps)

    def probability(self, one: int, scores: Tensor) -> float:
        return float(scores[one].sigmoid() if self.multi else scores.softmax(0)[one])

    def with_top(self, ranking: Ranking) -> list[float]:
        """Probability of the class with only its 1, 2, ... most important heads left: no other score changes."""
        found = []
        for count in range(1, len(self.heads) + 1):
            scores = self.scores.clone()
            scores[self.one] = ranking.scores[0, count]
            found.append(self.probability(self.one, scores))
        return found


def _draw(shown: list[_Example], names: list[str], one: int, labelled: bool) -> np.ndarray:
    """The panel of class `one`, two rows an image, drawn off screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + max(len(example.heads) for example in shown)
    rows = sum(1 if example.rival is None else 2 for example in shown)
    height, width = shown[0].photo.shape[:2]
    figure = Figure(figsize=(1.8 * columns, (1.7 * height / width + 0.45) * rows + 0.65), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    words = "Red: this class looks here. Percent: the model's belief in this class with only the heads up to here."
    if not labelled:
        words = "No image here has this label; these come closest. " + words
    figure.suptitle(f"What tells “{_short(names[one], 60)}”\n", fontsize=12, fontweight="bold", x=0.005, ha="left")
    figure.text(0.006, 1 - 0.40 / figure.get_figheight(), words, fontsize=8, va="center")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    row = 0
    for example in shown:
        _own_row(axes[row], example, names)
        if example.rival is not None:
            _rival_row(axes[row + 1], example, example.rival, names)
        row += 1 if example.rival is None else 2
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _own_row(axes: Any, example: _Example, names: list[str]) -> None:
    predicted = int(example.scores.argmax())
    true = f"label: {_short(names[example.label])}\n" if example.label >= 0 else ""
    _show(axes[0], example.photo, f"{true}model: {_short(names[predicted])}, {_percent(example, predicted)}", "left")
    for place, (head, picture) in enumerate(zip(example.heads, example.own, strict=True)):
        words = f"head {head} alone" if place == 0 else f"and head {head}"
        _show(axes[place + 1], picture, f"{words}: {example.sure[place]:.0%}")


def _rival_row(axes: Any, example: _Example, pictures: np.ndarray, names: list[str]) -> None:
    words = f"the same heads,\nasked for\n“{_short(names[example.other])}”\n({_percent(example, example.other)})"
    axes[0].text(0.97, 0.5, words, transform=axes[0].transAxes, ha="right", va="center", fontsize=9)
    for place, (head, picture) in enumerate(zip(example.heads, pictures, strict=True)):
        _show(axes[place + 1], picture, f"head {head}")


def _show(axis: Any, picture: np.ndarray, title: str, side: Any = "center") -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=8, loc=side, pad=3)


def _percent(example: _Example, one: int) -> str:
    return f"{example.probability(one, example.scores):.0%}"


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
