"""VideoMAE V2: masks, a plain reference at other sizes, what may not leak, and the verbs on small files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import vitkit
from tests.videos import write_video
from vitkit import tokens, weights
from vitkit.adapt.full import Full
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.parts.cosine_attention import CosineAttention
from vitkit.parts.sinusoid import sinusoid
from vitkit.parts.tube_masks import draw, dual_mask, running_cells, tube_mask
from vitkit.pretrain.videomae_v2 import Settings, VideoMAEv2
from vitkit.run.cli import main
from vitkit.settings import Classify, Task

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": [4, 16, 16], "patch_size": [2, 4, 4]}
TINY = Settings(mask_ratio=0.75, decoder_dim=16, decoder_depth=2, decoder_heads=2, num_sample=1)


def model(**kwargs):
    arch = {**SMALL, **kwargs}
    return weights.load("video_vit_tiny_patch16_224", pretrained=False, arch_kwargs=arch, say=None)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_running_cell_decodes_every_place_equally_often(ratio):
    maps = running_cells(ratio, (8, 4, 6))
    assert maps.shape == (4, 8, 24)
    decoded = (1 - maps.int()).unfold(1, 4, 1).sum(-1)  # over any 4 steps in a row
    assert torch.equal(decoded, torch.full_like(decoded, round(4 * (1 - ratio))))
    assert torch.equal(maps.float().mean((1, 2)), torch.full((4,), ratio))
    assert len({tuple(phase.flatten().tolist()) for phase in maps}) == 4


def test_what_the_running_cell_refuses():
    with pytest.raises(ConfigError, match="even number of patches each way, and a frame has 7x8"):
        running_cells(0.5, (4, 7, 8))
    with pytest.raises(ConfigError, match=r"decoder_mask_ratio 0.2 masks 0 of the 4 places"):
        running_cells(0.2, (4, 8, 8))


def test_the_tube_mask_hides_the_same_places_in_every_step():
    mask = tube_mask(torch.rand(5, 196), 8, 0.9)
    assert mask.shape == (5, 8, 196) and torch.equal(mask, mask[:, :1].expand_as(mask))
    assert mask[:, 0].sum(1).tolist() == [176] * 5  # int(0.9 * 196): 20 places stay
    with pytest.raises(ConfigError, match="hides 0 of the 4 patches of a frame"):
        tube_mask(torch.rand(1, 4), 2, 0.2)


def test_masks_are_functions_of_the_clips_seed():
    ratios = {"mask_ratio": 0.75, "decoder_mask_ratio": 0.5, "device": torch.device("cpu")}
    seeds = torch.tensor([5, 6, 7])
    whole = draw(seeds, 3, (2, 4, 4), **ratios)
    alone = draw(seeds[1:2], 1, (2, 4, 4), **ratios)
    assert torch.equal(whole.keep[1], alone.keep[0]) and torch.equal(whole.decode[1], alone.decode[0])
    assert not torch.equal(whole.keep[0], whole.keep[2])


def test_masks_of_different_counts_are_refused():
    mask = torch.ones(2, 8)
    mask[0, :2] = 0
    mask[1, :3] = 0
    with pytest.raises(ConfigError, match=r"encoder_mask leaves \[2, 3\] tubes"):
        dual_mask(mask)


# ---------------------------------------------------------------- the method


def plain_step(method: VideoMAEv2, video: torch.Tensor, encoder: torch.Tensor, decoder: torch.Tensor | None):
    """The paper's step written straight down: embed everything, boolean masks, explicit softmax, all targets."""
    vit, own = method.vit, method.decoder
    batch, size = len(video), vit.patch_embed.patch_size
    encoder = encoder.flatten(1).bool()
    decoder = ~encoder if decoder is None else decoder.flatten(1).bool()

    def attention(attn, x):
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if isinstance(attn, CosineAttention):
            q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
            logits = q @ k.mT * attn.q_norm.scale.view(-1, 1, 1).clamp(max=math.log(100)).exp()
        else:
            logits = q * q.shape[-1] ** -0.5 @ k.mT
        return attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def block(one, x):
        x = x + one.ls1(attention(one.attn, one.norm1(x)))
        return x + one.ls2(one.mlp(one.norm2(x)))

    x = vit.patch_embed(video)
    count, width = x.shape[1:]
    x = (x + sinusoid(count, width))[~encoder].view(batch, -1, width)
    for one in vit.blocks:
        x = block(one, x)
    x = own.embed(vit.norm(x))
    table = sinusoid(count, own.dim).expand(batch, -1, -1)
    wanted = ~decoder if method.settings.decoder_mask_ratio else encoder
    hidden = own.mask_token + table[wanted].view(batch, -1, own.dim)
    x = torch.cat([x + table[~encoder].view(batch, -1, own.dim), hidden], dim=1)
    for one in own.blocks:
        x = block(one, x)
    prediction = own.head(own.norm(x[:, -hidden.shape[1] :]))
    pixels = video * method.std.view(-1, 1, 1, 1) + method.mean.view(-1, 1, 1, 1)
    for axis, step in enumerate(size):
        pixels = pixels.unflatten(2 + 2 * axis, (-1, step))
    pixels = pixels.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, count, -1, video.shape[1])
    pixels = (pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True).sqrt() + 1e-6)
    error = (prediction - pixels.flatten(2)[wanted].view(prediction.shape)).square().mean(-1)
    counts = encoder[wanted].view(error.shape)
    return error[counts].mean()


