"""A trained UNETR at work: masks of new volumes on their own grid, written as NIfTI."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vitkit.errors import ConfigError, DataError

MARK = "unetr.out.conv.conv.weight"  # in the extras of a run that segments volumes


@dataclass(frozen=True)
class VolumePredictions:
    """Masks of volumes. `voxels` (N, C): voxels of each class, `ml` (N, C): their volume; `files`: what was written, or
    `masks` (a, b, c) uint8 on each file's own axes where nothing was."""

    names: list[str]
    classes: list[str]
    voxels: np.ndarray
    ml: np.ndarray
    files: list[str] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)

    def table(self) -> Any:
        """A pandas frame: volume, mask file, millilitres of each class but background."""
        import pandas as pd

        columns: dict[str, Any] = {"volume": self.names}
        if self.files:
            columns["mask"] = self.files
        for k, name in enumerate(self.classes[1:], 1):
            columns[f"ml({name})"] = self.ml[:, k].round(3)
        return pd.DataFrame(columns)


def segments_volumes(run: str | Path) -> bool:
    """Whether a path is a run folder of `vitkit adapt unetr`; only names are read."""
    from vitkit.weights import EXTRAS

    path = Path(run) / EXTRAS
    if not path.is_file():
        return False
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return MARK in file.keys()  # noqa: SIM118  # a safetensors handle is no mapping


def load_segmentation(run: str | Path) -> Any:
    """The network of a run, in eval mode: a `vitkit.adapt.unetr.Segmentation`."""
    from vitkit import weights
    from vitkit.adapt.unetr import Segmentation, Settings

    vit = weights.load(run, say=None)
    if MARK not in vit.extras:
        raise ConfigError(f"{run} does not segment volumes", fix="train it: vitkit adapt unetr --model ... --data ...")
    made = vit.passport.lineage[-1]["settings"]
    names = Settings.__dataclass_fields__
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in made.items() if key in names}
    passport = weights.Passport.read(run)
    method = Segmentation(vit, Settings(**own), classes=passport.classes or ())
    method.net.load_head(vit.extras)
    return method.eval()


def predict_volumes(run: str | Path, data: Any, *, out: str | Path | None = None) -> VolumePredictions:
    """Masks of a NIfTI file, a DICOM series or a folder of them, by a run of `vitkit adapt unetr`.

    Each lies voxel on voxel over its file, with its affine; with `out` they are written there as NAME.nii.gz. Raises DataError
    naming the file that cannot be read or has other channels.
    """
    from vitkit.data import read
    from vitkit.data.images import Images
    from vitkit.run.files import atomic_write

    method = load_segmentation(run)
    preprocess, device = method.vit.passport.preprocess, next(method.parameters()).device
    images = data if isinstance(data, Images) else read(data, kind="volume", say=None)
    voxels, ml, files, masks = [], [], [], []
    targets = _targets(images.names, Path(out)) if out else []
    for i in range(len(images)):
        case = images.decode(i)
        found = segment_case(method, case, preprocess, device)
        voxels.append(np.bincount(found.reshape(-1), minlength=len(method.classes)))
        ml.append(voxels[-1] * float(np.prod(case.spacing)) / 1000)
        image = on_own_grid(found, case.affine, case.name)
        if out:
            targets[i].parent.mkdir(parents=True, exist_ok=True)
            atomic_write(targets[i], _packed(image))
            files.append(str(targets[i]))
        else:
            masks.append(np.asarray(image.dataobj))
    return VolumePredictions(list(images.names), list(method.classes), np.stack(voxels), np.stack(ml), files, masks)


@torch.inference_mode()
def segment_case(method: nn.Module, case: Any, preprocess: Any, device: Any) -> np.ndarray:
    """Class numbers uint8 (a, b, c) of a `cases.Case`, at its own spacing."""
    from vitkit.data.volume_views import whole

    volume = whole(case, preprocess).unsqueeze(0).to(device)
    logits = method.segment(preprocess.normalise(volume)).float()
    if tuple(logits.shape[2:]) != tuple(case.size):  # it was resampled for the model
        logits = F.interpolate(logits, size=tuple(case.size), mode="trilinear", align_corners=False)
    return logits[0].argmax(0).to(torch.uint8).cpu().numpy()


def on_own_grid(mask: np.ndarray, affine: np.ndarray, source: str) -> Any:
    """A nibabel image of a mask (RAS axes), turned to the axes of the NIfTI file `source` and with its affine; masks of DICOM
    series keep their axes."""
    import nibabel

    from vitkit.data import volume

    if not volume.is_nifti(source):
        return nibabel.Nifti1Image(mask, affine)
    header = nibabel.load(source)
    shape = tuple(int(n) for n in [*header.shape[:3], 1, 1][:3])
    made = volume.Volume(mask.astype(np.float32), (1.0, 1.0, 1.0), "RAS", source, affine)
    turned = volume.reorient(made, volume.axis_letters(np.asarray(header.affine, float)))
    if turned.data.shape != shape:
        raise DataError(f"{source}: changed while it was segmented", fix="run it again")
    image = nibabel.Nifti1Image(turned.data.astype(np.uint8), header.affine)
    image.header.set_xyzt_units(*header.header.get_xyzt_units())
    return image


def _targets(names: list[str], out: Path) -> list[Path]:
    """Where each mask goes: its volume's name below `out`, whatever folder that came from."""
    if out.is_file():
        raise ConfigError(f"{out} is a file; masks go into a folder", fix="--out FOLDER")
    stems = [Path(name.replace("..", "_")) for name in names]
    short = [one.name for one in stems]
    chosen = short if len(set(short)) == len(short) else [str(one).replace("/", "_") for one in stems]
    return [out / f"{one.removesuffix('.gz').removesuffix('.nii')}.nii.gz" for one in chosen]


def _packed(image: Any) -> bytes:
    import gzip

    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
