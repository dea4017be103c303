"""DVPT's SegFormer: the whole trunk and decoder, official names, sharing, the loss, and training on masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitkit.data import read
from vitkit.dense import dvpt_segformer as seg
from vitkit.dense.training import collate, fit_masks, picture
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.weights import save_state

SMALL = seg.Size((8, 16, 24, 32), (3, 2, 2, 1), 16, heads=(1, 2, 2, 4))


def small(classes: int = 2, **settings) -> seg.DVPTSegFormer:
    torch.manual_seed(0)
    options = {"prompts": 4, "bottleneck": 3, "drop_path": 0.0, **settings}
    return seg.DVPTSegFormer(seg.Settings(**options), classes=classes, size=SMALL)


def images(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_b4_has_the_published_size():
    with torch.device("meta"):
        model = seg.DVPTSegFormer(seg.Settings(), classes=2)
    trunk = {n: p for n, p in model.named_parameters() if not seg.trains(n) and not n.startswith("linear_c")}
    assert abs(sum(p.numel() for p in trunk.values()) / 61.4e6 - 1) < 0.01  # MiT-B4: 61.4 M (SegFormer, table 1)
    trained = sum(p.numel() for n, p in model.named_parameters() if seg.trains(n))
    assert trained < 0.02 * sum(p.numel() for p in model.parameters())
    assert [len(getattr(model, f"block{i}")) for i in (1, 2, 3, 4)] == [3, 8, 27, 3]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (72, 40)], ids=str)
def test_any_size_gives_scores_of_every_pixel(size):
    model = small(classes=3).eval()
    with torch.no_grad():
        maps = model.maps(images(*size))
        assert [m.shape[1] for m in maps] == list(SMALL.widths)
        assert maps[0].shape[2:] == (size[0] // 4, size[1] // 4)
        assert model(images(*size)).shape == (2, 3, *size)


def test_zero_gates_make_it_segformer():
    """Without bottlenecks and prompts (gates at 0) the parameters behind the gates change nothing, and get no gradient."""
    model = small()
    with torch.no_grad():
        want = model(images())
        for name, parameter in model.named_parameters():
            if "prompt" in name and "gate" not in name:
                parameter.add_(1)
        assert torch.equal(model(images()), want)
    model(images()).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "prompt" in name:
            assert bool(parameter.grad.any()) == ("gate" in name), name


def test_prompts_reach_the_first_tokens_only():
    block = seg.Block(8, 2, 2, prompts=4, bottleneck=3, gate_init=0.0).eval()
    x = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    block.norm2.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    with torch.no_grad():
        block(x, (4, 6))
        block.prompt_gate2.fill_(1.0)
        block(x, (4, 6))
    changed = (seen[0] != seen[1]).any(-1)[0]
    assert changed[:4].all() and not changed[4:].any()
    tiny = seg.Block(8, 2, 1, prompts=10, bottleneck=3, gate_init=1.0)
    assert tiny(x[:, :4], (2, 2)).shape == (1, 4, 8)  # a map of fewer tokens than prompts


def test_bottlenecks_are_shared_within_a_stage_and_restart_with_the_next():
    model = small(gate_init=0.3, share_every=2)
    owners = [[block.shared[0] for block in getattr(model, f"block{i}")] for i in (1, 2)]
    assert owners[0][0] is owners[0][1] and owners[0][2] is not owners[0][0] and owners[1][0] is owners[1][1]
    assert owners[1][0] is not owners[0][2]
    names = [n for n in model.state_dict() if n.endswith("prompt_proj.prompt_gate")]
    assert names == [
        f"{b}.prompt_proj.prompt_gate" for b in ("block1.0", "block1.2", "block2.0", "block3.0", "block4.0")
    ]
    twin = copy.deepcopy(model)
    assert twin.block1[1].shared[0] is twin.block1[0].prompt_proj and twin.block1[0].prompt_proj is not owners[0][0]
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    apart = copy.deepcopy(model)
    for block in apart.block1:
        block.shared = (copy.deepcopy(block.shared[0]),)
    model(images()).square().sum().backward()
    apart(images()).square().sum().backward()
    shared = model.block1[0].prompt_proj.prompt_key_proj_u.weight.grad
    each = [block.shared[0].prompt_key_proj_u.weight.grad for block in apart.block1[:2]]
    assert torch.allclose(shared, each[0] + each[1], rtol=1e-4, atol=1e-6)


def official(model: seg.DVPTSegFormer) -> dict[str, torch.Tensor]:
    """A SegFormer file: the trunk and the decoder under the authors' prefixes, without prompts, for 150 classes."""
    file = {}
    for name, value in model.state_dict().items():
        if "prompt" in name or name.startswith("linear_pred."):
            continue
        file[f"{'decode_head' if name.startswith('linear_c') else 'backbone'}.{name}"] = value.half()
    file["decode_head.linear_fuse.conv.weight"] = torch.randn(16, 64, 1, 1)
    return file | {"decode_head.linear_pred.weight": torch.randn(150, 16, 1, 1)}