@pytest.mark.parametrize(
    "arch,settings",
    [
        ({}, {}),
        ({"img_size": [10, 16, 24], "num_heads": 3}, {"decoder_mask_ratio": 0.25, "decoder_depth": 1}),
        ({"attn_layer": "cosine", "init_values": 0.1}, {"decoder_mask_ratio": 0.75, "decoder_init_values": 0.2}),
        ({"img_size": [8, 28, 20], "qkv_bias": False, "mlp_ratio": 48 / 11}, {"decoder_mask_ratio": 0.0}),
        ({"patch_size": [4, 8, 4], "img_size": [8, 32, 24], "in_chans": 1}, {"decoder_depth": 3, "decoder_dim": 24}),
    ],
)
def test_any_size_and_option_equals_the_plain_reference(arch, settings):
    torch.manual_seed(0)
    method = VideoMAEv2(model(**arch), replace(TINY, **settings))
    if arch.get("in_chans") == 1:
        method.mean, method.std = method.mean[:1], method.std[:1]
    for parameter in method.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    video = torch.randn(3, arch.get("in_chans", 3), *arch.get("img_size", SMALL["img_size"]))
    grid = method.vit.patch_embed.grid_size
    encoder = tube_mask(torch.rand(3, math.prod(grid[1:])), grid[0], 0.75)
    ratio = method.settings.decoder_mask_ratio
    decoder = running_cells(ratio, grid)[torch.tensor([0, 3, 1])] if ratio else None
    batch = {"image": video, "encoder_mask": encoder} | ({} if decoder is None else {"decoder_mask": decoder})
    ours, plain = method(batch)["loss"], plain_step(method, video, encoder, decoder)
    assert torch.allclose(ours, plain, rtol=2e-5)
    names, parameters = zip(*((n, p) for n, p in method.named_parameters() if p.requires_grad), strict=True)
    both = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (ours, plain))
    for name, a, b in zip(names, *both, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, atol=2e-5 * float(b.abs().max()) + 1e-7), name


def test_what_hidden_tubes_show_does_not_reach_the_prediction():
    method = VideoMAEv2(model(), TINY).eval()
    video = torch.randn(2, 3, 4, 16, 16)
    batch = {"image": video, "seed": torch.tensor([1, 2])}
    mask = method.mask(batch)
    seen = torch.zeros(2, 32, dtype=torch.bool).scatter_(1, mask.keep, True).view(2, 1, 2, 4, 4)
    seen = seen.repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    other = torch.where(seen, video, torch.randn_like(video))
    with torch.no_grad():
        assert torch.equal(
            method.decode(method.encode(video, mask), mask), method.decode(method.encode(other, mask), mask)
        )


@pytest.mark.parametrize("norm", [True, False])
def test_reconstructions_keep_what_was_seen(norm):
    method = VideoMAEv2(model(), replace(TINY, norm_pix_loss=norm)).eval()
    video = torch.randn(2, 3, 4, 16, 16)
    out = method.reconstruct({"image": video, "seed": torch.tensor([1, 2])})
    hidden = method.show_hidden(out["mask"][0], torch.ones(1, 3, 4, 16, 16))[0] < 1
    assert torch.equal(out["reconstructed"][0][~hidden], video[0][~hidden])
    assert (out["masked"][0][hidden] == 0).all() and not torch.equal(out["reconstructed"][0][hidden], video[0][hidden])
    assert out["mask"].mean() == 0.75


def test_several_clips_of_a_video_have_masks_of_their_own():
    method = VideoMAEv2(model(), TINY)
    clips = torch.randn(2, 3, 3, 4, 16, 16)
    mask = method.mask({"image": clips, "seed": torch.tensor([1000, 70000])})
    assert mask.keep.shape[0] == 6 and len({tuple(row.tolist()) for row in mask.keep}) > 3
    assert torch.isfinite(method({"image": clips})["loss"])


