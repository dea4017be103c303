"""Which ViT a checkpoint is: what a config says, what the shapes prove, and building it as a timm model.

Nothing is read off file names. A config (passport, timm's config.json, a plain dict of keywords, the authors' saved
arguments) may name the architecture or give keywords; shapes prove the rest and must agree with it. Two things shapes
cannot tell: the number of heads, known for standard widths only, and the sides of a grid that is not square.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import WeightsError
from vitkit.layouts import ANCHOR, Reading
from vitkit.parts.configs import BARE, mlp_ratio, zoo
from vitkit.parts.positions import square_grid

_SIDES = ("img_size", "patch_size")
# (width, depth) -> (heads, timm's name of that size). Sizes in the wild with one number of heads, see `num_heads`.
SIZES: dict[tuple[int, int], tuple[int, str]] = {
    (192, 12): (3, "vit_tiny_patch{}_224"),
    (384, 12): (6, "vit_small_patch{}_224"),
    (768, 12): (12, "vit_base_patch{}_224"),
    (1024, 24): (16, "vit_large_patch{}_224"),
    (1280, 32): (16, "vit_huge_patch{}_224"),
    (1408, 40): (16, "vit_giant_patch{}_224"),
    (1536, 40): (24, "vit_giant_patch{}_dinov2"),
    (1664, 48): (16, "vit_gigantic_patch{}_224"),
}


def facts(reading: Reading, said: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a bare VisionTransformer that the shapes of `reading.vit` prove. `said` helps only with the grid.

    Raises WeightsError for foreign blocks, a grid that cannot be known, or three axes of which nobody says whether they
    are a volume's or a video's.
    """
    vit = reading.vit
    patch = vit[ANCHOR]
    kind = said.get("kind", reading.hints.get("kind"))
    if patch.ndim == 5 and kind is None:
        raise WeightsError(
            f"the patch embedding has three axes {tuple(patch.shape)}, and nothing says of what",
            fix='{"kind": "volume"} or {"kind": "video"} in a config.json beside the file, or in arch_kwargs',
        )
    for key in (
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "blocks.0.norm1.weight",
    ):
        if key not in vit:
            raise WeightsError(
                f"the blocks are not those of a plain ViT: {key} is missing (it has {', '.join(_block_keys(vit))})",
                fix="name the architecture with --arch",
            )
    width, hidden = patch.shape[0], vit["blocks.0.mlp.fc1.weight"].shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in vit if re.match(r"blocks\.\d+\.", name))
    found: dict[str, Any] = {
        "embed_dim": width,
        "depth": depth,
        "patch_size": [int(side) for side in patch.shape[2:]],
        "in_chans": patch.shape[1],
        "mlp_ratio": mlp_ratio(hidden, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in vit or "blocks.0.attn.qkv.q_bias" in vit,
        "class_token": "cls_token" in vit,
        "reg_tokens": vit["reg_token"].shape[1] if "reg_token" in vit else 0,
        "norm_eps": 1e-6,  # what timm and every author here use; a config may say otherwise
    }
    optional = {
        "init_values": (1e-5, "blocks.0.ls1.gamma"),
        "qk_norm": (True, "blocks.0.attn.q_norm.weight"),
        "pre_norm": (True, "norm_pre.weight"),
        "attn_layer": ("cosine", "blocks.0.attn.q_norm.scale"),  # vitkit.parts.cosine_attention
    }
    found |= {key: value for key, (value, name) in optional.items() if name in vit}
    if hidden == 2 * vit["blocks.0.mlp.fc2.weight"].shape[1]:
        found |= {"mlp_layer": "swiglu_packed", "act_layer": "silu"}
    found |= {key: reading.hints[key] for key in ("norm_eps", "act_layer") if key in reading.hints}
    if patch.ndim == 5:
        found["kind"] = kind
    found |= _grid(reading, found, said)
    if "cls_token" not in vit or ("fc_norm.weight" in vit and "norm.weight" not in vit):
        found |= {"global_pool": "avg", "fc_norm": "fc_norm.weight" in vit}
    return found


def _block_keys(vit: Mapping[str, Tensor]) -> list[str]:
    return sorted(name.removeprefix("blocks.0.") for name in vit if name.startswith("blocks.0."))[:4]


def _grid(reading: Reading, found: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """`img_size` and `no_embed_class` from the number of position rows."""
    if len(found["patch_size"]) == 3:
        return _grid_3d(reading, found, said)
    table = reading.vit.get("pos_embed")
    if table is None:
        raise WeightsError(
            "there is no position table, so positions are rotary, fixed or absent: the tensors cannot tell",
            fix="name the architecture with --arch",
        )
    rows, patch = table.shape[1], found["patch_size"]
    prefix = int(found["class_token"]) + found["reg_tokens"] + int("dist_token" in reading.vit)
    fixed = said.get("no_embed_class", reading.hints.get("no_embed_class"))
    size = said.get("img_size")
    options: dict[int, tuple[int, int]] = {}
    for count in dict.fromkeys([prefix, 0] if fixed is None else [0 if fixed else prefix]):
        grid = square_grid(rows - count) if size is None else (size[0] // patch[0], size[1] // patch[1])
        if grid is not None and math.prod(grid) == rows - count:
            options[count] = grid
    # 25 rows and a class token may be 5x5 patches and no row for the token, or 4x6 with one: only a config can tell.
    if len(options) == 1 and (size is not None or fixed is not None or prefix in options):
        ((count, grid),) = options.items()
        extra = {"no_embed_class": True} if prefix and not count else {}
        return {"img_size": [grid[0] * patch[0], grid[1] * patch[1]], **extra}
    shape = f"{rows} position rows, {prefix} prefix tokens, patch {patch[0]}x{patch[1]}"
    if size is not None:
        raise WeightsError(
            f"img_size {list(size)} does not fit the position table: {shape}",
            fix="correct img_size ([height, width]) in the config",
        )
    more = ', and "no_embed_class": true if the table has rows for patches only,' if options else ""
    raise WeightsError(
        f"the image size cannot be read off the tensors: the patches are not surely a square grid ({shape})",
        fix=f'give "img_size": [height, width]{more} in a config.json beside the file, or --arch',
    )


def _grid_3d(reading: Reading, found: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """`img_size` of volumes and videos: as said, or of a cube of patches."""
    patch, table = found["patch_size"], reading.vit.get("pos_embed")
    prefix = int(found["class_token"]) + found["reg_tokens"]
    fixed = bool(said.get("no_embed_class", reading.hints.get("no_embed_class")))
    size = said.get("img_size", reading.hints.get("img_size"))
    rows = None if table is None else table.shape[1] - (0 if fixed else prefix)
    extra = {"no_embed_class": True} if fixed else {}
    if size is None and rows is not None and found["kind"] == "volume":
        side = round(rows ** (1 / 3))
        size = [side * step for step in patch] if side**3 == rows else None
    if size is None:
        raise WeightsError(
            f"the input size cannot be read off the tensors ({'no' if rows is None else rows} position rows, patch "
            f"{'x'.join(map(str, patch))})",
            fix='give "img_size": [a, b, c] in a config.json beside the file, or in arch_kwargs',
        )
    if rows is not None and math.prod(side // step for side, step in zip(size, patch, strict=True)) != rows:
        raise WeightsError(
            f"img_size {list(size)} does not fit the position table: {rows} patch rows, patch {'x'.join(map(str, patch))}",
            fix="correct img_size in the config",
        )
    return {"img_size": list(size), **extra}


def num_heads(reading: Reading, found: Mapping[str, Any]) -> tuple[int, str]:
    """Heads of a ViT whose config does not say, and why; WeightsError listing the candidates when it cannot be known."""
    width, depth, patch = found["embed_dim"], found["depth"], found["patch_size"]
    special = reading.hints.get("num_heads", {}).get(width)
    if special:
        return special, f"{reading.kind} has {special} at width {width}"
    fix = 'put {"num_heads": N} into a config.json beside the file, or name the architecture with --arch'
    sides, pixels = ("x".join(map(str, found[key])) for key in ("patch_size", "img_size"))
    shape = f"{width} wide, {depth} deep, patch {sides}, {pixels} px"
    known = SIZES.get((width, depth))
    if known is None or reading.hints.get("biases_apart"):
        options = [n for n in range(1, width + 1) if width % n == 0 and 8 <= width // n <= 128]
        close = nearest_arch(found)
        raise WeightsError(
            f"the number of attention heads is not in the tensors ({shape}); candidates: {', '.join(map(str, options))}"
            + (f"; the nearest standard architecture is {close}" if close else ""),
            fix=fix,
        )
    heads, name = known
    # The one size in use with two numbers of heads. MoCo v3 keeps MAE's fixed table, DeiT and DINO learn theirs.
    if (width, depth) == (384, 12) and reading.hints.get("sincos"):
        raise WeightsError(
            f"the tensors fit two architectures ({shape}): 6 heads ({name.format(patch[0])}, MAE) or 12 (MoCo v3's ViT-S)",
            fix=f'--arch {name.format(patch[0])} for 6 heads, or {{"num_heads": 12}} in a config.json beside the file',
        )
    return heads, f"the usual number at width {width} and depth {depth}"


def nearest_arch(found: Mapping[str, Any]) -> str | None:
    """The standard timm architecture of most similar width and depth that exists in timm."""
    timm = zoo()

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / found["embed_dim"])) + abs(math.log(size[1] / found["depth"]))

    patch = found.get("patch_size", [16])[0]
    for size in sorted(SIZES, key=distance):
        for side in (patch, 16, 14):
            name = SIZES[size][1].format(side)
            if timm.is_model(name):
                return name
    return None


def build(arch: str, kwargs: Mapping[str, Any], *, drop_path_rate: float = 0.0, meta: bool = False, **more: Any) -> Any:
    """A timm model without a head, of a timm name or bare class, ready for any image size; `meta`: shapes only.

    Randomly initialised from torch's global generator. Raises WeightsError for names, classes and keywords that do not
    work, naming the nearest that do.
    """
    timm = zoo()
    ready: dict[str, Any] = {
        "dynamic_img_size": True,
        "patch_drop_rate": 0.0,
        "drop_path_rate": drop_path_rate,
        "num_classes": 0,
    }
    ready |= constructor(arch, kwargs) | more
    untied = ready.pop("untied_norms", False)
    with torch.device("meta") if meta else torch.device("cpu"):
        try:
            if arch in BARE:
                vit = _bare_class(arch)(**ready)
            else:
                vit = timm.create_model(arch, pretrained=False, **ready)
        except (TypeError, AssertionError, RuntimeError, ValueError) as error:
            if arch not in BARE:  # other classes do not know our keywords: say that it is one of them
                _require_vit(arch, timm.create_model(arch, pretrained=False))
            why = str(error) or "a value or size that its stem cannot divide"  # timm has bare assertions
            raise WeightsError(f"{arch} cannot be built with {_shown(kwargs)}: {why}", fix="correct them") from error
    _require_vit(arch, vit)
    if getattr(vit.patch_embed, "kind", "") == "video":
        from vitkit.backbones.video import fix_positions

        fix_positions(vit)
    if untied:
        from vitkit.parts.dinov3 import untie

        with torch.device("meta") if meta else torch.device("cpu"):
            untie(vit)
    return vit


def _require_vit(arch: str, vit: nn.Module) -> None:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(vit, VisionTransformer | Eva):
        raise WeightsError(
            f"{arch} is a {type(vit).__name__}; vitkit's methods work on timm's VisionTransformer and Eva",
            fix="choose a ViT (vit_*, deit*, eva*), or use vitkit.tokens.maps for feature maps of any timm model",
        )


def is_eva(arch: str) -> bool:
    """Whether a timm name or bare class is an `Eva`, whose keywords are called differently."""
    return arch == "Eva" if arch in BARE else zoo().model_entrypoint(arch.split(".")[0]).__module__ == "timm.models.eva"


def constructor(arch: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """JSON keywords to what timm's constructors take."""
    from timm.layers import LayerNorm, SwiGLUPacked

    ready: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    kind = ready.pop("kind", "image")
    if kind != "image" or any(isinstance(ready.get(key), tuple) and len(ready[key]) == 3 for key in _SIDES):
        from vitkit.backbones import embed3d

        if arch in BARE:
            if kind == "image":
                raise WeightsError("sizes with three axes, and nothing says of what", fix="kind=volume or kind=video")
            ready["embed_layer"] = embed3d.VolumeEmbed if kind == "volume" else embed3d.VideoEmbed
            ready["dynamic_img_size"] = False
    eps = ready.pop("norm_eps", None)
    if eps is not None:
        ready["norm_layer"] = partial(LayerNorm, eps=float(eps))
    mlp = ready.pop("mlp_layer", None)
    if mlp is not None:
        if mlp != "swiglu_packed":
            raise WeightsError(f"mlp_layer is {mlp!r}", fix="swiglu_packed, or leave it out")
        ready["mlp_layer"] = SwiGLUPacked
    if ready.get("act_layer") == "gelu":
        del ready["act_layer"]
    if is_eva(arch):
        for plain, theirs in (("fc_norm", "use_fc_norm"), ("reg_tokens", "num_reg_tokens")):
            if plain in ready:
                ready[theirs] = ready.pop(plain)
    return ready


def _bare_class(arch: str) -> type[nn.Module]:
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled, Eva)}[arch]


def _shown(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in kwargs.items()) or "no keywords"
