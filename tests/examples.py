"""Small models, settings and batches with which the contract of every method is tested (tests/test_methods.py)."""

from __future__ import annotations

from typing import Any

import timm
import torch

import vitkit.backbones  # noqa: F401  # registers ViTs of volumes and videos
from vitkit.run import discover
from vitkit.settings import Classify, Task

from .test_tokens import FAMILIES, images, make

TASK = Task("single", ("a", "b", "c"))
KIND = {**dict.fromkeys(FAMILIES, "image"), "volume": "volume", "video": "video"}
SIZES = {
    "image": ((64, 64), (64, 96)),
    "volume": ((16, 16, 24), (16, 32, 24)),
    "video": ((4, 16, 32), (8, 16, 32)),
}
_THREE = {
    "volume": ("volume_vit_tiny_patch16_96", (8, 8, 8), 1),
    "video": ("video_vit_tiny_patch16_224", (2, 8, 8), 3),
}
# Defaults are sized for real models. A gate of 0 would hide what is behind it.
_SMALL: dict[str, Any] = {
    "bottleneck": 4, "decoder_dim": 24, "decoder_heads": 2, "rank": 2, "dropout": 0.0, "mask_ratio": 0.5, "gate_init": 0.1,
    "steps": 2, "prompt_dropout": 0.0, "prototypes": 16, "head_hidden": 16, "bottleneck_dim": 8, "local_crops": 2,
    "mlp": "16-16-8", "feature_size": 2,
}  # fmt: skip
_OWN = {
    "dvpt": {"prompts": 4},
    "ear": {"filters": (4, 8)},
    "hi_end_mae": {"layers": (0, 1, 2)},
    "unetr": {"layers": (0, 1, 2)},
}


def families(verb: str, name: str) -> list[str]:
    """The families of ViTs that a method claims."""
    kinds = getattr(discover.method_class(discover.load(verb, name)), "kinds", ("image",))
    return [family for family, kind in KIND.items() if kind in kinds]


def model(family: str) -> torch.nn.Module:
    """3 blocks of width 48, with every weight random so that nothing hides behind a zero."""
    if family not in _THREE:
        return make(family)
    arch, patch, chans = _THREE[family]
    torch.manual_seed(0)
    sizes = {"img_size": SIZES[family][0], "patch_size": patch, "in_chans": chans, "num_classes": 0}
    vit = timm.create_model(arch, **sizes, embed_dim=48, depth=3, num_heads=4).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def settings(module: Any) -> Any:
    """The method's settings, shrunk."""
    small = _SMALL | _OWN.get(module.__name__.rpartition(".")[2], {})
    return module.Settings(**{key: small[key] for key in module.Settings.__dataclass_fields__ if key in small})


def build(verb: str, name: str, vit: torch.nn.Module, **classify: Any) -> torch.nn.Module:
    """The method of that name on `vit`."""
    module = discover.load(verb, name)
    kind = discover.method_class(module)
    if kind.needs_labels:
        return kind(vit, settings(module), task=TASK, classify=Classify(**{"head": "linear", **classify}))
    return kind(vit, settings(module))


def pixels(family: str, size: tuple[int, ...] | None = None, count: int = 2) -> torch.Tensor:
    """(B, C, *size) as a model of that family takes it."""
    size = size or SIZES[KIND[family]][0]
    if KIND[family] == "image":
        return images(size, count)
    chans = _THREE[family][2]
    return torch.randn(count, chans, *size, generator=torch.Generator().manual_seed(1))


def batch(name: str, family: str = "plain", size: tuple[int, ...] | None = None, count: int = 4) -> dict[str, Any]:
    """What the loader and the method's own views would give."""
    image = pixels(family, size, count)
    found = {"image": image, "label": torch.arange(count) % 3, "seed": torch.arange(count) * 7919 + 1}
    if name == "dinov2":
        found |= {"image_2": image.flip(-1), "image_local": image[:, None, :, :32, :32].repeat(1, 2, 1, 1, 1)}
    if name == "tov_vicreg":
        found |= {f"image_{letter}": image.roll(k + 1, -1) for k, letter in enumerate("yzw")}
        found["order"] = torch.arange(count) % 6
    if name == "dvt":  # clean features to learn from
        grid = (image.shape[2] // 16, image.shape[3] // 16)
        found["target"] = torch.randn(count, *grid, 48, generator=torch.Generator().manual_seed(2))
    if name == "unetr":
        found["mask"] = (image[:, 0] > 0).long()
    return found
