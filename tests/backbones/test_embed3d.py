"""ViTs of volumes and videos: timm's own, with three axes."""

from __future__ import annotations

import pytest
import torch

from vitkit import tokens, weights
from vitkit.errors import ConfigError, WeightsError
from vitkit.passport import Preprocess

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def volume(**changes):
    asked = {"image_size": (16, 24, 8), "patch_size": (8, 8, 4), "arch_kwargs": SMALL, "pretrained": False, "say": None}
    return weights.load("volume_vit_tiny_patch16_96", **{**asked, **changes}).eval()


def video(**changes):
    asked = {"image_size": (8, 16, 24), "patch_size": (2, 8, 8), "arch_kwargs": SMALL, "pretrained": False, "say": None}
    return weights.load("video_vit_tiny_patch16_224", **{**asked, **changes}).eval()


@pytest.mark.parametrize("build,size", [(volume, (1, 16, 24, 8)), (video, (3, 8, 16, 24))])
def test_encode_equals_timm_and_a_kept_subset_is_embedded_alone(build, size):
    vit, x = build(), torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    seen = tokens.encode(vit, x)
    assert torch.equal(seen.all, vit.forward_features(x))
    pooled = vit.forward_head(vit.forward_features(x), pre_logits=True)
    torch.testing.assert_close(tokens.feature(vit, x), pooled, rtol=0, atol=1e-6)
    keep = torch.tensor([[5, 0, 11], [1, 2, 7]])
    some, every = tokens.embed(vit, x, keep=keep), tokens.embed(vit, x)
    prefix = vit.num_prefix_tokens
    rows = every.x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(some.x[:, prefix:], rows, rtol=0, atol=1e-6)
    assert tokens.encode(vit, x, layers=[-1]).taps[0].map.shape == (2, 24, *seen.grid)


def test_another_grid_resamples_positions():
    vit = volume()
    assert tokens.encode(vit, torch.rand(1, 1, 32, 8, 12)).grid == (4, 1, 3)
    with torch.no_grad():  # blank patches without a bias: what is left are the positions
        vit.patch_embed.proj.bias.zero_()
        vit.pos_embed[0, 1:] = (
            torch.arange(3.0).repeat_interleave(2).repeat(2)[:, None]
        )  # 0, 1, 2 along the second axis
    positions = tokens.embed(vit, torch.zeros(1, 1, 16, 48, 8)).x[0, 1:, 0].unflatten(0, (2, 6, 2))
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0])
    torch.testing.assert_close(positions, expected[None, :, None].expand(2, 6, 2))
    assert tokens.encode(video(), torch.rand(1, 3, 4, 32, 24)).grid == (2, 4, 3)
    with pytest.raises(ConfigError, match=r"not a multiple of the patch size \(2, 8, 8\)"):
        tokens.encode(video(), torch.rand(1, 3, 5, 16, 24))


def test_saved_and_loaded_again_at_another_size(tmp_path):
    vit = video()
    weights.save_run(tmp_path, vit)
    assert weights.kind(tmp_path) == "video" and weights.kind("volume_vit_base_patch16_96") == "volume"
    assert weights.kind("vit_tiny_patch16_224") == weights.kind(tmp_path / "nothing.pth") == "image"
    again = weights.load(tmp_path, say=None).eval()
    x = torch.rand(1, 3, 8, 16, 24)
    assert torch.equal(again(x), vit(x)) and again.passport.preprocess.kind == "video"
    longer = weights.load(tmp_path, image_size=(16, 16, 24), say=None)
    assert longer.patch_embed.grid_size == (8, 2, 3) and longer.pos_embed.shape[1] == 48
    square = weights.load(tmp_path, image_size=32, say=None)  # one number: the frames, not their count
    assert square.passport.preprocess.image_size == (8, 32, 32)
    with pytest.raises(WeightsError, match="kernels with three axes are not resized"):
        weights.load(tmp_path, patch_size=4, image_size=16, say=None)


def test_bare_class_and_files_say_of_what_their_axes_are(tmp_path):
    sizes = {"img_size": [8, 8, 8], "patch_size": [4, 4, 4], "in_chans": 1, "class_token": False, "global_pool": "avg"}
    vit = weights.load(
        "VisionTransformer", pretrained=False, arch_kwargs={"kind": "volume", **sizes, **SMALL}, say=None
    )
    path = tmp_path / "weights.safetensors"
    weights.save_state(path, vit.state_dict())
    with pytest.raises(WeightsError, match="nothing says of what"):
        weights.load(path, say=None)
    read = weights.load(path, arch_kwargs={"kind": "volume", "num_heads": 2}, say=None)
    assert read.passport.preprocess.image_size == (8, 8, 8) and read.passport.feature.positions == "trilinear"
    assert weights.kind(path, arch_kwargs={"kind": "volume", "num_heads": 2}) == "volume"
    with pytest.raises(WeightsError, match="kind is 'film'"):
        weights.load("VisionTransformer", pretrained=False, arch_kwargs={"kind": "film", **sizes}, say=None)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"image_size": (16, 24)}, r"image_size is \(16, 24\) for a model whose input has 3 axes"),
        ({"image_size": (16, 24, 9)}, "not a multiple of the patch size"),
        ({"image_size": (16, 24, 8, 8)}, "three sides for volumes and videos"),
        ({"pretrained": True}, "no pre-trained weights"),
    ],
)
def test_impossible_sizes(changes, words):
    with pytest.raises(WeightsError, match=words):
        volume(**changes)


def test_preprocessing_of_volumes_and_videos():
    pixels = Preprocess(mean=(0.5,), std=(0.25,), image_size=(4, 4, 4), kind="volume", window=(-175, 250))
    assert torch.equal(pixels.normalise(torch.ones(2, 1, 4, 4, 4)), torch.full((2, 1, 4, 4, 4), 2.0))
    with pytest.raises(WeightsError, match="volumes of shape"):
        pixels.normalise(torch.ones(2, 3, 4, 4, 4))
    views = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3).normalise(
        torch.ones(2, 5, 3, 4, 4)
    )  # several views of an image
    assert views.shape == (2, 5, 3, 4, 4)
    for wrong, words in (
        ({"kind": "film"}, "kind is 'film'"),
        ({"kind": "video"}, "frames, height and width"),
        ({"window": (2, 1)}, "low first"),
        ({"spacing": (1, 1, 0)}, "three lengths in mm"),
        ({"frame_stride": 0}, "frame_stride is 0"),
    ):
        with pytest.raises(WeightsError, match=words):
            Preprocess(**wrong)
