"""`vitkit <verb> [method] [settings]`: parses words, calls the Python function of the same name, prints the result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from vitkit.errors import ConfigError, VitkitError, nearest

HELP = """vitkit: pre-train further, adapt, explain, attack and measure Vision Transformers on your own images.

  vitkit adapt adaptformer --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/a
  vitkit predict runs/a new/

verbs
  pretrain METHOD    train on images without labels                 --model --data --out
  adapt METHOD       adapt to labelled images                       --model --data --out
  clean METHOD       remove position artefacts from patch features  --model --data --out
  anomaly METHOD     find defects, learning from good parts only    --model --data --out
  explain            where a model looks: maps, patches, one page   MODEL IMAGES [--classes a,b] [--out]
  explain METHOD     adapt to a model that explains itself          --model --data --out
  attack             is it fooled through its public trunk?         MODEL --data [--eps 8/255] [--out]
  attack harden      train against such images                      --model --data --out
  evaluate           kNN, probes, few-shot, PEFT, masks: one table  --model --data [--protocols knn,lora,...] [--out]
  scaling            what larger inputs and backbones buy           --models A,B --sizes 96,224 --data [--out]
  embed              features of every image, with a gallery        --model --data --out
  predict            classes of new images, masks of new volumes    RUN DATA [--out predictions.csv or FOLDER]
  compare            runs side by side, paired on the same images   RUN RUN [RUN ...] [--out compare.html]
  compare            did it help? models on your images             A B [C ...] --data D[,D2] [--general] [--out]
  rl METHOD          games: frames, an agent on a ViT, probes       collect | rainbow | imitate | look [--help]
  slides             whole slides: tiles, features, a label each   embed | evaluate | predict [--help]
  caption            text of images: reports, captions              --model --data --text_column --out
  report             write a run's report again                     RUN
  export             one file without vitkit                        RUN [--format safetensors|onnx] [--out FILE]
  check              look through a data set before training        DATA
  methods            every method with its paper                    [VERB]
  doctor             what this machine offers
  demo               the main job on bundled handwriting            [--out runs/demo]

