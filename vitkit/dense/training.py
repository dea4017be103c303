"""Training a method on images with masks, through the same loop as every other method.

images = vitkit.data.read("scans/")                # images/ and masks/, or a table with a mask column
found = fit_masks(method, images, image_size=512, epochs=80)
found["test_dice"], found["test_iou"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitkit.data.images import Images
from vitkit.data.loader import Order, kept_generators, sample_seed, seed_generators
from vitkit.data.transforms import to_channels
from vitkit.errors import DataError
from vitkit.evaluate import metrics
from vitkit.run.fabric import make_fabric
from vitkit.run.loop import fit
from vitkit.settings import Machine, Train

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on which SegFormer's trunk was trained


def fit_masks(
    method: nn.Module,
    images: Images,
    *,
    image_size: int | tuple[int, int] = 512,
    epochs: int = 80,
    warmup_epochs: float = 5.0,
    lr: float = 5e-4,
    weight_decay: float = 1e-4,
    batch_size: int = 10,
    augment: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Train `method` in place on the images of split "train", keep the weights of the best validation Dice, and read the
    test split once: {"val_dice", "val_iou", "test_dice", "test_iou", ...}, Dice and IoU of everything that is not
    background, per image, then their mean.

    Images and masks are resized to `image_size` (masks by nearest). Defaults are those of DVPT_seg_train.py.
    Raises DataError when there are no masks, or none to train on.
    """
    if images.masks is None:
        raise DataError(f"{images.name}: there are no masks", fix="images/ and masks/, or a table with a mask column")
    train = images.part("train")
    if not len(train):
        raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    machine = Machine(batch_size=min(batch_size, len(train)), seed=seed, quiet=True)
    schedule = Train(
        epochs=epochs, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, optimizer="adamw", out=""
    )
    fabric = make_fabric(machine)
    order = Order(len(train), machine.batch_size, seed, 0, True, True)

    def batches(epoch: int, start: int) -> Iterator[dict[str, Any]]:
        for index, rows in enumerate(Order(len(train), machine.batch_size, seed, epoch, True, True)):
            if index >= start:
                yield collate(train, rows, size, seed=seed if augment else None, epoch=epoch)

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        found = score(model, images.part("val"), size, machine.batch_size)
        return found["dice"], {f"val_{key}": value for key, value in found.items()}

    with torch.random.fork_rng():  # a caller's own random numbers stay as they were
        fit(
            method,
            batches,
            train=schedule,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=order.batches,
            prepare=lambda pixels: normalise(pixels.to(fabric.device)),
            validate=validate if len(images.part("val")) else None,
        )
    method.eval()
    found: dict[str, float] = {}
    for split in ("val", "test"):
        if len(images.part(split)):
            scores = score(method, images.part(split), size, machine.batch_size)
            found |= {f"{split}_{key}": value for key, value in scores.items()}
    return found


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to floats as SegFormer expects them."""
    mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def collate(images: Images, rows: np.ndarray, size: tuple[int, int], *, seed: int | None, epoch: int) -> dict[str, Any]:
    """A batch {"image": uint8 (B, 3, H, W), "mask": int64 (B, H, W)}; `seed` None = no augmentation."""
    pairs = []
    for row in rows.tolist():
        image, mask = picture(images, row, size)
        if seed is not None:
            with kept_generators():
                seed_generators(sample_seed(seed, epoch, row))
                image, mask = shake(image, mask)
        pairs.append((image, mask))
    return {"image": torch.stack([a for a, _ in pairs]), "mask": torch.stack([b for _, b in pairs]).long()}


def picture(images: Images, row: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Picture (3, H, W) and mask (H, W) of one row, both resized to `size`."""
    image, mask = to_channels(images.decode(row), 3), images.mask(row)
    if image.shape[1:] != mask.shape:
        raise DataError(
            f"{images.path(row)} is {tuple(image.shape[1:])}, its mask {tuple(mask.shape)}",
            fix="a mask has the size of its image",
        )
    image = F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return image, F.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]


def shake(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """With probability 1/2: flips, rotation by up to 45 degrees and a crop of up to 10 % of each side, alike for both.
    Pixels that a rotation uncovers are black and unknown (255)."""
    if torch.rand(()) < 0.5:
        return image, mask
    for axis in (-1, -2):
        if torch.rand(()) < 0.5:
            image, mask = image.flip(axis), mask.flip(axis)
    angle = float(torch.empty(()).uniform_(-45, 45))
    image = F.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
    mask = F.rotate(mask[None], angle, interpolation=InterpolationMode.NEAREST, fill=[255])[0]
    height, width = mask.shape
    top, left, bottom, right = (torch.rand(4) * 0.1 * torch.tensor([height, width, height, width])).int().tolist()
    box = top, left, max(1, height - top - bottom), max(1, width - left - right)
    image = F.resized_crop(image, *box, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
    mask = F.resized_crop(mask[None], *box, [height, width], interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return image, mask


@torch.inference_mode()
def score(method: nn.Module, images: Images, size: tuple[int, int], batch_size: int) -> dict[str, float]:
    """{"dice", "iou"} of the foreground (every class but 0), per image at `size`, then the mean."""
    truth, found = [], []
    device = next(method.parameters()).device
    predict: Callable[[Tensor], Tensor] = method.predict
    for start in range(0, len(images), batch_size):
        rows = np.arange(start, min(start + batch_size, len(images)))
        batch = collate(images, rows, size, seed=None, epoch=0)
        found.append(predict(normalise(batch["image"].to(device))).argmax(1).cpu().numpy())
        truth.append(batch["mask"].numpy())
    y, said = np.concatenate(truth), np.concatenate(found)
    return {"dice": metrics.dice(y, said), "iou": metrics.iou(y, said)}
