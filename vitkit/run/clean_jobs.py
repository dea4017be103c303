"""`vitkit clean` for a method that is one loss over one data set: the ordinary loop, then a measure of what it changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkit.errors import DataError
from vitkit.run import discover
from vitkit.run.batches import held_out_loss, open_data, open_model, prepare_for, speaker
from vitkit.run.clean_report import add_cleanliness
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.results import finish, loss_metrics, minutes, save_model


def distil_job(fabric: Any, verb: str, name: str, config: Config) -> None:
    """Train on everything but validation and test images, without labels; then `method.teacher` is measured against what
    `method.finish()` gives."""
    from vitkit.run.jobs import _fit, _summary, require_kind

    inputs, train, machine = config.inputs, config.train, config.machine
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    kind = discover.method_class(discover.load(verb, name))
    images = open_data(inputs, say)
    used = images.part("train", "unlabelled")
    held_out = images.part("val") if len(images.part("val")) else images.part("test")
    if not len(used):
        raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0, drop_path_rate=train.drop_path)
    require_kind(kind, vit, f"{verb} {name}")
    if vit.passport.base.get("kind") == "random":
        say("WARNING: the model has random weights, so there is nothing to clean (leave pretrained at true)")
    method = kind(vit, config.method)
    for note in method.notes:
        say(note)
    method.require(len(used), machine.batch_size, fabric.world_size)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    total = sum(p.numel() for p in method.vit.parameters())
    say(f"{trained:,} of {total:,} weights train ({trained / total:.2%})")
    preprocess = vit.passport.preprocess
    view, test_view = method.views(preprocess, train)
    folder, prepare = RunFolder(train.out), prepare_for(preprocess, fabric.device)

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        found = held_out_loss(model, held_out, test_view, prepare, machine)
        return -found, {"val_loss": found}

    checks = validate if len(held_out) else None
    state = _fit(fabric, method, used, view, prepare, config, folder, validate=checks, keep_best=False)
    if first:
        method.eval()
        summary = {**_summary(verb, name, method, state), "trained_parameters": trained, "total_parameters": total}
        vit = method.finish()
        save_model(folder, method, vit, name=f"{verb}.{name}", config=config, images=images, adapted=False)
        records = [record for record in folder.records() if "val_loss" in record]
        summary["metrics"] = loss_metrics(method, used, held_out, preprocess, prepare, machine, records)
        verdict = add_cleanliness(
            folder, summary, method.teacher, vit, images, device=fabric.device, seed=machine.seed, say=say
        )
        summary["verdict"] = f"Cleaned on {len(used):,} images in {state.step:,} steps, {minutes(state.seconds)}"
        summary["verdict"] += f": {verdict}." if verdict else "."
        finish(folder, summary, state, say)
    fabric.barrier()