`vitkit VERB --help` and `vitkit VERB METHOD --help` explain; settings may also come from --config FILE.yaml.
Files and weights stay on this machine: vitkit sends nothing anywhere."""


SHAPE = "vitkit {} MODEL IMAGES [--out DIR] [--setting value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of ours are printed as text, without a traceback. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except VitkitError as error:
        print(f"vitkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"vitkit: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vitkit methods | head`
        sys.stderr.close()
        return 0


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] in ("-V", "--version"):
        from vitkit import __version__

        print(f"vitkit {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        close = nearest(verb, VERBS)
        raise ConfigError(f"there is no verb '{verb}'", fix=f"did you mean {close[0]}?" if close else "vitkit --help")
    return VERBS[verb](rest)


def _train(verb: str) -> Callable[[list[str]], int]:
    def run(words: list[str]) -> int:
        from vitkit.run import discover

        if not words or words[0] in ("-h", "--help"):
            print(f"vitkit {verb} METHOD --model M --data D --out R [--setting value ...]\n\n{_listed(verb)}")
            return 0
        if words[0].startswith("-"):
            names = ", ".join(method.name for method in discover.trainable(verb))
            raise ConfigError(f"vitkit {verb} needs a method before its settings", fix=f"one of: {names}")
        return _run_training(verb, words[0], words[1:])

    return run


def _listed(verb: str) -> str:
    """The methods of a verb that train, for its help."""
    from vitkit.run import discover

    lines = [f"  {m.name:<13}{m.summary.partition(': ')[2] or m.summary}" for m in discover.trainable(verb)]
    return "\n".join(["methods", *lines, "", f"`vitkit {verb} METHOD --help` lists every setting."])


def _run_training(verb: str, method: str, words: list[str]) -> int:
    from vitkit.run import discover, verbs

    if _asks_help(words):
        verbs.settings_for(verb, discover.find(verb, method).name, ["--help"])
    finished = verbs.train(verb, method, words)
    _print_metrics(finished.summary)
    print(f"{finished.path}")
    return 0


def _with_model(verb: str) -> Callable[[list[str]], int]:
    """`vitkit explain MODEL DATA ...`, or a method of that verb that trains."""

    def run(words: list[str]) -> int:
        from importlib import import_module

        from vitkit.run import discover, verbs

        known = [method.name for method in discover.trainable(verb)]
        if not words or words[0] in ("-h", "--help"):
            print(f"{SHAPE.format(verb)}\n\n{verbs.verb_doc(verb)}\n")
            print(f"to train: vitkit {verb} METHOD --model M --data D --out R\n{_listed(verb)}")
            if words:
                print()
                verbs.settings_for(verb, None, ["--help"])
            return 0
        if words[0].replace("-", "_") in known:
            return _run_training(verb, words[0], words[1:])
        config = verbs.settings_for(verb, None, flagged(verb, words))
        found = getattr(import_module(f"vitkit.run.{verb}ing"), f"{verb}_job")(config)
        print(found["verdict"])
        print(found["report"])
        return 0

    return run


def flagged(verb: str, words: Sequence[str]) -> list[str]:
    """The first words of `vitkit explain MODEL DATA ...` with the flags that they stand for."""
    from vitkit.run.verbs import ATTACK, not_a_method

    rest = list(words[1:] if verb == "attack" and words[:1] == [ATTACK] else words)
    names, flags = ["--model", "--data"], []
    while rest and not rest[0].startswith("-"):
        if not names:
            raise ConfigError(f"vitkit {verb} takes 2 names, and '{rest[0]}' is one more", fix=SHAPE.format(verb))
        flags += [names.pop(0), rest.pop(0)]
    given = [word.partition("=")[0] for word in rest]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag in given:
            raise not_a_method(verb, value, f"'{value}' is read as {flag}, which is given again")
    return [*flags, *rest]


def _evaluate(words: list[str]) -> int:
    from vitkit.run import verbs
    from vitkit.run.measure import evaluate_job

    config = verbs.settings_for("evaluate", None, words)
    verbs.check_protocols(config.own.protocols)
    results = evaluate_job(config)
    for name, found in results.items():
        print(f"{name:<{max(map(len, results)) + 2}}" + _metric_words(found))
    return 0


def _scaling(words: list[str]) -> int:
    from vitkit.run.scaling import scaling_job, settings_for

    found = scaling_job(settings_for(words))
    print(found["verdict"])
    print(found["report"])
    return 0


def _embed(words: list[str]) -> int:
    from vitkit.run import verbs
    from vitkit.run.measure import embed_job

    config = verbs.settings_for("embed", None, words)
    found = embed_job(config)
    if hasattr(found, "windows"):
        print(f"{found.windows} windows of {found.videos} videos, {found.dim} values each: {found.out}/features/*.npy")
        return 0
    if hasattr(found, "shards"):
        left = f", {len(found.skipped)} files left out" if found.skipped else ""
        where = f"{found.out}/features/, {found.shards} Parquet shards; manifest.json"
        print(f"{found.rows} images, {found.dim} values each{left}: {where}")
        return 0
    print(f"{len(found)} images, {found.shape[1]} values each: {config.own.out}/features.npy, images.csv, gallery.html")
    return 0


def _predict(words: list[str]) -> int:
    numeric = ("batch_size", "workers", "clips", "crops")
    given = _words(words, "predict RUN DATA", positional=2, options=("out", "detector", *numeric))
    from vitkit.run import verbs

    numbers = {key: int(value) for key, value in given.items() if key in numeric}
    found = verbs.predict(given["0"], given["1"], out=given.get("out"), detector=given.get("detector"), **numbers)
    print(found.table().to_csv(index=False), end="")
    return 0


def _compare(words: list[str]) -> int:
    from vitkit.run import verbs

    if _asks_help(words):
        from vitkit.run import helped

        print("vitkit compare RUN RUN [RUN ...] [--out compare.html]")
        print("vitkit compare A B [C ...] --data D[,D2,...] [--setting value ...]\n")
        helped.settings_for(["--help"])
    if any(word == "--data" or word.startswith("--data=") for word in words):
        from vitkit.run import helped

        shape = "vitkit compare A B [C ...] --data D[,D2,...] [--general G] [--out DIR] [--setting value ...]"
        flags = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        if flags < 2:
            raise ConfigError(f"vitkit compare takes 2 models or more before --data, got {flags}", fix=shape)
        result = helped.compare_models(words[:flags], words[flags:])
    else:
        given = _words(words, "compare RUN RUN", positional=2, options=("out",), more=True)
        runs = [value for key, value in given.items() if key.isdigit()]
        result = verbs.compare(runs[0], runs[1], *runs[2:], out=given.get("out"))
    print(result["verdict"])
    print(result["report"])
    return 0


def _report(words: list[str]) -> int:
    from vitkit.run import verbs

    print(verbs.report(_words(words, "report RUN", positional=1)["0"]))
    return 0


def _export(words: list[str]) -> int:
    given = _words(words, "export RUN", positional=1, options=("format", "out"))
    from vitkit.run import verbs

    print(verbs.export(given["0"], format=given.get("format", "safetensors"), out=given.get("out")))
    return 0


def _check(words: list[str]) -> int:
    given = _words(words, "check DATA", positional=1, options=("data",), first="data")
    from vitkit.run import verbs

    found = verbs.check(given.get("data") or given["0"])
    print(found.text())
    return 0 if found.ok else 1


def _methods(words: list[str]) -> int:
    given = _words(words, "methods [VERB]", positional=0, more=True)
    from vitkit.run import discover

    verb = given.get("0")
    if verb is not None and verb not in discover.VERBS:
        raise ConfigError(f"there is no verb '{verb}' with methods", fix=f"one of: {', '.join(discover.VERBS)}")
    for method in discover.methods(verb):
        print(f"{method.verb:<9}{method.name:<15}{method.summary}")
        if method.paper:
            print(f"{'':<24}{method.paper}")
    return 0


def _slides(words: list[str]) -> int:
    from vitkit.run import slides

    return slides.command(words)


def _rl(words: list[str]) -> int:
    from vitkit.run import playing

    return playing.command(words)


def _caption(words: list[str]) -> int:
    from vitkit.run import captioning

    return captioning.command(words)


def _doctor(words: list[str]) -> int:
    _words(words, "doctor", positional=0)
    from vitkit.run import verbs

    rows = verbs.doctor()
    for what, found, advice in rows:
        print(f"{what:<18}{found}" + (f"\n{'':<18}-> {advice}" if advice else ""))
    return 0


def _demo(words: list[str]) -> int:
    given = _words(words, "demo", positional=0, options=("out", "seeds"), switches=("quick",))
    from vitkit.run import verbs

    print(
        verbs.demo(out=given.get("out", "runs/demo"), seeds=int(given.get("seeds", 3)), quick="quick" in given),
    )
    return 0


def _asks_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def _words(
    words: Sequence[str],
    usage: str,
    *,
    positional: int,
    options: Sequence[str] = (),
    switches: Sequence[str] = (),
    more: bool = False,
    first: str | None = None,
) -> dict[str, str]:
    """Positional words under "0", "1", ... and options by name, for verbs with a handful of them."""
    shape = "vitkit " + usage + "".join(f" [--{o} ...]" for o in options) + "".join(f" [--{s}]" for s in switches)
    verb = usage.split()[0]
    if _asks_help(words):
        from vitkit.run import verbs

        print(f"{shape}\n\n{verbs.verb_doc(verb)}")
        raise SystemExit(0)
    found: dict[str, str] = {}
    rest, count = list(words), 0
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            found[str(count)] = word
            count += 1
            continue
        name, equal, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in switches:
            found[name] = "true"
            continue
        if name not in options:
            close = nearest(name, [*options, *switches])
            raise ConfigError(
                f"vitkit {verb} has no option --{name}", fix=f"did you mean --{close[0]}?" if close else shape
            )
        if not equal and not rest:
            raise ConfigError(f"--{name} needs a value", fix=shape)
        found[name] = value if equal else rest.pop(0)
    if first and first in found:
        count += 1
    if count < positional or (count > positional and not more):
        raise ConfigError(f"vitkit {verb} takes {positional} names, got {count}", fix=shape)
    return found


def _print_metrics(summary: dict) -> None:
    for metric in summary.get("metrics", []):
        print(f"{metric['split']} {metric['name']:<24}" + _metric_words(metric))


def _metric_words(found: dict) -> str:
    value, low, high = found.get("value"), found.get("low"), found.get("high")
    interval = f"  ({low:.4f} to {high:.4f})" if low is not None and low == low else ""
    name = f"{found['name']} " if "chosen" in found else ""
    chosen = f"  {found['chosen']}" if found.get("chosen") else ""
    return f"{name}{value:.4f}{interval}  n={found.get('n')}{chosen}"


VERBS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": _train("pretrain"),
    "adapt": _train("adapt"),
    "clean": _train("clean"),
    "anomaly": _train("anomaly"),
    "explain": _with_model("explain"),
    "attack": _with_model("attack"),
    "evaluate": _evaluate,
    "scaling": _scaling,
    "embed": _embed,
    "predict": _predict,
    "compare": _compare,
    "slides": _slides,
    "caption": _caption,
    "rl": _rl,
    "report": _report,
    "export": _export,
    "check": _check,
    "methods": _methods,
    "doctor": _doctor,
    "demo": _demo,
}
