"""DVPT against NKUhealong/DVPT, every recorded tensor: the ViT as released, SegFormer's parts, the metrics."""

from __future__ import annotations

import pytest
import torch

from vitkit import tokens, weights
from vitkit.adapt import dvpt
from vitkit.dense import dvpt_segformer as seg
from vitkit.evaluate import metrics
from vitkit.parts.optim import build_optimizer
from vitkit.parts.positions import resample_positions
from vitkit.settings import Classify, Task

from .conftest import Compared, files, read


def sides(value) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def sharing(aliases: dict[str, str], depth: int) -> int:
    """How many blocks in a row share a bottleneck, from the checkpoint's aliases."""
    copies = {int(alias.split("resblocks.")[1].split(".")[0]) for alias in aliases}
    owners = [index for index in range(depth) if index not in copies]
    return owners[1] - owners[0] if len(owners) > 1 else depth


def load(fixture, folder) -> dvpt.DVPT:
    """The official checkpoint through the public loader; prompts, bottlenecks and projected head in place."""
    c = fixture.config
    path = fixture.checkpoint(
        folder, {"num_heads": c["heads"], "img_size": sides(c["input_resolution"]), "depth": c["layers"]}
    )
    vit = weights.load(path, num_classes=0, say=None)
    settings = dvpt.Settings(
        variant="released",
        prompts=c["num_prompts"],
        bottleneck=c["latent_dim"],
        share_every=sharing(c["shared_keys"], c["layers"]),
    )
    task = Task("single", tuple(str(i) for i in range(c["num_classes"])))
    method = dvpt.DVPT(vit, settings, task=task, classify=Classify())
    dvpt.load_official(method.vit, vit.extras)
    return method


def official_names(method: dvpt.DVPT) -> dict[str, str]:
    """Official name of each trained parameter."""
    owners = {}
    for index, block in enumerate(method.vit.blocks):
        owners.setdefault(id(block.dvpt[0]), index)
    names = {}
    for name, parameter in method.vit.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("prompt_proj."):
            _, group, rest = name.split(".", 2)
            first = owners[id(method.vit.prompt_proj[int(group)])]
            names[name] = f"encoder.transformer.resblocks.{first}.prompt_proj.{rest}"
        else:
            names[name] = "fc_head.weight" if name == "head.weight" else f"encoder.{name}"
    return names


