"""`vitkit caption`: a language model learns to write the text of images (reports, captions) from a frozen ViT's patches.

    vitkit caption --model M --data labels.csv --text_column clinical_notes --out runs/writer
    vitkit caption runs/writer new/ --out texts.csv

In Python: `vitkit.caption(model=..., data=..., text_column=..., out=...)` and `vitkit.caption("runs/writer", "new/")`.
Standard library only until something is to be done: `--help` needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitkit.errors import ConfigError, VitkitError
from vitkit.run import config as configs
from vitkit.settings import Inputs, Machine, Train
from vitkit.text.settings import RECIPE, Settings

GROUPS: dict[str, type] = {"inputs": Inputs, "train": Train, "machine": Machine, "method": Settings}
FREE = frozenset({"workers", "quiet", "save_every"})
KIND = "caption"


def caption(run: Any = None, data: Any = None, *, out: Any = None, **settings: Any) -> Any:
    """Train a writer of texts on images with texts, and score it against what needs no image; or let a trained one write.

    `caption(model=..., data=..., text_column=..., out=...)` trains and returns the run; `caption("runs/writer", "new/")`
    returns {image: text}, and writes them as CSV to `out`. The ViT stays frozen. Reports give ROUGE-L and BLEU-4 with
    intervals beside three baselines: the same writer shown other images, the text of the most similar training image, and
    the most frequent training text.
    """
    if run is not None:
        if settings or data is None:
            raise ConfigError(
                f"caption({str(run)!r}) writes texts for images with a trained writer",
                fix='caption("runs/writer", "new/"), or caption(model=..., data=..., text_column=..., out=...) to train',
            )
        from vitkit.run.captioning_job import write_texts

        return write_texts(run, data, out=out)
    given = {"data": data, "out": out, **settings}
    return train({key: value for key, value in given.items() if value is not None})


def settings_for(given: Mapping[str, Any] | Sequence[str]) -> configs.Config:
    """Resolved settings from keywords or command-line words."""
    import inspect

    description = inspect.cleandoc(caption.__doc__ or "")
    required = ("model", "data", "text_column", "out")
    return configs.build(
        GROUPS, given, prog="vitkit caption", description=description, defaults=RECIPE, required=required
    )


def train(given: Mapping[str, Any] | Sequence[str]) -> Any:
    """Train, or resume, or return the finished run."""
    from vitkit.run.folder import RunFolder
    from vitkit.run.model import Run
    from vitkit.run.starting import resolve

    if isinstance(given, Mapping):
        given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    config = settings_for(given)
    if config.machine.devices != 1:
        raise ConfigError(
            f"devices is {config.machine.devices}, and vitkit caption trains in one process", fix="leave devices out"
        )
    config = resolve(config)
    folder = RunFolder(config.train.out)
    command = "vitkit.caption(...)" if isinstance(given, Mapping) else configs.main_line()
    if folder.claim(config.values, KIND, free=FREE, command=command) == "finished":
        return Run(folder.path)
    try:
        from vitkit.run.captioning_job import caption_job

        caption_job(config, folder)
    except VitkitError:
        folder.abandon()
        raise
    finally:
        folder.release()
    return Run(folder.path)


def command(words: list[str]) -> int:
    """The command line."""
    if words and not words[0].startswith("-"):
        return _write(words)
    run = train(words)
    from vitkit.run.cli import _print_metrics

    _print_metrics(run.summary)
    print(run.path)
    return 0


def _write(words: list[str]) -> int:
    shape = "vitkit caption RUN DATA [--out texts.csv], or vitkit caption --model M --data D --text_column C --out R"
    names = [word for word in words[:2] if not word.startswith("-")]
    rest = words[len(names) :]
    out = rest[1] if len(rest) == 2 and rest[0] == "--out" else None
    if len(names) != 2 or (rest and out is None):
        raise ConfigError(f"vitkit caption does not understand '{' '.join(words)}'", fix=shape)
    for name, text in caption(names[0], names[1], out=out).items():
        print(f"{name}\t{text}")
    return 0
