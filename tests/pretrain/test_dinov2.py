"""DINOv2: views, masks, refusals, the hooks of the loop, and a run from the command to the saved teacher."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vitkit
from vitkit import tokens, weights
from vitkit.data.multicrop import MultiCrop, local_size_of
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.parts import dino_losses
from vitkit.parts.block_masks import batch_masks, smallest_block
from vitkit.parts.dino_batch import draw_masks, split
from vitkit.parts.dino_head import DINOHead, head_from
from vitkit.parts.subset_depth import SubsetDepth, uniform_depth
from vitkit.passport import Preprocess
from vitkit.pretrain.dinov2 import DINOv2, Settings
from vitkit.run.loop import Now

SMALL = {"prototypes": 24, "head_hidden": 16, "bottleneck_dim": 8, "local_crops": 2}
ARCH = {"embed_dim": 24, "depth": 3, "num_heads": 2}
MODEL = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "patch_size": 8, "in_chans": 1}
RUN = {**MODEL, **SMALL, "data": "digits", "arch_kwargs": ARCH, "workers": 0, "quiet": True, "batch_size": 16}


def quiet(_: str) -> None:
    pass


def make_vit(**more):
    return weights.load(
        "vit_tiny_patch16_224", pretrained=False, image_size=32, patch_size=8, in_chans=1, arch_kwargs=ARCH, say=None,
        **more,
    )  # fmt: skip


def make(**settings) -> DINOv2:
    torch.manual_seed(0)
    return DINOv2(make_vit(), Settings(**{**SMALL, **settings})).train()


def batch(count: int = 6, local: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    views = {"image": rand(count, 1, 32, 32), "image_2": rand(count, 1, 32, 32), "seed": torch.arange(count)}
    return views | ({"image_local": rand(count, local, 1, 16, 16)} if local else {})


def now(epoch: float, epochs: int = 10, each: int = 5) -> Now:
    return Now(int(epoch * each), epoch, epochs, each, 1e-3)


# ---------------------------------------------------------------- parts


def test_chunks_change_neither_loss_nor_gradients(monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(14, 8), torch.randn(30, 8), torch.rand(30) + 0.5]
    inputs = [value.requires_grad_() for value in inputs]
    parts = [
        dino_losses.Part(dino_losses.sinkhorn(torch.randn(6, 30), 0.05), torch.randint(6, (9, 2)), torch.rand(9)),
        dino_losses.Part(dino_losses.Targets(torch.rand(4, 30)), torch.randint(4, (5, 1)), torch.rand(5)),
    ]
    logs = (inputs[0] @ (inputs[1] * inputs[2].unsqueeze(1)).T / 0.1).log_softmax(1).split([9, 5])
    each = [-(p.targets.all()[p.index].sum(1) * log).sum(1) @ p.row_weight for p, log in zip(parts, logs, strict=True)]
    grads = torch.autograd.grad(3 * sum(each), inputs)
    for chunk in (1, 64, 10**6):
        monkeypatch.setitem(dino_losses.CHUNK, "cpu", chunk)
        loss, shares, _ = dino_losses.cross_entropy(*inputs, parts)
        assert torch.allclose(loss, sum(each), rtol=1e-5) and torch.allclose(shares, torch.stack(each), rtol=1e-5)
        ours = torch.autograd.grad(3 * loss, inputs)
        assert all((a - b).abs().max() < 1e-5 * b.abs().max() for a, b in zip(ours, grads, strict=True))


def test_the_student_loss_keeps_no_logits():
    """With 4,096 prototypes and 512 rows logits would take 8 MiB; what is newly held at once stays far below."""
    from benchmarks.common import peak_memory

    x, weight = torch.randn(512, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    targets = dino_losses.Targets(torch.full((1, 4096), 1 / 4096))
    parts = [dino_losses.Part(targets, torch.zeros(512, 1, dtype=torch.int64), torch.ones(512))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dino_losses.CHUNK, "cpu", 4096 * 16)
        held = peak_memory(lambda: dino_losses.cross_entropy(x, weight, torch.ones(4096), parts)[0].backward())
    assert held < 3 * 2**20


def test_sinkhorn_shares_prototypes_equally_and_bears_large_logits():
    logits = torch.randn(64, 16)
    found = dino_losses.sinkhorn(logits, 0.5, iterations=30).all()
    assert torch.allclose(found.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(found.sum(0), torch.full((16,), 4.0), rtol=1e-3)
    large = dino_losses.sinkhorn(3 + 3 * logits.clamp(-1, 1), 0.04).all()  # exp(150) without a shift
    assert torch.isfinite(large).all()
    assert len(dino_losses.sinkhorn(torch.empty(0, 16), 0.04)) == 0


def test_a_center_without_rows_stays():
    center = torch.randn(1, 4)
    before = center.clone()
    dino_losses.update_center(center, torch.empty(0, 4))
    assert torch.equal(center, before)


def test_koleo_of_twins_and_of_a_single_image():
    assert float(dino_losses.koleo(torch.ones(4, 8))) > 15
    assert float(dino_losses.koleo(torch.randn(1, 8))) == 0.0


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_are_read_back_from_their_own_tensors(layers):
    head = DINOHead(12, 20, hidden_dim=10, bottleneck_dim=6, layers=layers)
    again = head_from(head.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(head(x), again(x))
    renamed = {n.replace("weight_g", "parametrizations.weight.original0"): v for n, v in head.state_dict().items()}
    renamed = {n.replace("weight_v", "parametrizations.weight.original1"): v for n, v in renamed.items()}
    assert torch.equal(head(x), head_from(renamed)(x))
    with pytest.raises(WeightsError, match="the file is not a DINO head"):
        head_from({"fc.weight": torch.ones(1)}, "the file")


def test_masks_hide_half_of_the_images_and_up_to_half_of_each():
    hidden = batch_masks(random.Random(0), 40, (14, 14))
    shares = hidden.mean(1)
    assert (shares > 0).sum() == 20 and shares.max() <= 0.5
    assert [smallest_block(n) for n in (4, 16, 49, 196)] == [1, 1, 3, 4]
    tiny = batch_masks(random.Random(0), 40, (4, 4))
    assert (tiny.any(1)).sum() == 20


def test_masks_follow_the_images_seeds():
    one = {"image": torch.zeros(4, 1, 32, 32), "seed": torch.tensor([5, 6, 7, 8])}
    first, again = (draw_masks(one, split(one), (4, 4), 0.5, (0.1, 0.5)) for _ in range(2))
    other = draw_masks({**one, "seed": torch.tensor([5, 6, 7, 9])}, split(one), (4, 4), 0.5, (0.1, 0.5))
    assert torch.equal(first.hidden, again.hidden) and not torch.equal(first.hidden, other.hidden)
    assert first.hidden.any(1).sum() == 4


def test_crops_have_their_sizes_and_are_reproducible():
    preprocess = Preprocess(mean=(0.5,), std=(0.2,), image_size=(32, 48))
    view = MultiCrop(preprocess, local_size=(16, 24), local_crops=3)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        found.append(
            view(torch.randint(0, 256, (1, 70, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
        )
    assert {k: tuple(v.shape) for k, v in found[0].items()} == {
        "image": (1, 32, 48), "image_2": (1, 32, 48), "image_local": (3, 1, 16, 24),
    }  # fmt: skip
    assert all(v.dtype == torch.uint8 and torch.equal(v, found[1][k]) for k, v in found[0].items())
    colour = MultiCrop(Preprocess(image_size=(32, 32)), local_size=(16, 16), local_crops=0)
    assert colour(torch.zeros(3, 9, 200, dtype=torch.uint8)).keys() == {"image", "image_2"}  # a strip: the central crop


def test_first_crops_are_never_blurred_as_in_the_official_code(monkeypatch):
    from vitkit.data import multicrop

    seen = []
    monkeypatch.setattr(multicrop.F, "gaussian_blur", lambda x, *_: seen.append(x.shape[-1]) or x)
    view = MultiCrop(Preprocess(image_size=(32, 32)), local_size=(16, 16), local_crops=1)
    for i in range(200):
        random.seed(i)
        view(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert 160 <= seen.count(32) <= 197 and 75 <= seen.count(16) <= 125  # 0.9 of second crops, half of small ones


def test_local_size():
    assert local_size_of((224, 224), (14, 14), "auto") == (98, 98)
    assert local_size_of((224, 224), (16, 16), "auto") == (96, 96)
    with pytest.raises(ConfigError, match="local_size is 100 pixels, and a patch has 16") as error:
        local_size_of((224, 224), (16, 16), 100)
    assert "e.g. 96" in str(error.value)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_stochastic_depth_is_uniform_and_by_subsets_above_a_tenth(rate):
    vit = make_vit(drop_path_rate=rate)
    plain = make_vit()
    plain.load_state_dict(vit.state_dict())
    assert uniform_depth(vit) == pytest.approx(rate)
    assert isinstance(vit.blocks[0], SubsetDepth) == (rate > 0.1)
    x = torch.randn(8, 1, 32, 32)
    assert torch.equal(tokens.encode(vit.eval(), x).all, tokens.encode(plain.eval(), x).all)
    block, rows = vit.train().blocks[1], torch.randn(10, 5, 24)
    with torch.no_grad():
        draws = torch.stack([block(rows) for _ in range(600)])
        want = plain.blocks[1](rows)
    assert ((draws - rows).abs().sum((2, 3)) > 0).float().mean() > 0.5
    assert (draws.mean(0) - want).abs().mean() < 0.1 * (want - rows).abs().mean()


# ---------------------------------------------------------------- the method


def test_the_schedules_come_from_the_position_alone():
    method = make(teacher_temp_epochs=4)
    groups = method.param_groups(0.04, layer_decay=0.9)
    for group in groups:
        group["lr"] = 1e-3 * group["lr_scale"]
    method.before_step(now(0), groups)
    assert method.temperature == 0.04 and method.momentum == pytest.approx(0.992)
    assert all(g["lr"] == 0 for g in groups if g["last_layer"])
    method.before_step(now(5), groups)
    assert method.temperature == pytest.approx(0.07) and method.momentum == pytest.approx(0.996)
    assert {round(g["weight_decay"], 6) for g in groups} == {0.0, 0.22}


def test_the_teacher_follows_and_a_momentum_of_one_leaves_it():
    method = make()
    before = method.teacher.blocks[0].mlp.fc1.weight.clone()
    with torch.no_grad():
        method.vit.blocks[0].mlp.fc1.weight.add_(1.0)
    method.momentum = 1.0
    method.after_step(1)
    assert torch.equal(method.teacher.blocks[0].mlp.fc1.weight, before)
    method.momentum = 0.75
    method.after_step(2)
    assert torch.allclose(method.teacher.blocks[0].mlp.fc1.weight, before + 0.25)


def test_held_out_images_move_no_center():
    method = make().eval()
    method({"image": torch.randn(3, 1, 32, 32), "seed": torch.arange(3)})
    assert not method.dino_center.any()
    method.train()(batch())
    assert method.dino_center.any()


def test_training_lowers_the_loss_and_the_pieces_add_up():
    method = make(local_crops=2)
    optimizer = torch.optim.AdamW(method.param_groups(0.04), lr=2e-3)
    losses = []
    for _ in range(25):
        out = method(batch())
        parts = sum(float(out[name]) for name in ("dino_local", "dino_global", "ibot", "koleo"))
        assert out["loss"].item() == pytest.approx(parts, rel=1e-5)
        losses.append(out["loss"].item())
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(1)
    assert losses[-1] < losses[0] - 0.3


def test_teacher_views_are_swapped():
    """With equal views nothing changes by the swap; a student that sees view 2 where the teacher saw view 1 does."""
    method = make(ibot_weight=0.0, koleo_weight=0.0).eval()
    views = batch(local=0)
    hidden = torch.zeros(12, 16, dtype=torch.bool)
    loss = float(method({**views, "masks": hidden})["dino_global"])
    with torch.no_grad():
        image = tokens.encode(method.teacher, torch.cat([views["image"], views["image_2"]])).prefix[:, 0]
        p = dino_losses.centred(method.teacher_dino_head(image), method.dino_center, method.temperature).all()
        q = (method.dino_head(image) / 0.1).log_softmax(1)
    assert loss == pytest.approx(float(-(p.roll(6, 0) * q).sum(1).mean()) * 2 / 3, rel=1e-5)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"prototypes": 1}, "prototypes is 1"),
        ({"teacher_temp": 0.0}, "teacher_temp is 0.0"),
        ({"teacher_momentum": 1.5}, "teacher_momentum is 1.5"),
        ({"mask_range": (0.6, 0.2)}, "mask_range"),
        ({"local_crops": -1}, "local_crops is -1"),
        ({"unfreeze": 0}, "unfreeze is 0"),
    ],
)
def test_settings_are_checked(wrong, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**wrong)


def test_unfreezing_more_blocks_than_there_are():
    with pytest.raises(ConfigError, match=r"unfreeze is 9 blocks, and the ViT has 3(.|\n)*1 to 3"):
        make(guard=True, unfreeze=9)


def test_heads_of_another_width_or_missing(tmp_path):
    with pytest.raises(WeightsError, match=r"dino_head.safetensors does not exist"):
        make(heads=str(tmp_path / "dino_head.safetensors"))
    weights.save_state(tmp_path / "dino_head.safetensors", DINOHead(32, 9, hidden_dim=4, bottleneck_dim=4).state_dict())
    with pytest.raises(WeightsError, match="for a backbone 32 wide, and this one is 24"):
        make(heads=str(tmp_path / "dino_head.safetensors"))


def test_a_training_dump_goes_on_with_its_heads(tmp_path):
    """DINOv2 saves {"teacher": ...} with blocks in chunks; RAD-DINO's head is a file of its own."""
    source = make()
    named = {}
    for name, value in source.vit.state_dict().items():
        parts = name.split(".")
        named["backbone." + (".".join(["blocks", "0", *parts[1:]]) if parts[0] == "blocks" else name)] = value
    named["backbone.mask_token"] = torch.full((1, 24), 0.5)
    named |= {f"dino_head.{name}": value for name, value in source.dino_head.state_dict().items()}
    torch.save({"teacher": named}, tmp_path / "teacher_checkpoint.pth")
    vit = weights.load(tmp_path / "teacher_checkpoint.pth", arch_kwargs={"num_heads": 2}, say=None)
    method = DINOv2(vit, Settings(prototypes=77))
    assert not method.guarded and method.dino_head.prototypes == SMALL["prototypes"]
    assert torch.equal(method.dino_head.last_layer.weight_v, source.dino_head.last_layer.weight_v)
    assert torch.equal(method.teacher_dino_head.last_layer.weight_v, source.dino_head.last_layer.weight_v)
    assert torch.equal(method.mask_token, torch.full((1, 24), 0.5))
    weights.save_state(tmp_path / "dino_head.safetensors", source.dino_head.state_dict())
    again = make(heads=str(tmp_path / "dino_head.safetensors"), prototypes=77)
    assert again.dino_head.prototypes == SMALL["prototypes"] and "dino_head goes on from" in again.notes[0]