def test_official_segformer_loads_and_what_is_left_is_said(tmp_path):
    source = small()
    torch.save({"state_dict": official(source)}, tmp_path / "segformer.pth")
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    said = seg.load_official(model, tmp_path / "segformer.pth")
    assert said[0].endswith("0 of them prompts and bottlenecks")
    assert said[1] == "left out: linear_fuse.conv.weight, linear_pred.weight"
    own, want = model.state_dict(), source.state_dict()
    assert all(torch.equal(own[n], want[n].half().float()) for n in own if not seg.trains(n))


def test_dvpt_files_load_with_every_copy_of_a_shared_bottleneck():
    source, model = small(gate_init=0.5), small()
    file = {f"module.{name}": value for name, value in source.state_dict().items()}
    for name, value in source.state_dict().items():
        if name.startswith("block1.0.prompt_proj."):
            file[f"module.{name.replace('block1.0', 'block1.1')}"] = value
    seg.load_tensors(model, file)
    assert torch.equal(model.eval()(images()), source.eval()(images()))
    file["module.block1.1.prompt_proj.prompt_gate"] = torch.ones(1)
    with pytest.raises(WeightsError, match=r"block1.0.prompt_proj.prompt_gate differs in blocks that would share it"):
        seg.load_tensors(model, file)


def test_files_that_do_not_fit_are_named():
    file = official(small())
    with pytest.raises(WeightsError, match=r"1 tensors are missing and 0 of another shape, e.g. norm1.weight"):
        seg.load_tensors(small(), {n: v for n, v in file.items() if n != "backbone.norm1.weight"})
    file["backbone.norm1.weight"] = torch.ones(9)
    with pytest.raises(WeightsError, match=r"norm1.weight \(9,\) for \(8,\)\n  fix: one of the sizes b0, b1"):
        seg.load_tensors(small(), file)


def test_settings_out_of_range_are_named():
    with pytest.raises(ConfigError, match="share_every is 0"):
        seg.Settings(share_every=0)
    with pytest.raises(ConfigError, match="classes is 1\n  fix: at least 2"):
        small(classes=1)
    with pytest.raises(ConfigError, match="2 heads do not divide a width of 9"):
        seg.Size((8, 9, 24, 32), (1, 1, 1, 1), 16, heads=(1, 2, 2, 4))
    with pytest.raises(ConfigError, match="smaller than its reduction 8"):
        small()(images(16, 16))


def test_the_dice_loss_of_known_cases():
    masks = torch.zeros(1, 4, 4, dtype=torch.long)
    masks[:, :2] = 1
    sure = nn.functional.one_hot(masks, 2).movedim(-1, 1) * 200.0
    assert float(seg.dice_loss(sure, masks)) < 1e-6 and abs(float(seg.dice_loss(-sure, masks)) - 1) < 1e-5
    assert float(seg.mask_loss(sure, masks)) < 1e-6
    # The second softmax flattens certainty: even a perfect answer costs.
    assert float(seg.mask_loss(sure, masks, double_softmax=True)) > 0.03
    unknown = masks.clone()
    unknown[:, 0] = 255
    worse = sure.clone()
    worse[:, :, 0] *= -1
    assert torch.allclose(seg.mask_loss(worse, unknown), seg.mask_loss(sure, unknown))


