"""videomae_v2: pre-training with dual masking, both kinds of attention, the classifier and what hangs on it, every tensor."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vitkit import tokens, weights
from vitkit.adapt.full import Full
from vitkit.evaluate.video import merge_views, window_features, window_starts
from vitkit.parts.heads import soft_cross_entropy
from vitkit.parts.label_maps import convert_head
from vitkit.parts.optim import build_optimizer, layer_decay_groups
from vitkit.parts.positions import resample_positions
from vitkit.parts.schedules import warmup_cosine
from vitkit.parts.sinusoid import sinusoid
from vitkit.parts.tube_masks import running_cells
from vitkit.parts.video_names import to_official
from vitkit.pretrain.videomae_v2 import Settings, VideoMAEv2
from vitkit.settings import Classify, Task

from .conftest import Compared, files, read


def quiet(_: str) -> None:
    pass


def geometry(c: dict) -> dict:
    """What a config.json beside the authors' file says."""
    height, width = c["img_size"] if isinstance(c["img_size"], list) else [c["img_size"]] * 2
    patch = c["patch_size"] if isinstance(c["patch_size"], list) else [c["patch_size"]] * 2
    unsaid = {} if c["qkv_bias"] else {"kind": "video"}  # without biases of queries and values it could be a volume's
    return unsaid | {
        "img_size": [c["all_frames"], height, width],
        "patch_size": [c["tubelet_size"], *patch],
        "num_heads": c.get("encoder_num_heads", c.get("num_heads")),
        "norm_eps": c["norm_eps"],
    }


def load_pretrained(fixture, folder, **settings) -> VideoMAEv2:
    c = fixture.config
    vit = weights.load(fixture.checkpoint(folder, geometry(c)), say=quiet)
    own = {
        "mask_ratio": c["mask_ratio"],
        "decoder_mask_ratio": c["decoder_mask_ratio"],
        "decoder_dim": c["decoder_embed_dim"],
        "decoder_depth": c["decoder_depth"],
        "decoder_heads": c["decoder_num_heads"],
        "decoder_init_values": c["init_values"],
    }
    method = VideoMAEv2(vit, Settings(**{**own, **settings}))
    method.load_extras(vit.extras)
    return method


def official_gradients(method: VideoMAEv2) -> dict[str, torch.Tensor]:
    """Gradients (or values) under the authors' names."""
    return official({name: p.grad for name, p in method.named_parameters() if p.grad is not None})


