"""Authors' checkpoint layouts, told apart by their keys and turned into timm's names.

A reader is a pure function from the tensors of a file to a `Reading`; `READERS` lists them with what they recognise, most
special first, and `read` picks one. A reader renames and fuses, and puts aside what is not part of the trunk; it decides
no architecture and drops nothing silently.

    AdaptFormer       split q/k/v and `fc1`/`fc2` in the block; adapters `adaptmlp.*`, prompts `embeddings.*`, head 0/1
    VideoMAE, BEiT    `q_bias`/`v_bias` beside a fused `qkv.weight`, `gamma_1`/`gamma_2`
    MAE               `decoder_*` and `mask_token` beside a plain encoder, or the encoder alone
    DINOv2            `register_tokens`, `mask_token` (1, D), chunked blocks, SwiGLU `w12`/`w3`
                      also as Hugging Face's Dinov2Model names it (vitkit.parts.hf_names), with PH-Reg's registers
    DINOv3            `storage_tokens`, `rope_embed.periods` (vitkit.parts.dinov3)
    CLIP              the visual tower of OpenAI and open_clip, `transformer.resblocks.*`; DVPT's prompts beside it
    Hi-End-MAE        a 3-D encoder under `encoder.`, its positions `encoder_pos_embed`, decoder and bridge beside it
    plain             timm, DeiT, DINO, MoCo v3, fine-tuned MAE (`fc_norm`)

Wrappers (`module.`, `_orig_mod.`, ...) and any prefix in front of the trunk (`backbone.`, `encoder.`, ...) are removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitkit.errors import WeightsError
from vitkit.parts import hf_names, ph_reg_names, video_names
from vitkit.parts.dinov3 import is_dinov3, to_timm
from vitkit.parts.positions import is_sincos

Tensors = dict[str, Tensor]
ANCHOR = "patch_embed.proj.weight"
HI_END = "encoder_pos_embed"
CLIP_ANCHOR = "class_embedding"  # of CLIP's visual tower; its text tower has none
_KINDS = ("weight", "bias")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of two trunks in one file, the one that the authors evaluate.
_PREFERRED = (("base_encoder.", "momentum_encoder."),)


@dataclass
class Reading:
    """A checkpoint by timm's names: `vit` the trunk, `head` what sits on its feature, `extras` everything else under the
    authors' own names, `kind` in words, `notes` to tell the user."""

    vit: Tensors
    extras: Tensors
    head: Tensors
    kind: str
    notes: list[str] = field(default_factory=list)
    positions: str = "timm"  # the authors' rule for resampling the position table
    hints: dict[str, Any] = field(default_factory=dict)  # architecture facts that only the layout tells

    def summary(self, total: int) -> str:
        """'read as MAE encoder: 148 tensors used, 98 decoder tensors left', for a file of `total` tensors."""
        used = total - len(self.extras) - len(self.head)
        groups = _groups(self.extras)
        left = [f"{count} {name if count > 1 else name.replace('tensors', 'tensor')}" for name, count in groups]
        words = f"read as {self.kind}: {used} tensors used"
        if self.head:
            words += f", {len(self.head)} in the head"
        return words + (f", {', '.join(left)} left" if left else "")