# ---------------------------------------------------------------- runs


def test_a_run_saves_the_teacher_with_its_heads_and_goes_on_from_them(tmp_path, capsys):
    run = vitkit.pretrain("dinov2", **RUN, out=tmp_path / "a", max_steps=6, val_fraction=0.1)
    vit = weights.load(tmp_path / "a", say=None)
    assert {"dino_head.mlp.0.weight", "mask_token", "dino_loss.center"} <= set(vit.extras)
    assert type(vit).__name__ == "VisionTransformer"
    method = DINOv2(vit, Settings(**{**SMALL, "prototypes": 99}))
    assert not method.guarded and method.dino_head.prototypes == 24
    assert "dino_head goes on from the checkpoint (24 prototypes)" in method.notes
    page = (run.path / "report.html").read_text()
    assert "Collapse doctor" in page


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    whole = {**RUN, "epochs": 1, "seed": 3, "drop_path": 0.2, "data": "digits"}
    vitkit.pretrain("dinov2", **whole, out=tmp_path / "a", max_steps=8)
    from vitkit.run import loop

    class Stop(Exception):
        pass

    def stop_after(step):
        original = loop._Fit._after_step

        def after(self):
            original(self)
            if self.state.step == step:
                raise Stop

        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Fit, "_after_step", stop_after(5))
        with pytest.raises(Stop):
            vitkit.pretrain("dinov2", **whole, out=tmp_path / "b", max_steps=8, save_every=3)
    vitkit.pretrain("dinov2", **whole, out=tmp_path / "b", max_steps=8, save_every=3)
    a, b = (weights.read_state(tmp_path / name / "model.safetensors")[0] for name in "ab")
    heads = [weights.read_state(tmp_path / name / "extras.safetensors")[0] for name in "ab"]
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    """Targets, centres and masks are over all processes; KoLeo's neighbours are those of one process, so it is off."""
    base = {
        **RUN,
        "centering": "sinkhorn_knopp",
        "koleo_weight": 0.0,
        "drop_path": 0.0,
        "max_steps": 4,
        "accelerator": "cpu",
    }
    vitkit.pretrain("dinov2", **base, out=str(tmp_path / "one"))
    vitkit.pretrain("dinov2", **{**base, "batch_size": 8, "devices": 2}, out=str(tmp_path / "two"))
    one, two = (weights.read_state(tmp_path / name / "extras.safetensors")[0] for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=5e-5) for key in one)
    one, two = (weights.read_state(tmp_path / name / "model.safetensors")[0] for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=5e-5) for key in one)