def test_nothing_trains_the_positions_and_every_other_weight_gets_a_gradient():
    method = VideoMAEv2(model(attn_layer="cosine", init_values=0.1), TINY)
    method({"image": torch.randn(2, 3, 4, 16, 16)})["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    groups = method.param_groups(0.05)
    free = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    decayed = [n for n, p in method.named_parameters() if id(p) not in free]
    assert all(n.endswith(".weight") for n in decayed) and sum(len(g["params"]) for g in groups) == len(
        list(method.parameters())
    )
    assert "pos_embed" not in dict(method.vit.named_parameters())
    assert torch.equal(method.vit.pos_embed, sinusoid(32, 24)[None])


@pytest.mark.parametrize(
    "wrong,words",
    [
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"decoder_mask_ratio": 0.1}, "decoder_mask_ratio is 0.1"),
        ({"num_sample": 0}, "num_sample is 0"),
        ({"crop_scales": (0.0,)}, "crop_scales is"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
    ],
)
def test_settings_are_checked(wrong, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**wrong)


def test_other_models_and_decoders_are_refused():
    with pytest.raises(ConfigError, match="decoder_dim 15 with decoder_heads 2"):
        VideoMAEv2(model(), replace(TINY, decoder_dim=15))
    image = weights.load(
        "vit_tiny_patch16_224", pretrained=False, arch_kwargs={"embed_dim": 24, "num_heads": 2}, say=None
    )
    with pytest.raises(ConfigError, match="needs a ViT of videos"):
        VideoMAEv2(image, TINY)
    method = VideoMAEv2(model(), TINY)
    with pytest.raises(WeightsError, match=r"no decoder for this model: \d+ tensors are missing or of another shape"):
        method.load_extras({"mask_token": torch.zeros(1, 1, 8)})
    other = VideoMAEv2(model(), replace(TINY, decoder_dim=8, decoder_depth=1))
    assert "decoder_dim=8 and decoder_depth=1 would go on with it" in method.adopt(other.extras())
    odd = VideoMAEv2(model(img_size=[4, 20, 16]), TINY)
    with pytest.raises(ConfigError, match=r"a frame has 5x4"):
        odd({"image": torch.randn(1, 3, 4, 20, 16)})


# ---------------------------------------------------------------- the model


def test_cosine_attention_is_taken_apart_like_any_other():
    from vitkit.adapt import lora

    vit = model(attn_layer="cosine").eval()
    with torch.no_grad():
        for p in vit.parameters():
            p += 0.1 * torch.randn_like(p)
        x = torch.randn(2, 3, 4, 16, 16)
        whole = tokens.encode(vit, x).patches
        maps = tokens.attention_maps(vit, x, layers=(0,))[0]
        assert torch.allclose(maps.sum(-1), torch.ones(2, 2, 32), atol=1e-5)
        stream = tokens.embed(vit, x)
        some = tokens.attend(vit.blocks[0], stream.x, queries=5)
        assert torch.allclose(some, tokens.attend(vit.blocks[0], stream.x)[:, :5], atol=1e-6)
        lora.inject(vit, lora.Settings(rank=2))
        assert torch.allclose(tokens.encode(vit, x).patches, whole, atol=1e-6)
        vit.blocks[0].attn.qkv.lora_B["default"].weight.normal_()
        assert not torch.allclose(tokens.encode(vit, x).patches, whole, atol=1e-3)


def test_another_grid_interpolates_or_rebuilds(tmp_path):
    vit = model()
    path = tmp_path / "a.pth"
    torch.save({"model": {n: v for n, v in vit.state_dict().items() if n != "pos_embed"}}, path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "video", "img_size": [4, 16, 16], "num_heads": 2}))
    bigger = weights.load(path, image_size=(8, 24, 24), say=None)
    assert bigger.pos_embed.shape == (1, 4 * 36, 24)
    rebuilt = weights.load(path, image_size=(8, 24, 24), positions="rebuild", say=None)
    assert torch.equal(rebuilt.pos_embed[0], sinusoid(144, 24)) and not torch.equal(bigger.pos_embed, rebuilt.pos_embed)
    # The same rule where the model sees another size at call time only.
    x = torch.randn(1, 3, 8, 24, 24)
    native = weights.load(path, say=None)
    assert torch.allclose(tokens.encode(native, x).patches, tokens.encode(bigger, x).patches, atol=1e-5)


def test_fine_tuning_pools_with_a_fresh_norm():
    vit = VideoMAEv2(model(), TINY).finish()
    assert isinstance(vit.norm, torch.nn.LayerNorm) and isinstance(vit.fc_norm, torch.nn.Identity)
    method = Full(vit, task=Task("single", ("a", "b")), classify=Classify(pool="avg"))
    assert isinstance(vit.fc_norm, torch.nn.LayerNorm) and isinstance(vit.norm, torch.nn.Identity)
    x = torch.randn(2, 3, 4, 16, 16)
    assert torch.allclose(tokens.feature(vit, x), vit.fc_norm(tokens.encode(vit, x).patches.mean(1)), atol=1e-6)
    mixed = Full(vit, task=method.task, classify=Classify(mixup=0.8, cutmix=1.0)).train()
    for _ in range(4):
        assert torch.isfinite(mixed({"image": x, "label": torch.tensor([0, 1])})["loss"])