@pytest.mark.parametrize("path", files("dvpt.vit"), ids=lambda p: p.stem)
def test_released_vit_gradients_and_one_step(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load(fixture, tmp_path).eval()
    vit, batch = method.vit, {"image": fixture["in.x"], "label": fixture["in.y"]}
    with torch.no_grad():
        stream = tokens.run(vit, tokens.embed(vit, batch["image"]), 0, 1)
        seen.same("out.block0", stream.x)
        seen.same("out.block_last", tokens.run(vit, stream, 1).x)
        seen.same("out.features", vit.head.project(tokens.feature(vit, batch["image"])))
        seen.same("out.logits", method(batch)["logits"])
        assert torch.allclose(vit(batch["image"]), fixture["out.logits"], atol=1e-5)
        folded = vit.head.folded()(tokens.feature(vit, batch["image"]))
        assert torch.allclose(folded, fixture["out.logits"], atol=1e-5)

    names = official_names(method)
    assert set(names.values()) == set(fixture.group("grad.")) == set(c["trainable"])
    parameters = dict(vit.named_parameters())
    frozen = {n: p.clone() for n, p in parameters.items() if not p.requires_grad}
    optimizer = build_optimizer(method.param_groups(1e-4), name="adamw", lr=c["lr"])
    loss = method.train()(batch)["loss"]
    seen.same("out.train_loss", loss)
    loss.backward()
    for name, official in names.items():
        seen.same(f"grad.{official}", parameters[name].grad)
    seen.same("out.grad_norm", torch.nn.utils.clip_grad_norm_([parameters[name] for name in names], 1.0))
    optimizer.step()
    for name, official in names.items():
        seen.same(f"out.after1.{official}", parameters[name])
    with torch.no_grad():
        seen.same("out.logits_after1", method.eval()(batch)["logits"])
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    seen.done()


def seg_parts(fixture) -> tuple[list[seg.Block], seg.DecoderLinear]:
    """The recorded blocks (the later ones using the first one's bottleneck where the checkpoint aliases it) and the
    decoder's linear layer, with the official weights."""
    c, blocks = fixture.config, []
    options = {"prompts": c["num_prompts"], "bottleneck": c["latent_dim"]}
    count = 1 + max(int(name.split(".")[1]) for name in fixture.group("weights.") if name.startswith("blocks."))
    for index in range(count):
        alias = c["shared_keys"].get(f"blocks.{index}.prompt_proj.prompt_gate")
        shared = blocks[int(alias.split(".")[1])].prompt_proj if alias else None
        block = seg.Block(c["dim"], c["heads"], c["sr_ratio"], shared=shared, **options)
        block.load_state_dict(fixture.group(f"weights.blocks.{index}."))
        blocks.append(block)
    head = seg.DecoderLinear(c["dim"], c["decoder_dim"], bottleneck=c["latent_dim"])
    head.load_state_dict(fixture.group("weights.mlp_head."))
    return blocks, head


@pytest.mark.parametrize("path", files("dvpt.seg_block"), ids=lambda p: p.stem)
def test_segformer_blocks_and_decoder(path):
    fixture = read(path)
    seen, hw = Compared(fixture), tuple(fixture.config["hw"])
    blocks, head = seg_parts(fixture)
    x = y = fixture["in.x"].clone().requires_grad_()
    for index, block in enumerate(blocks):
        y = block(y, hw)
        seen.same(f"out.block{index}", y)
    out = head(y)
    seen.same("out.decoder_linear", out)
    scalar = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    seen.same("out.scalar", scalar)
    scalar.backward()
    seen.same("grad.x", x.grad)
    named = {f"blocks.{i}.{n}": p for i, block in enumerate(blocks) for n, p in block.named_parameters()}
    named |= {f"mlp_head.{n}": p for n, p in head.named_parameters()}
    for name, parameter in named.items():
        if "prompt" in name:
            seen.same(f"grad.{name}", parameter.grad)
    seen.done()


@pytest.mark.parametrize("path", files("dvpt.metrics"), ids=lambda p: p.stem)
def test_metrics_losses_schedule_and_positions(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    y, scores = fixture["in.cls_y"].numpy(), fixture["in.cls_logits"].numpy()
    seen.same("out.conf_mat", torch.from_numpy(metrics.confusion(y, scores)))
    seen.same("out.accuracy", torch.tensor(metrics.accuracy(y, scores)))
    seen.same("out.kappa", torch.tensor(metrics.quadratic_kappa(y, scores)))

    logits, masks = fixture["in.seg_logits"].clone().requires_grad_(), fixture["in.seg_y"]
    seen.same("out.dice_from_logits", seg.dice_loss(logits, masks))
    seen.same("out.dice_from_probs_nosoftmax", seg.dice_loss(logits.softmax(1), masks, softmax=False))
    loss = seg.mask_loss(logits, masks, double_softmax=True)
    seen.same("out.official_seg_loss", loss)
    loss.backward()
    seen.same("grad.seg_logits", logits.grad)
    # The authors' foreground is a score of channel 1 of at least 0.5, against class 1.
    truth, found = (masks == 1).numpy(), (logits[:, 1] >= 0.5).numpy()
    both = [100 * metrics.dice(truth, found, least=1), 100 * metrics.iou(truth, found, least=1)]
    seen.same("out.dice_iou_percent", torch.tensor(both))

    s = c["sched"]
    options = {"lr": s["learning_rate"], "warmup": s["warmup_epochs"], "epochs": s["epochs"]}
    rates = [dvpt.released_rate(epoch, **options) for epoch in range(s["epochs"])]
    seen.same("out.lr_used_per_epoch", torch.tensor(rates))
    resized = resample_positions(
        fixture["in.pos"].unsqueeze(0), sides(c["gs_new"]), prefix=1, rule="mae", old_grid=sides(c["gs_old"])
    )
    seen.same("out.pos_resized", resized[0])
    seen.done()
