"""What a training run does from settings to a finished folder: the bodies of `vitkit pretrain` and `vitkit adapt`.

Each job runs in every process of the run; only the first one writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkit.data.transforms import eval_view, finetune_view, pretrain_view
from vitkit.errors import DataError
from vitkit.run import discover
from vitkit.run.batches import (
    batches_of,
    epoch_steps,
    held_out_loss,
    labelled_parts,
    open_data,
    open_model,
    predict_scores,
    prepare_for,
    speaker,
)
from vitkit.run.config import Config, assemble, plain
from vitkit.run.folder import RunFolder
from vitkit.run.loop import fit, make_fabric
from vitkit.run.progress import Progress
from vitkit.run.results import (
    adapt_verdict,
    finish,
    judge,
    loss_metrics,
    pretrain_verdict,
    save_model,
    save_reconstructions,
)
from vitkit.settings import Task


def run_job(verb: str, name: str, config: Config) -> None:
    """Train in as many processes as the settings say; returns when every one is done."""
    fabric = make_fabric(config.machine)
    if type(fabric.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        # Only plain values travel to new processes; each builds its own data and model from them.
        fabric.launch(_job, verb, name, plain(config.values))
        return
    fabric.launch()
    with torch.random.fork_rng():  # a Python caller's own random numbers stay as they were
        JOBS[verb](fabric, name, config)


def _job(fabric: Any, verb: str, name: str, values: dict[str, Any]) -> None:
    from vitkit.run.verbs import groups_for

    JOBS[verb](fabric, name, assemble(groups_for(verb, name)[0], values))


def pretrain_job(fabric: Any, name: str, config: Config) -> None:
    """Self-supervised training: everything but validation and test images, no labels."""
    inputs, train, machine = config.inputs, config.train, config.machine
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    images = open_data(inputs, say)
    used = images.part("train", "unlabelled")
    held_out = images.part("val") if len(images.part("val")) else images.part("test")
    if not len(used):
        raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0, drop_path_rate=train.drop_path)
    module = discover.load("pretrain", name)
    method = discover.method_class(module)(vit, config.method)
    if hasattr(method, "adopt") and "mask_token" in vit.extras:
        say(method.adopt(vit.extras))
    preprocess = vit.passport.preprocess
    if len(used) < 5000 and vit.passport.base.get("kind") == "random":
        say(
            f"{len(used)} images are few to pre-train from random weights: continuing from released weights "
            "usually does better (leave pretrained at true)"
        )
    view = (
        pretrain_view(preprocess, scale=train.crop_scale, hflip=train.hflip) if train.augment else eval_view(preprocess)
    )
    folder = RunFolder(train.out)
    prepare = prepare_for(preprocess, fabric.device)
    steps, drop_last = epoch_steps(len(used), machine, fabric.world_size)

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        loss = held_out_loss(model, held_out, eval_view(preprocess), prepare, machine)
        return -loss, {"val_loss": loss}

    quiet = machine.quiet or not first
    with Progress(steps * train.epochs, machine.batch_size, steps_per_epoch=steps, quiet=quiet) as progress:
        state = fit(
            method,
            batches_of(
                used,
                view,
                machine,
                max_bad=train.max_bad,
                rank=fabric.global_rank,
                world=fabric.world_size,
                drop_last=drop_last,
            ),
            train=train,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=steps,
            prepare=prepare,
            folder=folder,
            validate=validate if len(held_out) else None,
            keep_best=False,
            progress=progress,
        )
    if first:
        method.eval()
        save_model(folder, method, vit, name=f"pretrain.{name}", config=config, images=images, adapted=False)
        summary = _summary("pretrain", name, config, method, state)
        shown = held_out if len(held_out) else used
        records = [r for r in folder.records() if "val_loss" in r]
        summary["metrics"] = loss_metrics(method, used, held_out, preprocess, prepare, machine, records)
        if hasattr(method, "reconstruct"):
            save_reconstructions(folder, method, shown, preprocess, prepare, machine)
        summary["verdict"] = pretrain_verdict(summary, len(used), state)
        finish(folder, summary, state, say)
    fabric.barrier()


def adapt_job(fabric: Any, name: str, config: Config) -> None:
    """Supervised adaptation: train on train, choose on val, read the test split once."""
    inputs, train, machine, classify = config.inputs, config.train, config.machine, config.classify
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    images = open_data(inputs, say)
    data = labelled_parts(images, inputs, machine, say)
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0, drop_path_rate=train.drop_path)
    module = discover.load("adapt", name)
    task = Task(images.task, tuple(images.classes))
    method = discover.method_class(module)(vit, config.method, task=task, classify=classify)
    trainable, total = count_parameters(method)
    say(f"{trainable:,} of {total:,} weights train ({trainable / total:.2%})")
    preprocess = vit.passport.preprocess
    view = (
        finetune_view(preprocess, scale=train.crop_scale, hflip=train.hflip, randaug=train.randaug)
        if train.augment
        else eval_view(preprocess)
    )
    folder = RunFolder(train.out)
    prepare = prepare_for(preprocess, fabric.device)
    steps, drop_last = epoch_steps(len(data.train), machine, fabric.world_size)

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        from vitkit.evaluate.metrics import main_metric, summary

        scores = predict_scores(model, data.val, eval_view(preprocess), prepare, machine)
        found = summary(task.kind, data.val.labels, scores)
        return found[main_metric(task.kind)], {f"val_{key}": value for key, value in found.items()}

    quiet = machine.quiet or not first
    with Progress(steps * train.epochs, machine.batch_size, steps_per_epoch=steps, quiet=quiet) as progress:
        state = fit(
            method,
            batches_of(
                data.train,
                view,
                machine,
                max_bad=train.max_bad,
                rank=fabric.global_rank,
                world=fabric.world_size,
                drop_last=drop_last,
            ),
            train=train,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=steps,
            prepare=prepare,
            folder=folder,
            validate=validate if len(data.val) else None,
            keep_best=classify.select == "best",
            progress=progress,
        )
    if first:
        method.eval()
        save_model(folder, method, vit, name=f"adapt.{name}", config=config, images=images, adapted=True)
        summary = _summary("adapt", name, config, method, state)
        judge(folder, summary, method, data, task, preprocess, prepare, machine)
        summary["verdict"] = adapt_verdict(summary, state, len(data.train))
        finish(folder, summary, state, say)
    fabric.barrier()


def count_parameters(method: nn.Module) -> tuple[int, int]:
    """(trainable, all) weights of a method."""
    sizes = [(p.numel(), p.requires_grad) for p in method.parameters()]
    return sum(n for n, on in sizes if on), sum(n for n, _ in sizes)


def _summary(verb: str, name: str, config: Config, method: nn.Module, state: Any) -> dict:
    trainable, total = count_parameters(method)
    return {
        "verb": verb,
        "method": name,
        "metrics": [],
        "tables": [],
        "confusion": None,
        "trained_parameters": trainable,
        "total_parameters": total,
        "seconds": round(state.seconds, 2),
        "steps": state.step,
        "best_step": state.best_step,
    }


JOBS = {"pretrain": pretrain_job, "adapt": adapt_job}