def official(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    outside = {"decoder.embed.weight": "encoder_to_decoder.weight", "decoder.mask_token": "mask_token"}
    named = {outside.get(name, name.replace("vit.", "encoder.", 1)): value for name, value in tensors.items()}
    return to_official(named)


@pytest.mark.parametrize("path", files("videomae_v2.pretrain"), ids=lambda p: p.stem)
def test_pretraining(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load_pretrained(fixture, tmp_path)
    video = fixture["in.video"].clone().requires_grad_()
    batch = {key: fixture[f"in.{key}"] for key in ("encoder_mask", "decoder_mask")} | {"image": video}
    mask = method.mask(batch)
    loss = method(batch)["loss"]
    loss.backward()
    seen.same("out.loss", loss)
    gradients = official_gradients(method) | {"video": video.grad}
    for name in fixture.group("grad."):
        seen.same(f"grad.{name}", gradients[name])
    with torch.no_grad():
        latent = method.encode(video, mask)
        seen.same("out.encoder", latent.patches)
        seen.same("out.pred", method.decode(latent, mask))
        seen.same("out.labels", method.target(video, mask.decode))
        assert torch.equal(mask.hidden, fixture["out.loss_mask"].float())
        whole = {key: batch[key] for key in ("encoder_mask", "image")}  # no decoder mask: all hidden tubes
        seen.same("out.pred_no_decoder_mask", method.decode(latent, method.mask(whole)))
        seen.same("out.loss_no_decoder_mask", method(whole)["loss"])
        raw = load_pretrained(fixture, tmp_path, norm_pix_loss=False)
        seen.same("out.loss_raw_pixels", raw(batch)["loss"])
        seen.same("out.encoder_pos_embed", method.vit.pos_embed, 0.0)
        seen.same("out.decoder_pos_embed", method.decoder.table(latent.grid, video)[None], 0.0)
    grid = (c["window"][0], *c["window"][1:])
    for name, ratio in (("out.running_cell_maps", c["decoder_mask_ratio"]), ("out.running_cell_maps_25", 0.25)):
        if name in seen.left:
            seen.same(name, running_cells(ratio, grid).float(), 0.0)
    one_step(method, fixture, gradients, seen)
    seen.left.discard("out.loss_mask")
    seen.done()


def one_step(method: VideoMAEv2, fixture, gradients: dict[str, torch.Tensor], seen: Compared) -> None:
    """Clipping at the recipe's norm and AdamW. Adam's first step is a sign: entries without a gradient say nothing."""
    c = fixture.config["adamw"]
    parameters = [p for p in method.parameters() if p.grad is not None]
    seen.same("out.grad_norm", torch.nn.utils.clip_grad_norm_(parameters, c["clip_grad"]))
    assert c["eps"] == 1e-8
    groups = method.param_groups(c["weight_decay"])
    optimizer = build_optimizer(groups, name="adamw", lr=c["lr"], betas=tuple(c["betas"]))
    optimizer.step()
    after = official({name: p.detach() for name, p in method.named_parameters()})
    for name, value in fixture.group("out.step1.").items():
        gradient = gradients[name].abs()
        clear = gradient > 1e-3 * gradient.max()
        assert clear.float().mean() > 0.5
        seen.fixture.tensors[f"out.step1.{name}"] = value[clear]
        seen.same(f"out.step1.{name}", after[name][clear])


@pytest.mark.parametrize("path", files("videomae_v2.pretrain"), ids=lambda p: p.stem)
def test_a_decoder_goes_out_as_it_came_in(path, tmp_path):
    fixture = read(path)
    method = load_pretrained(fixture, tmp_path)
    theirs = {n: v for n, v in fixture.group("weights.").items() if not n.startswith("encoder.")}
    ours = method.extras()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh = VideoMAEv2(method.vit, method.settings)
    assert "goes on from the checkpoint" in fresh.adopt(method.vit.extras)


@pytest.mark.parametrize("wrap", ["_orig_mod.{}", "module.{}", "backbone.{}"])
def test_wrapped_files_are_the_same_model(wrap, tmp_path):
    fixture = read(files("videomae_v2.pretrain")[0])
    plain = load_pretrained(fixture, tmp_path)
    state = fixture.group("weights.")
    if wrap.startswith("backbone"):
        state = {
            wrap.format(name.removeprefix("encoder.")): v for name, v in state.items() if name.startswith("encoder.")
        }
    else:
        state = {wrap.format(name): value for name, value in state.items()}
    path = tmp_path / "wrapped.pth"
    torch.save({"module" if wrap.startswith("_orig") else "model": state}, path)
    vit = weights.load(path, say=quiet)
    assert all(torch.equal(value, plain.vit.state_dict()[name]) for name, value in vit.state_dict().items())


def load_classifier(fixture, folder) -> Full:
    c = fixture.config
    vit = weights.load(fixture.checkpoint(folder, geometry(c)), num_classes=None, say=quiet)
    head = {name: value.clone() for name, value in vit.head.state_dict().items()}
    task = Task("single", tuple(f"action {i}" for i in range(c["num_classes"])))
    method = Full(vit, task=task, classify=Classify(head="linear"))
    method.vit.head.load_state_dict(head)
    return method


@pytest.mark.parametrize("path", files("videomae_v2.finetune"), ids=lambda p: p.stem)
def test_finetuning(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load_classifier(fixture, tmp_path)
    vit = method.vit
    video, targets = fixture["in.video"], fixture["in.soft_targets"]
    out = method({"image": video, "label": targets})
    out["loss"].backward()
    seen.same("out.features", tokens.feature(vit, video))
    seen.same("out.logits", out["logits"])
    seen.same("out.loss", out["loss"])
    assert torch.allclose(out["loss"], soft_cross_entropy(out["logits"], targets))
    gradients = to_official({name: p.grad for name, p in vit.named_parameters() if p.grad is not None})
    for name in fixture.group("grad."):
        seen.same(f"grad.{name}", gradients[name])
    rates(vit, c, seen)
    positions(vit, c, seen)

    starts = window_starts(len(fixture["in.tad_video"]), c["tad"]["clip"], stride=4)
    seen.same("out.tad_starts", torch.as_tensor(starts), 0.0)
    frames = fixture["in.tad_video"]
    seen.same("out.tad_features", torch.as_tensor(window_features(vit, frames, starts, normalise=False)))

    merged = fixture["in.merge_logits"].softmax(-1).numpy()
    clips, labels = fixture["in.merge_video_id"].numpy(), fixture["in.merge_label"].numpy()
    found = merge_views(merged, clips)
    seen.same("out.merge_probs", torch.as_tensor(found.probabilities))
    truth = np.array([labels[clips == clip][0] for clip in found.videos])
    seen.same("out.merge_top1", torch.tensor(100 * found.top(1, truth)))
    seen.same("out.merge_top5", torch.tensor(100 * found.top(5, truth)))
    converted = convert_head({"head.weight": vit.head.weight}, fixture["in.label_map"].tolist())
    seen.same("out.converted_head", converted["head.weight"], 0.0)
    seen.done()


def rates(vit, c: dict, seen: Compared) -> None:
    """Layer decay of every official parameter, and the schedule."""
    groups = layer_decay_groups(vit, weight_decay=c["weight_decay"], layer_decay=c["layer_decay"])
    scale, decay = {}, {}
    for group in groups:
        for name in group["names"]:
            for theirs in to_official({name: torch.zeros(3)}):
                scale[theirs], decay[theirs] = group["lr_scale"], group["weight_decay"]
    assert set(c["param_names"]) == set(scale)
    seen.same("out.lrd.lr_scale", torch.tensor([scale[name] for name in c["param_names"]]))
    seen.same("out.lrd.weight_decay", torch.tensor([decay[name] for name in c["param_names"]]))
    s = c["lr_schedule"]
    assert s["start_warmup_value"] == 0
    seen.same("out.lr_schedule", torch.tensor(official_schedule(s)))


def official_schedule(s: dict) -> list[float]:
    """Ours at every step. Their warm-up is linspace(0, base, steps), which reaches its end one step earlier."""
    steps, warm = s["epochs"] * s["niter_per_ep"], s["warmup_epochs"] * s["niter_per_ep"]
    times = [i * warm / (warm - 1) if i < warm > 1 else i for i in range(steps)]
    shape = {"lr": s["base_value"], "min_lr": s["final_value"], "warmup": warm, "epochs": steps}
    return [warmup_cosine(time, **shape) for time in times]


def positions(vit, c: dict, seen: Compared) -> None:
    grid = vit.patch_embed.grid_size
    table = sinusoid(math.prod(grid), vit.embed_dim)[None]
    assert not vit.pos_embed.requires_grad or torch.equal(vit.pos_embed, table)
    seen.same("out.pos_embed", vit.pos_embed, 0.0)
    side = c["pos_embed_bigger_grid"]
    sides = (side, side) if isinstance(side, int) else tuple(side)
    bigger = resample_positions(table, (grid[0], *sides), prefix=0, rule="video", old_grid=grid)
    seen.same("out.pos_embed_bigger", bigger)
    longer = resample_positions(table, (c["pos_embed_longer_T"], *grid[1:]), prefix=0, rule="video", old_grid=grid)
    seen.same("out.pos_embed_longer", longer)


def test_the_files_config_says_what_was_read(tmp_path):
    """The tensors of the authors' own sizes need no config: 16 frames of 224 pixels, heads by width."""
    fixture = read(files("videomae_v2.pretrain")[0])
    path = fixture.checkpoint(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": fixture.config["encoder_num_heads"]}))
    said: list[str] = []
    vit = weights.load(path, say=said.append)
    assert vit.patch_embed.img_size == (16, 224, 224)
    assert any("16 x 224 x 224" in line for line in said)
