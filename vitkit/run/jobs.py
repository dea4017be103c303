"""What a training run does from settings to a finished folder: the bodies of every verb that trains.

Each job runs in every process of the run; only the first one writes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vitkit.data.images import Images
from vitkit.data.transforms import eval_view, finetune_view, pretrain_view
from vitkit.errors import ConfigError, DataError
from vitkit.run import collapse, discover, sharding
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
from vitkit.run.fabric import make_fabric, processes
from vitkit.run.folder import RunFolder
from vitkit.run.guard import Guard
from vitkit.run.loop import fit
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
    train = config.groups["train"]
    if train.shard:
        kind = discover.method_class(discover.load(verb, name))
        sharding.require(kind, f"{verb} {name}", processes(config.machine), train.compile)
    fabric = make_fabric(config.machine, train.shard)
    if type(fabric.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        # Only plain values travel to new processes; each builds its own data and model from them.
        fabric.launch(_job, verb, name, plain(config.values))
        return
    fabric.launch()
    with torch.random.fork_rng():  # a Python caller's own random numbers stay as they were
        _run(fabric, verb, name, config)


def _job(fabric: Any, verb: str, name: str, values: dict[str, Any]) -> None:
    from vitkit.run.starting import groups_for

    _run(fabric, verb, name, assemble(groups_for(verb, name)[0], values))


def _run(fabric: Any, verb: str, name: str, config: Config) -> None:
    job = supervised_job if discover.find(verb, name).labels else pretrain_job
    own = getattr(discover.method_class(discover.load(verb, name)), "job", None)
    if own is not None:  # "module:function" of a method whose work is not one loss over one data set
        module, _, function = own.partition(":")
        job = getattr(importlib.import_module(module), function)
    job(fabric, verb, name, config)


def pretrain_job(fabric: Any, verb: str, name: str, config: Config) -> None:
    """Self-supervised training: everything but validation and test images, no labels."""
    inputs, train, machine = config.inputs, config.train, config.machine
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    kind = discover.method_class(discover.load(verb, name))
    images = open_data(inputs, say, getattr(kind, "reads", None))
    used = images.part("train", "unlabelled")
    held_out = images.part("val") if len(images.part("val")) else images.part("test")
    if not len(used):
        raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0, drop_path_rate=train.drop_path)
    require_kind(kind, vit, f"{verb} {name}")
    method = _built(kind, vit, config, used, fabric.world_size, say)
    preprocess = vit.passport.preprocess
    view, test_view = _views(method, preprocess, train)
    folder = RunFolder(train.out)
    prepare = prepare_for(preprocess, fabric.device)

    guarded = getattr(method, "guarded", False)
    guard = Guard.of(method, images, machine, fabric.device, say, train.hflip) if guarded and first else None

    def validate(model: nn.Module) -> tuple:
        known = {"val_loss": held_out_loss(model, held_out, test_view, prepare, machine)} if len(held_out) else {}
        if guard is None:
            return -known.get("val_loss", 0.0), known
        score, seen, reason = guard.check(model)
        return score, known | seen, reason

    checks = validate if len(held_out) or guarded else None
    state = _fit(fabric, method, used, view, prepare, config, folder, validate=checks, keep_best=guarded)
    if first:
        method.eval()
        summary = _summary(verb, name, method, state)
        given_back = guard.settle(method, state) if guard is not None else False
        vit = method.finish()
        save_model(folder, method, vit, name=f"{verb}.{name}", config=config, images=images, adapted=False)
        shown = held_out if len(held_out) else used
        records = [r for r in folder.records() if "val_loss" in r]
        summary["metrics"] = loss_metrics(method, used, held_out, preprocess, prepare, machine, records)
        if hasattr(method, "reconstruct"):
            save_reconstructions(folder, method, shown, preprocess, prepare, machine)
        summary["verdict"] = pretrain_verdict(summary, len(used), state)
        if guard is not None:
            words, table = guard.verdict(vit, images, inputs, given_back, state)
            summary["verdict"] += f" {words}"
            summary["tables"].append(table)
        if hasattr(method, "doctor"):
            summary["tables"].append(collapse.table(method.doctor().replay(folder.records())))
        finish(folder, summary, state, say)
    fabric.barrier()


def _built(kind: type, vit: nn.Module, config: Config, used: Images, world: int, say: Any) -> nn.Module:
    """The method on `vit`, its heads gone on with where the weights bring them; what it cannot learn from is refused before
    anything is written, what is unwise is said."""
    method = kind(vit, config.method)
    if hasattr(method, "adopt") and getattr(method, "adopts", "mask_token") in vit.extras:
        say(method.adopt(vit.extras))
    for note in getattr(method, "notes", ()):
        say(note)
    if hasattr(method, "require"):
        method.require(len(used), config.machine.batch_size, world)
    if used.kind == "volume":
        from vitkit.run.volume_jobs import smaller_than_crop

        for sentence in smaller_than_crop(used, vit.passport.preprocess):
            say(sentence)
    if len(used) < 5000 and vit.passport.base.get("kind") == "random":
        say(
            f"{len(used)} images are few to pre-train from random weights: continuing from released weights "
            "usually does better (leave pretrained at true)"
        )
    return method


def _views(method: nn.Module, preprocess: Any, train: Any) -> tuple[Any, Any]:
    """(of training, of evaluation): the method's own, or a random crop and the centre."""
    if hasattr(method, "views"):
        return method.views(preprocess, train)
    plain = eval_view(preprocess)
    return pretrain_view(preprocess, scale=train.crop_scale, hflip=train.hflip) if train.augment else plain, plain