def read(tensors: Mapping[str, Tensor], *, plain: bool = False) -> Reading:
    """The `Reading` of a file's tensors; `plain` takes timm's names as they are (`Eva` has q and v biases of its own).

    Raises WeightsError when there is no ViT in it, or two to choose from.
    """
    named = unwrap(tensors)
    hugging_face = hf_names.prefix_of(named)
    ph_reg = hugging_face is not None and ph_reg_names.is_student(named, hugging_face)
    if ph_reg:
        named = ph_reg_names.once(named)
    if hugging_face is not None:
        named = hf_names.to_dinov2(named, hugging_face)
    hi_end = HI_END in named and f"encoder.{ANCHOR}" in named
    if hi_end:  # Hi-End-MAE keeps the encoder's positions beside the encoder
        named["encoder.pos_embed"] = named.pop(HI_END)
    prefix = trunk_prefix(named)
    inner = {name[len(prefix) :]: value for name, value in named.items() if name.startswith(prefix)}
    outer = {name: value for name, value in named.items() if not name.startswith(prefix)}
    plain = plain and not is_dinov3(inner)
    reading = (_plain if plain else next(reader for recognises, reader in READERS if recognises(inner)))(inner)
    if prefix == "base_encoder.":  # MoCo v3: its projector is called head, and its ViT-S has 12 heads instead of 6
        reading.kind, reading.notes, reading.positions = "MoCo v3 encoder", [], "timm"
        reading.hints = {"num_heads": {384: 12, 768: 12}}
        reading.extras.update(reading.head)
        reading.head = {}
    if hi_end:
        reading.kind, reading.positions, reading.notes = "Hi-End-MAE encoder", "trilinear", []
        reading.hints = {"kind": "volume", "no_embed_class": True, "num_heads": {768: 12, 1536: 16}}
        # CT at 1.5 mm, -175 to 250 HU to [0, 1] (the authors' loader).
        reading.hints["pixels"] = {"mean": (0.0,), "std": (1.0,), "window": (-175.0, 250.0), "spacing": (1.5, 1.5, 1.5)}
    reading.extras.update(outer)
    if any(name.startswith("temporal_order_predictor.") for name in outer):  # its ViT is DINO's, resampling included
        reading.kind, reading.positions = "TOV-VICReg", "dinov2"
    if ph_reg:  # its positions follow transformers: bicubic to the new size
        reading.kind, reading.positions = "PH-Reg student", "mae"
    if prefix:
        reading.notes.append(f"the trunk was under the prefix '{prefix}'")
    return reading


def unwrap(tensors: Mapping[str, Tensor]) -> Tensors:
    """Names without what DataParallel, torch.compile, FSDP and checkpointing put in front of modules."""
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {old: name.removeprefix("module.") for old, name in names.items()}
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in set(names.values()) if list(names.values()).count(name) > 1)
        raise WeightsError(
            f"{len(twice)} tensors appear twice once wrappers are removed, e.g. {twice[0]}", fix="keep one copy of each"
        )
    return {names[old]: value for old, value in tensors.items()}


def trunk_prefix(names: Iterable[str]) -> str:
    """What stands in front of the trunk's names. Raises WeightsError when no trunk, or more than one, is found."""
    names = list(names)
    found = _in_front_of(ANCHOR, names)
    if not found:
        found = [
            p for p in _in_front_of(CLIP_ANCHOR, names) if f"{p}conv1.weight" in names and f"{p}ln_pre.weight" in names
        ]
    for preferred, other in _PREFERRED:
        if preferred in found and other in found:
            found.remove(other)
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(
            f"the file holds {len(found)} trunks, under the prefixes {', '.join(repr(p) for p in found)}",
            fix="save the tensors of the one you want to a file of its own",
        )
    raise WeightsError(
        f"no ViT is recognised: there is no '{ANCHOR}' among {len(names)} tensors ({_foreign(names)})",
        fix="convert it to timm's names, or load the same model by its timm name",
    )


def _in_front_of(anchor: str, names: list[str]) -> list[str]:
    return [name[: -len(anchor)] for name in names if name == anchor or name.endswith("." + anchor)]


def _foreign(names: list[str]) -> str:
    """What a file without timm's patch embedding looks like."""
    text = "\n".join(names)
    for mark, words in (
        ("embeddings.patch_embeddings.projection", "the keys are those of Hugging Face transformers"),
        ("transformer.resblocks.", "the keys are those of OpenAI's CLIP"),
        ("to_patch_embedding.", "the keys are those of vit-pytorch"),
        ("vit.patch_embedding.patch_embeddings", "the keys are those of MONAI"),
        ("layer1.0.conv1.weight", "the keys are those of a ResNet"),
        (".adaptmlp.", "these are adapters alone, without their trunk"),
    ):
        if mark in text:
            return words
    return "e.g. " + ", ".join(names[:4]) if names else "the file is empty"