def squares(folder, count: int = 20) -> None:
    """Grey noise with one bright square each, and its mask."""
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i in range(count):
        image, mask = random.integers(0, 90, (64, 64), np.uint8), np.zeros((64, 64), np.uint8)
        top, left = random.integers(0, 32, 2)
        image[top : top + 28, left : left + 28] += 150
        mask[top : top + 28, left : left + 28] = 255
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")


def test_it_learns_masks_and_its_trained_tensors_restore_it(tmp_path):
    from vitkit.run.trained import trained_state

    squares(tmp_path)
    data = read(tmp_path, say=None)
    assert data.task == "mask" and data.masks.binary
    method = seg.DVPTSegmentation(small(train_trunk=True, gate_init=0.1))
    found = fit_masks(method, data, image_size=64, epochs=6, warmup_epochs=1.0, lr=4e-3, batch_size=4, augment=False)
    assert found["test_dice"] > 0.7 and 0 < found["test_iou"] <= found["test_dice"]
    save_state(tmp_path / "trained.safetensors", trained_state(method))
    again = seg.DVPTSegmentation(small(train_trunk=True))
    from vitkit.weights import read_state

    again.load_state_dict(read_state(tmp_path / "trained.safetensors")[0], strict=False)
    assert torch.equal(again.eval().predict(images()), method.predict(images()))


def test_a_frozen_trunk_stays_as_it_is(tmp_path):
    squares(tmp_path, count=8)
    method = seg.DVPTSegmentation(small(gate_init=0.1))
    before = {n: p.clone() for n, p in method.model.named_parameters()}
    state = torch.get_rng_state()
    fit_masks(method, read(tmp_path, say=None), image_size=64, epochs=1, warmup_epochs=0.0, batch_size=3)
    assert torch.equal(torch.get_rng_state(), state), "a caller's own random numbers"
    changed = {n for n, p in method.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(seg.trains(n) for n in changed)
    assert changed == {n for n in before if seg.trains(n)}


def test_pictures_and_masks_are_moved_alike(tmp_path):
    squares(tmp_path, count=6)
    data = read(tmp_path, say=None)
    image, mask = picture(data, 0, (64, 64))
    assert bool((image[0][mask == 1] >= 150).all()) and bool((image[0][mask == 0] < 90).all())
    rows = np.arange(6)
    batch, again = (collate(data, rows, (64, 64), seed=3, epoch=1) for _ in range(2))
    assert torch.equal(batch["image"], again["image"]) and torch.equal(batch["mask"], again["mask"])
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 255} and batch["mask"].dtype == torch.int64
    inside = [float(i[0][m == 1].float().mean()) for i, m in zip(batch["image"], batch["mask"], strict=True)]
    assert min(inside) > 150  # what the mask calls a square is bright
    other = collate(data, rows, (64, 64), seed=3, epoch=2)
    assert not torch.equal(batch["image"], other["image"])


def test_data_that_cannot_be_trained_on_are_named(tmp_path):
    method = seg.DVPTSegmentation(small())
    with pytest.raises(DataError, match="there are no masks"):
        fit_masks(method, read("digits", say=None))
    squares(tmp_path, count=3)
    Image.fromarray(np.zeros((64, 60), np.uint8)).save(tmp_path / "masks" / "0.png")
    data = read(tmp_path, say=None)
    row = data.names.index(next(n for n in data.names if n.endswith("0.png")))
    with pytest.raises(DataError, match=r"0.png is \(64, 64\), its mask \(64, 60\)"):
        picture(data, row, (64, 64))
