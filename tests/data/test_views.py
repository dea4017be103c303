"""Views: sizes, channels, determinism, and the same numbers as timm's transforms."""

import math
import pickle
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.makers import texture
from vitkit.data.loader import seed_generators
from vitkit.data.transforms import crop_box, eval_view, finetune_view, pretrain_view, to_channels
from vitkit.errors import ConfigError


@dataclass(frozen=True)
class Preprocess:
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)
    image_size: tuple = (32, 32)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    channels: str = "rgb"
    crop_mode: str = "center"


RGB = Preprocess()
GREY = Preprocess(mean=(0.5,), std=(0.25,), channels="grey")


def tensor(height, width, channels=3, seed=0):
    array = texture(seed, height, width, channels)
    return torch.from_numpy(array.copy())[None] if channels == 1 else torch.from_numpy(array.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("make", [pretrain_view, finetune_view, eval_view])
@pytest.mark.parametrize(
    "preprocess", [RGB, GREY, replace(RGB, image_size=(24, 40)), replace(RGB, interpolation="bilinear")]
)
@pytest.mark.parametrize(("height", "width", "channels"), [(50, 70, 3), (20, 20, 1), (1, 1, 3), (90, 11, 1)])
def test_any_picture_gets_the_models_shape(make, preprocess, height, width, channels):
    image = tensor(height, width, channels)
    before = image.clone()
    found = make(preprocess)(image)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert found.shape == (len(preprocess.mean), *preprocess.image_size)
    assert torch.equal(image, before)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
@pytest.mark.parametrize("shape", [(50, 70), (91, 64), (20, 20), (33, 128)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_eval_view_equals_timm(crop_mode, size, shape, crop_pct):
    from timm.data.transforms_factory import transforms_imagenet_eval

    p = replace(RGB, image_size=size, crop_pct=crop_pct, crop_mode=crop_mode)
    # timm: non-square targets in "center" mode go through ResizeKeepRatio, square ones through torchvision's Resize.
    theirs = transforms_imagenet_eval(
        size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic", mean=p.mean, std=p.std, normalize=False
    )
    expected = theirs(Image.fromarray(texture(5, *shape)))
    found = eval_view(p)(tensor(*shape, seed=5))
    # PIL and torch round the two passes of a uint8 resize differently, by one level at most.
    assert (found.int() - expected.int()).abs().max() <= 1


def test_eval_view_without_resizing_is_the_exact_centre():
    image = tensor(40, 36)
    assert torch.equal(eval_view(replace(RGB, image_size=(36, 36), crop_pct=1.0))(image), image[:, 2:38])


def test_grey_from_rgb_is_pils():
    image = tensor(40, 40)
    expected = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
    assert np.array_equal(to_channels(image, 1)[0], expected)
    white = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert (to_channels(white, 1) == 255).all()
    grey = tensor(5, 5, 1)
    assert torch.equal(to_channels(grey, 3), grey.repeat(3, 1, 1)) and to_channels(grey, 1) is grey


@pytest.mark.parametrize("make", [pretrain_view, finetune_view])
def test_seeds_decide_everything(make):
    view, image = make(RGB), tensor(60, 60)
    results = []
    for seed in (1, 1, 2):
        seed_generators(seed)
        results.append(view(image))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_crop_is_drawn_once_and_clamped():
    """MAE's crop: no second draw when a side does not fit; a wide picture gives crops of the full height."""
    torch.manual_seed(0)
    boxes = np.array([crop_box(40, 400, (0.8, 1.0)) for _ in range(200)])
    assert (boxes[:, 2] == 40).all() and (boxes[:, 3] < 200).all()
    torch.manual_seed(0)
    boxes = np.array([crop_box(100, 100, (0.2, 1.0)) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (top + height <= 100).all() and (left >= 0).all() and (left + width <= 100).all()
    area = height * width / 10_000
    assert area.min() > 0.19 and abs(area.mean() - 0.58) < 0.02  # 0.6 less what clamping takes
    free = (height < 100) & (width < 100)
    ratio = np.log(width / height)[free]
    assert abs(ratio.mean()) < 0.02 and abs(ratio).max() < math.log(4 / 3) + 0.03


def test_crop_follows_maes_sequence_of_draws():
    torch.manual_seed(7)
    area = 90 * 120 * torch.empty(1).uniform_(0.2, 1.0).item()
    ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
    w, h = min(round(math.sqrt(area * ratio)), 120), min(round(math.sqrt(area / ratio)), 90)
    top, left = torch.randint(0, 90 - h + 1, (1,)).item(), torch.randint(0, 120 - w + 1, (1,)).item()
    torch.manual_seed(7)
    assert crop_box(90, 120, (0.2, 1.0)) == (top, left, h, w)


def test_flip_happens_half_of_the_time_or_never():
    gradient = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1)
    flipped = 0
    for seed in range(100):
        torch.manual_seed(seed)
        found = pretrain_view(RGB)(gradient)
        flipped += int(found[0, 0, 0] > found[0, 0, -1])
        torch.manual_seed(seed)
        found = pretrain_view(RGB, hflip=False)(gradient)
        assert found[0, 0, 0] <= found[0, 0, -1]
    assert 30 < flipped < 70


def test_randaugment_is_timms():
    from timm.data.auto_augment import rand_augment_transform

    p = replace(RGB, image_size=(48, 48))
    options = {
        "translate_const": int(48 * 0.45),
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
    }
    theirs = rand_augment_transform("rand-m6-mstd0.5-inc1", options)
    view, plain = finetune_view(p, hflip=False), finetune_view(p, hflip=False, randaug=None)
    changed = 0
    for seed in range(20):
        image = tensor(70, 70, seed=seed)
        seed_generators(seed)
        found = view(image)
        seed_generators(seed)
        cropped = plain(image)
        expected = np.asarray(theirs(Image.fromarray(cropped.permute(1, 2, 0).numpy())))
        assert np.array_equal(found.permute(1, 2, 0), expected)
        changed += not torch.equal(found, cropped)
    assert changed > 10


def test_every_randaugment_operation_takes_grey():
    image, view = tensor(40, 40, 1), finetune_view(GREY, randaug="rand-m9-n6-p1.0-inc1")
    for seed in range(30):
        seed_generators(seed)
        assert view(image).shape == (1, 32, 32)


def test_rotation_stays_within_its_angle_and_fills_with_the_mean():
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    seed_generators(1)
    found = finetune_view(RGB, randaug=None, rotate=30)(white)
    corner = found[:, 0, 0].tolist()
    assert np.abs(np.array(corner) - [124, 116, 104]).max() <= 1 and (found[:, 16, 16] == 255).all()
    seed_generators(1)
    assert (finetune_view(RGB, randaug=None)(white) == 255).all()


def test_views_survive_pickling():
    view = finetune_view(RGB)
    image = tensor(50, 50)
    seed_generators(3)
    first = view(image)
    seed_generators(3)
    assert torch.equal(pickle.loads(pickle.dumps(view))(image), first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pretrain_view(RGB, scale=(0.0, 1.0)), r"scale=\(0\.0, 1\.0\)"),
        (lambda: pretrain_view(RGB, scale=(0.9, 0.2)), "scale="),
        (lambda: finetune_view(RGB, rotate=400), "rotate=400"),
        (lambda: finetune_view(RGB, randaug="rand-x9"), "randaug='rand-x9' is no RandAugment policy"),
        (lambda: finetune_view(RGB, randaug="v0"), "randaug='v0'"),
        (lambda: eval_view(replace(RGB, interpolation="lanczos")), "interpolation 'lanczos' is not known"),
        (lambda: eval_view(replace(RGB, channels="bgr")), "channels 'bgr' with 3 means"),
        (lambda: eval_view(replace(RGB, mean=(0.5,))), "channels 'rgb' with 1 means"),
        (lambda: eval_view(replace(RGB, crop_mode="fit")), "crop_mode='fit'"),
    ],
)
def test_senseless_settings_are_refused_when_the_view_is_made(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert caught.value.fix


def test_the_models_own_generators_are_only_read():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    eval_view(RGB)(tensor(50, 60))
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