def _plain(tensors: Tensors) -> Reading:
    """timm, DeiT, DINO and fine-tuned MAE; a MAE encoder without its decoder is known by its fixed position table."""
    head = {n: v for n, v in tensors.items() if n.startswith(("head.", "head_dist."))}
    extras = {n: v for n, v in tensors.items() if n.startswith(("pre_logits.", "vpt."))}
    vit = {n: v for n, v in tensors.items() if n not in head and n not in extras}
    reading = Reading(vit, extras, head, "timm-style ViT")
    if "vpt.prompt_embeddings" in extras:
        reading.kind = "Prompt-CAM"
        reading.notes.append("its prompts are kept aside: vitkit.explain.prompt_cam takes them")
    elif extras:  # the 21k representation layer sits between feature and head; timm leaves both out as well
        reading.extras.update(head)
        reading.head = {}
        reading.notes.append("the representation layer of ImageNet-21k weights and the head on it are left out")
    if "dist_token" in vit:
        reading.kind = "distilled DeiT"
    elif "fc_norm.weight" in vit and "norm.weight" not in vit:
        reading.kind, reading.positions = "ViT fine-tuned with average pooling (fc_norm)", "mae"
    elif "cls_token" in vit and "pos_embed" in vit and is_sincos(vit["pos_embed"], prefix=1):
        reading.hints["sincos"] = True  # MAE, or MoCo v3 converted to timm's names
        if not head:
            reading.kind, reading.positions = "MAE encoder", "mae"
            reading.notes.append(
                "the decoder is not in this file, so it cannot reconstruct images (MAE's *_full and *_visualize files can)"
            )
    return reading


def _mae(tensors: Tensors) -> Reading:
    """facebookresearch/mae and its descendants: encoder, `mask_token`, `decoder_*`, G2SD's feature predictors."""
    extras = {n: v for n, v in tensors.items() if n.startswith(("decoder", "mask_token")) or "feature_pred." in n}
    reading = _plain({n: v for n, v in tensors.items() if n not in extras})
    reading.extras.update(extras)
    reading.kind, reading.positions, reading.notes = "MAE encoder", "mae", []
    reading.hints = {"decoder": True}
    return reading