def supervised_job(fabric: Any, verb: str, name: str, config: Config) -> None:
    """Training on labelled images: train on train, choose on val, read the test split once."""
    inputs, train, machine, classify = config.inputs, config.train, config.machine, config.classify
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    kind = discover.method_class(discover.load(verb, name))
    images = open_data(inputs, say)
    data = labelled_parts(images, inputs, machine, say)
    torch.manual_seed(machine.seed)
    keeps = getattr(kind, "keeps_head", False)  # goes on with the classes that the model already knows
    head = None if keeps or getattr(config.method, "label_map", None) else 0
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=head, drop_path_rate=train.drop_path)
    require_kind(kind, vit, f"{verb} {name}")
    task = Task(images.task, tuple(images.classes))
    if keeps and vit.passport.classes and tuple(vit.passport.classes) != task.classes:
        raise DataError(
            f"{images.name} has the classes {_few(task.classes)}, the model {_few(vit.passport.classes)}",
            fix="the data that the model was adapted to, or a model without a head",
        )
    method = kind(vit, config.method, task=task, classify=classify)
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
    main = chosen_metric(classify.metric, task.kind)

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        from vitkit.evaluate.metrics import summary

        scores = predict_scores(model, data.val, eval_view(preprocess), prepare, machine)
        found = summary(task.kind, data.val.labels, scores, also=main)
        return found[main], {f"val_{key}": value for key, value in found.items()}

    checks, best = validate if len(data.val) else None, classify.select == "best"
    state = _fit(fabric, method, data.train, view, prepare, config, folder, validate=checks, keep_best=best)
    if first:
        method.eval()
        save_model(folder, method, vit, name=f"{verb}.{name}", config=config, images=images, adapted=True)
        summary = _summary(verb, name, method, state)
        judge(folder, summary, method, data, task, preprocess, prepare, machine, main)
        summary["verdict"] = adapt_verdict(summary, state, len(data.train))
        finish(folder, summary, state, say)
    fabric.barrier()


def _fit(
    fabric: Any,
    method: nn.Module,
    images: Images,
    view: Any,
    prepare: Any,
    config: Config,
    folder: RunFolder,
    **more: Any,
) -> Any:
    """The loop over `images`, with progress on the terminal of the first process."""
    train, machine = config.train, config.machine
    steps, drop_last = epoch_steps(len(images), machine, fabric.world_size)
    batches = batches_of(
        images,
        view,
        machine,
        max_bad=train.max_bad,
        rank=fabric.global_rank,
        world=fabric.world_size,
        drop_last=drop_last,
    )
    quiet = machine.quiet or not fabric.is_global_zero
    with Progress(steps * train.epochs, machine.batch_size, steps_per_epoch=steps, quiet=quiet) as progress:
        return fit(
            method,
            batches,
            train=train,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=steps,
            prepare=prepare,
            folder=folder,
            progress=progress,
            **more,
        )


def require_kind(method: type, vit: nn.Module, what: str) -> None:
    """Raise ConfigError where a method does not take models of this kind (`kinds` of its class; by default images)."""
    kinds = getattr(method, "kinds", ("image",))
    if vit.passport.preprocess.kind not in kinds:
        raise ConfigError(
            f"{what} is for models of {' and '.join(kinds)}s, and {vit.passport.arch} takes {vit.passport.preprocess.kind}s",
            fix="vitkit methods tells what each method takes",
        )


def count_parameters(method: nn.Module) -> tuple[int, int]:
    """(trainable, all) weights of a method."""
    sizes = [(p.numel(), p.requires_grad) for p in method.parameters()]
    return sum(n for n, on in sizes if on), sum(n for n, _ in sizes)


def chosen_metric(asked: str, task: str) -> str:
    """The metric that validation picks an epoch by; refuses one that the task does not have."""
    from vitkit.evaluate.metrics import NAMES, main_metric

    if asked == "auto":
        return main_metric(task)
    if asked not in NAMES[task]:
        words = {"single": "one label an image", "multi": "many labels an image"}[task]
        raise ConfigError(f"metric={asked} is not defined for {words}", fix=f"one of: auto, {', '.join(NAMES[task])}")
    return asked


def _few(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _summary(verb: str, name: str, method: nn.Module, state: Any) -> dict:
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