def one_folder(path, count):
    from PIL import Image

    path.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    return path


def test_what_cannot_be_learnt_from_is_refused_before_anything_is_written(tmp_path):
    one = one_folder(tmp_path / "one", 1)
    settings = {**RUN, "data": str(one), "out": tmp_path / "out", "val_fraction": 0.0, "test_fraction": 0.0}
    with pytest.raises(DataError, match="1 training image: the loss compares images with each other"):
        vitkit.pretrain("dinov2", **settings)
    settings["data"] = "digits"
    with pytest.raises(ConfigError, match="batch_size 1: KoLeo needs the nearest other image"):
        vitkit.pretrain("dinov2", **{**settings, "batch_size": 1})
    with pytest.raises(ConfigError, match="2 images a step are too few for Sinkhorn"):
        vitkit.pretrain("dinov2", **{**settings, "batch_size": 2, "centering": "sinkhorn_knopp"})
    with pytest.raises(ConfigError, match="local_size is 13 pixels, and a patch has 8"):
        vitkit.pretrain("dinov2", **{**settings, "local_size": 13})
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_views_use_the_shared_settings():
    train = SimpleNamespace(crop_scale=(0.5, 1.0), hflip=False, augment=True)
    method = make(local_size=16)
    view, _ = method.views(Preprocess(mean=(0.5,), std=(0.2,), image_size=(32, 32)), train)
    assert view.global_scale == (0.5, 1.0) and not view.hflip and view.local_size == (16, 16)
    with pytest.raises(ConfigError, match="DINOv2 compares different views of an image"):
        method.views(Preprocess(image_size=(32, 32)), SimpleNamespace(augment=False))