def _dinov2(tensors: Tensors) -> Reading:
    """facebookresearch/dinov2: chunked blocks flattened, registers as timm has them (no positions for class and
    registers: the class token takes its position row), SwiGLU as timm's packed MLP."""
    named = {_DINO_CHUNK.sub(r"blocks.\1.", n): v for n, v in tensors.items()}
    named = {n.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for n, v in named.items()}
    extras = {n: named.pop(n) for n in ("mask_token",) if n in named}
    hints: dict[str, Any] = {}
    registers = named.pop("register_tokens", None)
    if registers is not None:
        table = named["pos_embed"]
        named |= {"reg_token": registers, "cls_token": named["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
        hints["no_embed_class"] = True
    reading = _plain(named)
    reading.extras.update(extras)
    reading.kind = "DINOv2 with registers" if registers is not None else "DINOv2"
    # With registers the authors resample as timm does (offset 0, antialiasing).
    reading.positions, reading.notes = ("timm" if registers is not None else "dinov2"), []
    reading.hints = hints
    return reading


def _dinov3(tensors: Tensors) -> Reading:
    """facebookresearch/dinov3: timm's `Eva`, whose rotary settings the recorded periods prove."""
    vit, extras, hints, notes = to_timm(tensors)
    head = {n: vit.pop(n) for n in list(vit) if n.startswith("head.")}
    return Reading(vit, extras, head, "DINOv3", notes, hints=hints)


def _adaptformer(tensors: Tensors) -> Reading:
    """ShoufaChen/AdaptFormer: q, k, v stacked in that order, `fc1`/`fc2` into the MLP; adapters and prompts put aside."""
    extras = {n: v for n, v in tensors.items() if ".adaptmlp." in n or n.startswith("embeddings.")}
    named: Tensors = {}
    for name, value in tensors.items():
        if name in extras or ".attn.k_proj." in name or ".attn.v_proj." in name:
            continue
        if ".attn.q_proj." in name:
            parts = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            absent = [part for part in parts if part not in tensors]
            if absent:
                raise WeightsError(f"{name} is there but {absent[0]} is not", fix="use the complete checkpoint")
            named[name.replace("q_proj", "qkv")] = torch.cat([tensors[part] for part in parts])
        else:
            named[re.sub(r"^(blocks\.\d+)\.(fc[12])\.", r"\1.mlp.\2.", name)] = value
    reading = _plain(named)
    reading.extras.update(extras)
    reading.kind, reading.positions, reading.notes = "AdaptFormer", "mae", []
    if any(".adaptmlp." in name for name in extras):
        reading.notes.append("its adapters are kept aside: vitkit.adapt.adaptformer takes them")
    if any(name.startswith("embeddings.") for name in extras):
        reading.notes.append("its prompts are kept aside: vitkit.adapt.vpt takes them")
    return reading


def _biases_apart(tensors: Tensors) -> Reading:
    """VideoMAE and BEiT: `qkv` has no bias layer but q and v biases of their own; the key bias is zero."""
    reading = _plain(video_names.to_timm(tensors))
    if reading.vit[ANCHOR].ndim == 5:
        return _video(reading)
    reading.kind, reading.notes = "BEiT-style ViT (q and v biases apart)", []
    reading.hints = {"biases_apart": True}
    return reading


def _video(reading: Reading) -> Reading:
    """OpenGVLab/VideoMAEv2, whose published models all see 16 frames of 224 pixels."""
    reading.kind, reading.positions = "VideoMAE encoder", "video"
    reading.notes = [
        "positions are fixed sinusoids over the flat token index and not in the file",
        "input 16 x 224 x 224, as the authors published it, unless img_size says otherwise",
    ]
    scale = reading.vit.get("blocks.0.attn.q_norm.scale")  # cosine attention has one a head
    heads = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
    if scale is not None:
        heads[reading.vit[ANCHOR].shape[0]] = len(scale)
    reading.hints = {"kind": "video", "img_size": [16, 224, 224], "num_heads": heads}
    return reading


def _clip(tensors: Tensors) -> Reading:
    """OpenAI's CLIP, visual tower: a pre-norm ViT with a quick GELU whose head is the projection into the shared space.
    In a DVPT checkpoint (prompts beside it) the projection is part of the classifier and is put aside with the rest."""
    named: Tensors = {}
    extras = {n: v for n, v in tensors.items() if "prompt" in n}
    for name, value in tensors.items():
        if name in extras or name == "proj":
            continue
        block = _CLIP_BLOCK.fullmatch(name)
        new = f"blocks.{block[1]}.{_CLIP_NAMES.get(block[2], block[2])}" if block else _CLIP_NAMES.get(name, name)
        named[new] = value
    width = named["cls_token"].shape[0]
    named["cls_token"], named["pos_embed"] = named["cls_token"].view(1, 1, -1), named["pos_embed"].unsqueeze(0)
    hints = {"num_heads": {width: width // 64} if width % 64 == 0 else {}, "norm_eps": 1e-5, "act_layer": "quick_gelu"}
    head: Tensors = {}
    notes = []
    if extras:
        extras |= {n: v for n, v in tensors.items() if n == "proj"}
        notes = ["its prompts are kept aside: vitkit.adapt.dvpt takes them"]
    elif "proj" in tensors:
        head = {"head.weight": tensors["proj"].T}
    return Reading(named, extras, head, "CLIP's visual ViT", notes, positions="mae", hints=hints)


_CLIP_TEXT = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_CLIP_NAMES = {
    "conv1.weight": ANCHOR,
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    **{f"ln_{old}.{kind}": f"{new}.{kind}" for old, new in (("pre", "norm_pre"), ("post", "norm")) for kind in _KINDS},
    **{f"ln_{i}.{kind}": f"norm{i}.{kind}" for i in (1, 2) for kind in _KINDS},
    **{f"attn.in_proj_{kind}": f"attn.qkv.{kind}" for kind in _KINDS},
    **{f"attn.out_proj.{kind}": f"attn.proj.{kind}" for kind in _KINDS},
    **{f"mlp.c_{old}.{kind}": f"mlp.{new}.{kind}" for old, new in (("fc", "fc1"), ("proj", "fc2")) for kind in _KINDS},
    "ls_1.gamma": "ls1.gamma",
    "ls_2.gamma": "ls2.gamma",
}
_SPLIT = re.compile(r"\.attn\.[qkv]_proj\.")
_DINO_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
READERS: tuple[tuple[Callable[[Tensors], bool], Callable[[Tensors], Reading]], ...] = (
    (lambda names: CLIP_ANCHOR in names and ANCHOR not in names, _clip),
    (is_dinov3, _dinov3),
    (lambda names: any(_SPLIT.search(n) for n in names) and "blocks.0.fc1.weight" in names, _adaptformer),
    (lambda names: "blocks.0.attn.q_bias" in names or _without_biases(names), _biases_apart),
    (lambda names: any(n.startswith("decoder") or "feature_pred." in n for n in names), _mae),
    (lambda names: "register_tokens" in names or "mask_token" in names, _dinov2),
    (lambda names: any(_DINO_CHUNK.match(n) for n in names), _dinov2),
    (lambda names: True, _plain),
)


def _without_biases(names: Tensors) -> bool:
    """Whether these are VideoMAE's blocks built without biases of queries and values."""
    return names[ANCHOR].ndim == 5 and ("blocks.0.attn.scale" in names or "blocks.0.gamma_1" in names)


def to_adaptformer(vit: Mapping[str, Tensor]) -> Tensors:
    """timm's names to AdaptFormer's: `attn.qkv` split into q, k and v rows, `mlp.fc1/fc2` moved into the block."""
    named: Tensors = {}
    for name, value in vit.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                named[name.replace("qkv", f"{letter}_proj")] = part.clone()
        else:
            named[re.sub(r"^(blocks\.\d+)\.mlp\.(fc[12])\.", r"\1.\2.", name)] = value
    return named


def _groups(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that were left, grouped in words, with their counts."""
    left = list(names)
    decoder = any(name.startswith("decoder") for name in left)  # DINOv2 has a mask token without one
    words = (
        ("adapter tensors", lambda n: ".adaptmlp." in n),
        ("prompt tensors", lambda n: n.startswith("embeddings.") or "prompt" in n),
        ("decoder tensors", lambda n: decoder and n.startswith(("decoder", "mask_token", "encoder_to_decoder"))),
        ("tensors of the momentum encoder", lambda n: n.startswith("momentum_encoder.")),
        ("text tower tensors", lambda n: n.startswith(_CLIP_TEXT)),
        (
            "projection head tensors",
            lambda n: n.startswith(
                ("head.", "dino_head.", "ibot_head.", "predictor.", "projector.", "temporal_order_predictor.")
            ),
        ),
    )
    found: list[tuple[str, int]] = []
    for word, belongs in words:
        mine = [name for name in left if belongs(name)]
        left = [name for name in left if name not in mine]
        if mine:
            found.append((word, len(mine)))
    if left:
        found.append((f"other tensors ({', '.join(sorted(left)[:3])}{', ...' if len(left) > 3 else ''})", len(left)))
    return found