# ---------------------------------------------------------------- the verbs

ARCH = '{"embed_dim": 24, "depth": 2, "num_heads": 2}'
GEOMETRY = ["--image_size", "4,16,16", "--patch_size", "2,4,4", "--frame_stride", "2"]
QUICK = ["--epochs", "1", "--batch_size", "4", "--workers", "0", "--quiet", "true"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for action in ("run", "walk"):
            for i in range(count):
                write_video(folder / split / action / f"{i}.mp4", 10, size=(24, 32))
    return folder


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "v"
    words = ["--model", "video_vit_tiny_patch16_224", "--pretrained", "false", "--arch_kwargs", ARCH, *GEOMETRY]
    words += ["--data", str(videos), "--out", str(out), "--num_sample", "2", "--mask_ratio", "0.75"]
    assert main(["pretrain", "videomae_v2", *words, "--decoder_dim", "16", "--decoder_heads", "2", *QUICK]) == 0
    return out


def test_the_run_holds_a_video_vit_and_its_decoder(run):
    vit = vitkit.weights.load(run, say=None)
    assert vit.passport.preprocess.kind == "video" and vit.passport.preprocess.frame_stride == 2
    assert vit.passport.preprocess.image_size == (4, 16, 16) and "encoder_to_decoder.weight" in vit.extras
    method = VideoMAEv2(vit, replace(TINY, decoder_depth=4))
    assert "goes on from the checkpoint" in method.adopt(vit.extras)
    assert (run / "report.html").is_file()


def test_fine_tune_predict_embed(run, videos, tmp_path, capsys):
    out = tmp_path / "f"
    words = ["--model", str(run), "--data", str(videos), "--out", str(out), "--pool", "avg", *QUICK]
    assert main(["adapt", "full", *words, "--mixup", "0.8", "--test_clips", "2", "--test_crops", "3"]) == 0
    capsys.readouterr()
    assert main(["predict", str(out), str(videos / "test"), "--clips", "2", "--crops", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "run" in lines[0] and "walk" in lines[0]
    one = vitkit.predict(out, videos / "test")
    several = vitkit.predict(out, videos / "test", clips=2, crops=3)
    assert one.scores.shape == several.scores.shape == (4, 2)
    assert np.allclose(several.scores.sum(1), 1, atol=1e-5)
    words = ["--model", str(out), "--data", str(videos), "--out", str(tmp_path / "w"), "--window_stride", "2"]
    assert main(["embed", *words, "--quiet", "true"]) == 0
    x = np.load(tmp_path / "w" / "features" / "train" / "run" / "0.npy")
    assert x.shape == (4, 24) and x.dtype == np.float32
    assert "64 windows of 16 videos, 24 values each" in capsys.readouterr().out
    x = vitkit.embed(model=str(out), data=str(videos), out=str(tmp_path / "e"), quiet=True)
    assert x.shape == (16, 24) and (tmp_path / "e" / "gallery.html").is_file()


def test_a_student_learns_from_a_run(run, videos, tmp_path):
    teacher = tmp_path / "teacher"
    common = {"data": str(videos), "epochs": 1, "batch_size": 4, "workers": 0, "quiet": True, "pool": "avg"}
    vitkit.adapt("full", model=str(run), out=str(teacher), **common)
    student = vitkit.adapt("full", model=str(run), out=str(tmp_path / "s"), teacher=str(teacher), **common)
    state = vitkit.weights.load(student.path, say=None).state_dict()
    assert not any("teacher" in name for name in state)
    with pytest.raises(ConfigError, match="sees other pixels: image_size"):
        vitkit.adapt(
            "full", model=str(run), out=str(tmp_path / "x"), teacher=str(teacher), image_size=(4, 24, 24), **common
        )


def test_verbs_refuse_what_is_not_for_videos(run, videos, tmp_path):
    with pytest.raises(ConfigError, match="window_stride is 0"):
        vitkit.embed(model=str(run), data=str(videos), out=str(tmp_path / "a"), window_stride=0, quiet=True)
    with pytest.raises(ConfigError, match="pretrain mae is for models of images"):
        vitkit.pretrain("mae", model=str(run), data=str(videos), out=str(tmp_path / "b"), quiet=True)
    with pytest.raises(DataError, match="holds no videos"):
        (tmp_path / "empty").mkdir()
        vitkit.pretrain(
            "videomae_v2", model=str(run), data=str(tmp_path / "empty"), out=str(tmp_path / "c"), quiet=True
        )
