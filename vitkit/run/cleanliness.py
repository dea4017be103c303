"""`vitkit evaluate --protocols cleanliness`: how clean a model's patch features are, alone or beside another model."""

from __future__ import annotations

from typing import Any

import torch

from vitkit.errors import ConfigError
from vitkit.run.batches import open_data, open_model, speaker
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.settings import CLEANLINESS

TITLE = "Patch features"


def asked(config: Config) -> bool:
    """Whether this evaluation is of cleanliness. Raises ConfigError where it is mixed with other protocols."""
    own = config.own
    if own.protocols == "auto" or CLEANLINESS not in own.protocols:
        if own.before is not None:
            raise ConfigError("before is for the protocol cleanliness", fix="--protocols cleanliness")
        return False
    if set(own.protocols) != {CLEANLINESS}:
        others = ", ".join(name for name in own.protocols if name != CLEANLINESS)
        raise ConfigError(
            f"cleanliness has a report of its own, and {others} was asked for beside it",
            fix="two commands; the second --out may be another folder",
        )
    return True


def cleanliness_job(config: Config) -> dict[str, dict[str, Any]]:
    """{figure: {"name", "value", "low", "high", "n"}} of the model, and with `before` of that one beside it
    ("before", "difference"). With `out`, results.json and a report with pictures are written there."""
    from dataclasses import replace

    from vitkit.evaluate.cleanliness import before_after, measure, note_of
    from vitkit.evaluate.cleanliness_pictures import side_by_side
    from vitkit.evaluate.feature_maps import picture
    from vitkit.run.measure import _home, device_of

    machine = config.machine
    device, say = device_of(machine, "evaluate"), speaker(machine.quiet)
    with torch.random.fork_rng(devices=[]), _home(config, "evaluate") as folder:
        images = open_data(config.inputs, say)
        vit: Any = open_model(config.inputs, seed=machine.seed, say=say).eval()
        if config.own.before is None:
            one = measure(vit, images, device=device, seed=machine.seed)
            size = (int(vit.passport.preprocess.image_size[0]), int(vit.passport.preprocess.image_size[1]))
            shown = [picture(vit, images, int(one.scored[row]), size) for row in one.shown]
            rows, columns = side_by_side({"model": one}, shown)
            tables, differences = [], {}
            verdict = f"{one.verdict()} ({note_of(one)})"
        else:
            inputs = replace(config.inputs, model=config.own.before)
            first: Any = open_model(inputs, seed=machine.seed, say=say).eval()
            found = before_after(first, vit, images, device=device, seed=machine.seed)
            one, rows, columns = found.after, found.pictures, found.columns
            tables, verdict, differences = found.tables, found.verdict, found.differences
        entries = {key: _entry(figure, one, differences.get(key)) for key, figure in one.figures.items()}
        if folder is not None:
            _write(folder, entries, tables, rows, columns, verdict, config, vit)
            say(f"report: {folder.path / 'report.html'}")
    return entries


def _entry(figure: Any, one: Any, difference: Any) -> dict[str, Any]:
    found = figure.interval(one.groups, one.seed)
    entry = {"name": figure.name, "value": found.value, "low": found.low, "high": found.high, "n": len(figure.rows)}
    if difference is not None:
        entry |= {"before": difference.b, "difference": difference.value, "difference_low": difference.low}
        entry |= {"difference_high": difference.high}
    return entry


def _write(
    folder: RunFolder,
    entries: dict[str, dict[str, Any]],
    tables: list[dict[str, Any]],
    rows: list[list[tuple[Any, str]]],
    columns: list[str],
    verdict: str,
    config: Config,
    vit: Any,
) -> None:
    from vitkit.run.clean_report import NOTE
    from vitkit.run.measure import write_results
    from vitkit.run.report import run_report

    content = {
        "figures": entries,
        "model": config.inputs.model,
        "before": config.own.before,
        "data": config.inputs.data,
    }
    write_results(folder.path / "results.json", content)
    vit.passport.save(folder.path)
    if rows:
        folder.save_pictures(TITLE, rows, columns=columns, note=NOTE)
    keys = ("name", "value", "low", "high", "n")
    metrics = [] if tables else [{key: one[key] for key in keys} | {"split": ""} for one in entries.values()]
    folder.finish(
        {"verb": "evaluate", "task": CLEANLINESS, "verdict": f"{verdict}.", "metrics": metrics, "tables": tables}
    )
    run_report(folder)
