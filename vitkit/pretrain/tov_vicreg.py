"""TOV-VICReg: pre-train a ViT on ordered frames of a game, a camera or a process, without labels.

Paper: Goulao & Oliveira, "Pretraining the Vision Transformer using self-supervised methods for vision based Deep
Reinforcement Learning", 2022 (arXiv 2209.10901). Official code: mgoulao/TOV-VICReg.

What happens, and where: an observation is `frames` consecutive grey frames stacked as channels. Two augmented views x, y of
o_t, and lightly augmented z = o_{t-1} and w = o_{t+1} (`vitkit.data.frame_views`) pass the ViT as one batch; r is its pooled
feature, e = projector(r). Loss = sim mean (e_x - e_y)^2 + std (V(e_x) + V(e_y)) / 2 + cov (C(e_x) + C(e_y)) + temporal BCE,
with V the mean over dimensions of relu(1 - deviation) and C the sum of squared off-diagonal covariances over the number of
dimensions (`parts.vicreg`). Temporal order verification: (r_x, r_z, r_w) in one of six orders drawn per sample, a linear layer
on the three says whether the order was changed (`TOVVICReg.temporal`). Five of six are, so a constant reaches 0.4506.

Differs from the paper: z and w skip the projector, where the authors only let them move the running statistics of its
batch norms (`project_neighbours` restores that). The ViT's position table is its own grid's (authors: 28 x 28, resampled in
every forward; a checkpoint with that table is treated so) and pixels are normalised as its passport says (authors: [0, 1]).
Statistics are of the real batch, in float32. `photometric=frame` changes brightness and contrast of every frame alike instead
of treating three points in time as red, green and blue. Almost black frames are skipped, as the authors meant to do. Several
processes compute the loss of the whole batch: representations are gathered before the projector.

Cost: the ViT on four images a sample, forward and backward; the projector on two. The covariance term takes n^2 E
multiplications instead of n E^2 for n embeddings of E dimensions.

    vitkit pretrain tov_vicreg --model M --data streams/ --image_size 80 --patch_size 8 --out runs/tov
    vitkit.pretrain("tov_vicreg", model=M, data="streams/", image_size=80, patch_size=8, out="runs/tov")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts import vicreg
from vitkit.settings import check_choices

RECIPE = {
    "epochs": 10,  # scripts/run: 10 games x 300k observations a pass
    "warmup_epochs": 2.0,
    "batch_size": 512,
    "optimizer": "lars",  # momentum 0.9, trust 1e-3
    "blr": 0.6,  # x batch / 256: 1.2
    "weight_decay": 1e-6,
    "momentum": 0.9,
    "crop_scale": (0.08, 1.0),
    "hflip": True,
}
ORDERS = (
    (0, 1, 2),
    (0, 2, 1),
    (1, 0, 2),
    (1, 2, 0),
    (2, 0, 1),
    (2, 1, 0),
)  # of (x, z, w); the first counts as unchanged
KEYS = ("image", "image_y", "image_z", "image_w")
HEADS = ("projector.", "temporal_order_predictor.")


@dataclass(frozen=True)
class Settings:
    """VICReg with temporal order verification."""

    sim_coeff: float = 10.0
    """weight of the invariance term (run script; 25 is the command line's default and VICReg's)"""
    std_coeff: float = 10.0
    """weight of the variance term (run script; default 25)"""
    cov_coeff: float = 10.0
    """weight of the covariance term (run script; default 1)"""
    temporal_coeff: float = 0.1
    """weight of temporal order verification (run script; default 1); 0 is plain VICReg"""
    mlp: str = "1024-1024-1024"
    """widths of the projector's layers (main.py --mlp)"""
    frames: int = 3
    """consecutive frames of an observation, stacked as channels (paper: 3)"""
    colour: bool = False
    """keep the colours of frames: the model then takes 3 channels a frame"""
    photometric: Literal["stacked", "frame"] = "stacked"
    """colour jitter on the stack as if it were RGB (official), or brightness and contrast alike on every frame"""
    flicker: float = 2.0
    """frames whose mean pixel (0..255) is below this are almost black and replaced by the nearest that is not; 0 keeps all"""
    project_neighbours: bool = False
    """pass z and w through the projector, too, for its batch norms' running statistics only (official)"""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("sim_coeff", "std_coeff", "cov_coeff", "temporal_coeff", "flicker"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}", fix="0 or more")
        if self.frames < 1:
            raise ConfigError(f"frames is {self.frames}", fix="1 or more consecutive frames an observation")
        if self.colour and self.photometric == "stacked" and self.frames > 1:
            raise ConfigError(
                "photometric=stacked takes the frames of an observation for colours, and these have colours",
                fix="photometric=frame, or colour=false",
            )
        if not self.colour and self.photometric == "stacked" and self.frames != 3:
            raise ConfigError(
                f"photometric=stacked needs 3 channels, observations of {self.frames} grey frames have {self.frames}",
                fix="photometric=frame",
            )
        assert self.widths

    @property
    def widths(self) -> list[int]:
        """The projector's layer widths."""
        words = self.mlp.split("-")
        if not all(word.isdecimal() and int(word) for word in words):
            raise ConfigError(f"mlp is {self.mlp!r}", fix='widths joined by "-", e.g. 1024-1024-1024')
        return [int(word) for word in words]


