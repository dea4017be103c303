"""What a name stands for: a timm model, a hub id, or a bare class with keywords, as a `Source`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitkit.errors import WeightsError, nearest
from vitkit.parts import architecture, configs
from vitkit.parts.adapt_tensors import ViT
from vitkit.parts.configs import BARE
from vitkit.parts.sources import HUB, Report, Source, preprocess_of, split_head


def from_name(
    ref: str, arch_kwargs: Mapping[str, Any] | None, *, pretrained: bool, drop_path_rate: float, report: Report
) -> Source:
    """A timm name (with its tag), a hub id, or a bare class with `arch_kwargs`."""
    said = configs.parse_config(arch_kwargs or {}, "arch_kwargs", strict=True)
    name, kwargs, hub = ref.removeprefix("timm/"), said.kwargs, ref.startswith(HUB)
    if name in BARE:
        if pretrained:
            raise WeightsError(
                f"{name} is a bare class and has no pre-trained weights", fix="pretrained=False (--pretrained false)"
            )
        return _random(name, name, kwargs, said.pixels, None, report)
    if hub:
        arch, cfg, own = _hub_config(name)
        kwargs = {**own, **kwargs}
    else:
        arch, cfg = name.split(".")[0], _timm_config(name)
    if "dinov3" in arch and "global_pool" not in kwargs:
        kwargs = {**kwargs, "global_pool": "token"}
        report("DINOv3: the feature is the class token, as upstream; timm's own default is the average of the patches")
    pixels = {k: cfg[k] for k in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if cfg.get(k) is not None}
    pixels |= said.pixels
    plan = architecture.build(arch, kwargs, meta=True)  # refuses what is no ViT before anything is downloaded
    if not pretrained:
        return _random(name, arch, kwargs, pixels, None, report)
    native = _download(name, arch, kwargs, drop_path_rate)
    state, head = split_head({key: value.detach() for key, value in native.state_dict().items()})
    native.reset_classifier(0)
    licence = cfg.get("license")
    report(f"{name}: pre-trained weights from timm" + (f", licence {licence}" if licence else ""))
    base = {"kind": "timm", "ref": name, "load": {"arch_kwargs": kwargs}}
    prepared = preprocess_of(pixels, plan, report)
    return Source(arch, kwargs, prepared, base, state=state, head=head, licence=licence, native=plan, ready=native)


def _random(
    ref: str, arch: str, kwargs: dict[str, Any], pixels: Mapping[str, Any], licence: str | None, report: Report
) -> Source:
    report(f"{ref}: random weights")
    plan = architecture.build(arch, kwargs, meta=True)
    base = {"kind": "random", "ref": ref, "load": {"arch_kwargs": kwargs, "pretrained": False}}
    return Source(arch, kwargs, preprocess_of(pixels, plan, report), base, licence=licence)


def _timm_config(name: str) -> dict[str, Any]:
    timm = configs.zoo()
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        close = nearest(arch, timm.list_models())
        raise WeightsError(
            f"{name!r} is neither a file nor a model that timm knows",
            fix=f"did you mean {', '.join(close)}?" if close else "timm.list_models('vit*') lists the names",
        )
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        cfg = None
    if cfg is None and tag:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{arch}.*")]
        raise WeightsError(f"timm has no weights {tag!r} of {arch}", fix=f"its tags: {', '.join(tags) or 'none'}")
    return {} if cfg is None else cfg.to_dict()


def _hub_config(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    from timm.models import load_model_config_from_hf

    try:
        cfg, arch, model_args = load_model_config_from_hf(name.partition(":")[2])
    except Exception as error:  # offline, unknown repository, no timm config: hub libraries raise a dozen kinds
        raise _not_fetched(name, error) from error
    return arch, dict(cfg), configs.parse_config(model_args or {}, f"the config of {name}").kwargs


def _download(name: str, arch: str, kwargs: Mapping[str, Any], drop_path_rate: float) -> ViT:
    timm = configs.zoo()
    if not name.startswith(HUB) and not timm.list_pretrained([arch, f"{arch}.*"]):
        raise WeightsError(f"timm has no pre-trained weights of {name}", fix="pretrained=False for random weights")
    ready = architecture.constructor(arch, kwargs)
    ready |= {"dynamic_img_size": True, "patch_drop_rate": 0.0, "drop_path_rate": drop_path_rate}
    try:
        return timm.create_model(name, pretrained=True, **ready)
    except Exception as error:
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> WeightsError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    return WeightsError(
        f"the pre-trained weights of {name} could not be loaded ({type(error).__name__}: {first}); "
        "nothing was substituted for them",
        fix="connect to the network, or name a weight file, or pretrained=False (--pretrained false) for random weights",
    )