class TOVVICReg(nn.Module):
    """`forward({"image": x, "image_y", "image_z", "image_w": (B, C, H, W) normalised})` -> losses. Needs no labels."""

    needs_labels = False
    shards = True
    kinds = ("image",)
    reads = "frames"
    adopts = "temporal_order_predictor.0.weight"  # a checkpoint with this has heads to go on with

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit, self.settings = tokens.require_vit(vit), settings
        self.projector = projector(vit.num_features, settings.widths)
        self.temporal_order_predictor = nn.Sequential(nn.Linear(3 * vit.num_features, 1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch["order"]` (B,) fixes the order of each sample, `batch["seed"]` (B,) makes it a function of the sample.

        Unweighted terms, the mean deviation of embeddings and the dimensions in use come beside "loss".
        """
        views = [batch[key] for key in KEYS if key in batch]
        if len(views) < len(KEYS):
            raise ConfigError(
                f"a batch without {KEYS[len(views)]}", fix="views of vitkit.data.frame_views make all four"
            )
        s, gather = self.settings, vicreg.gather if self.training else torch.nn.Identity()
        r = [gather(part) for part in self.represent_all(views)]
        if self.training:
            vicreg.require_many(len(r[0]))
        x, y = self.projector(r[0]), self.projector(r[1])
        if s.project_neighbours and self.training:
            with torch.no_grad():
                for neighbour in r[2:]:
                    self.projector(neighbour)
        terms = {"invariance": vicreg.invariance(x, y), "variance": x.new_zeros(()), "covariance": x.new_zeros(())}
        if len(x) > 1:  # one left over in an evaluation has no statistics
            a, b = vicreg.centred(x), vicreg.centred(y)
            terms["variance"] = 0.5 * (vicreg.variance(a) + vicreg.variance(b))
            terms["covariance"] = vicreg.covariance(a) + vicreg.covariance(b)
        logits, changed = self.temporal(r[0], r[2], r[3], gather(self.orders(batch)))
        terms["temporal"] = F.binary_cross_entropy_with_logits(logits.float(), changed)
        weights = (s.sim_coeff, s.std_coeff, s.cov_coeff, s.temporal_coeff)
        loss = torch.stack([weight * term for weight, term in zip(weights, terms.values(), strict=True)]).sum()
        deviation, in_use = vicreg.spread(x) if len(x) > 1 else (terms["variance"], terms["variance"])
        right = ((logits > 0) == (changed > 0)).float().mean()
        logged = {"temporal_accuracy": right, "embedding_std": deviation, "dimensions_in_use": in_use}
        return {"loss": loss, **{name: value.detach() for name, value in {**terms, **logged}.items()}}

    def represent(self, images: Tensor) -> Tensor:
        """Pooled features (B, D): the normalised class token where the model has one."""
        return tokens.feature(self.vit, images)

    def represent_all(self, views: list[Tensor]) -> list[Tensor]:
        """Pooled features of every view: one batch on an accelerator, view by view on a CPU, whose caches hold one better."""
        if views[0].device.type == "cpu":
            return [self.represent(view) for view in views]
        return list(self.represent(torch.cat(views)).chunk(len(views)))

    def temporal(self, x: Tensor, z: Tensor, w: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """(logit (B,) that the order was changed, whether it was (B,) 0 or 1) for representations (B, D) of o_t, o_{t-1},
        o_{t+1} put in the `order` (B,) of each sample."""
        table = torch.tensor(ORDERS, device=x.device)[order]  # (B, 3)
        three = torch.stack([x, z, w], dim=1).gather(1, table.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self.temporal_order_predictor(three.flatten(1)).squeeze(1), (order > 0).float()

    def orders(self, batch: dict[str, Tensor]) -> Tensor:
        """Index (B,) into ORDERS, uniform."""
        if "order" in batch:
            return batch["order"]
        seed, images = batch.get("seed"), batch["image"]
        if seed is None:
            return torch.randint(len(ORDERS), (len(images),), device=images.device)
        return (seed >> 20) % len(ORDERS)  # seeds are well-mixed 63-bit numbers

    def views(self, preprocess: Any, train: Any) -> tuple[Any, Any]:
        """(training, held-out) views of a moment of a stream, for the loader."""
        from vitkit.data.frame_views import Augment, FourViews

        s = self.settings
        channels = s.frames * (3 if s.colour else 1)
        if preprocess.in_chans != channels:
            raise ConfigError(
                f"the model takes {preprocess.in_chans} channels, observations have {channels} ({s.frames} frames"
                f"{' of 3 colours' if s.colour else ''})",
                fix=f"arch_kwargs={{in_chans: {channels}}} for a model without weights, or frames={preprocess.in_chans}",
            )
        size, patch = tuple(preprocess.image_size), tuple(self.vit.patch_embed.patch_size)
        if not train.augment:
            plain = FourViews(size, patch, s.frames, s.colour, s.flicker)
            return plain, plain
        # Held-out moments are changed at random, too (each always alike): otherwise x and y would be one picture.
        augment = Augment(train.crop_scale, train.hflip, s.photometric)
        view = FourViews(size, patch, s.frames, s.colour, s.flicker, augment)
        return view, view

    def param_groups(self, weight_decay: float) -> list[dict]:
        from vitkit.parts.optim import weight_decay_groups

        return weight_decay_groups(self.named_parameters(), weight_decay)

    def finish(self) -> nn.Module:
        """The pre-trained encoder, a timm ViT."""
        return self.vit

    def extras(self) -> dict[str, Tensor]:
        """Projector and temporal head under their official names, saved beside the encoder."""
        return {name: value for name, value in self.state_dict().items() if name.startswith(HEADS)}

    def adopt(self, extras: Mapping[str, Tensor]) -> str:
        """Go on with the heads of a loaded checkpoint where they have these settings' shape; says in words what was done."""
        own = self.extras()
        if all(name in extras and extras[name].shape == value.shape for name, value in own.items()):
            self.load_official(extras)
            return f"projector and temporal head go on from the checkpoint ({len(own)} tensors)"
        linear = sorted((name, v.shape[0]) for name, v in extras.items() if name.startswith(HEADS[0]) and v.ndim == 2)
        found = "-".join(str(width) for _, width in linear) or "none"
        return (
            f"the checkpoint's projector ({found}) is not {self.settings.mlp}: projector and temporal head start anew"
        )

    def load_official(self, extras: Mapping[str, Tensor]) -> None:
        """Take heads in the official layout (`projector.*`, `temporal_order_predictor.*`), e.g. `vit.extras`."""
        missing = [name for name in self.extras() if name not in extras]
        if missing:
            raise WeightsError(
                f"the checkpoint has no heads of TOV-VICReg: {len(missing)} tensors missing, e.g. {missing[0]}",
                fix="a whole training checkpoint (final_encoder.pth holds the ViT alone) and its mlp",
            )
        self.load_state_dict({name: extras[name] for name in self.extras()}, strict=False)


def projector(dim: int, layers: list[int]) -> nn.Sequential:
    """Linear - BN - ReLU for every width but the last, which is linear without bias."""
    parts: list[nn.Module] = []
    for width in layers[:-1]:
        parts += [nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        dim = width
    return nn.Sequential(*parts, nn.Linear(dim, layers[-1], bias=False))
