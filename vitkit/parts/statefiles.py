"""Reading and writing weight files without running anything in them.

safetensors files and torch files (zip and legacy) are told apart by their first bytes, never by their names. torch files
go through `weights_only=True` with argparse.Namespace allowed besides (authors save their arguments); anything else
that asks for code is refused by name. Containers ({"model": ...}, {"teacher": ...}) are opened.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkit.errors import WeightsError
from vitkit.run.files import atomic

# Where checkpoints keep their weights, most wanted first. A teacher is what self-distillation evaluates.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "net", "network", "backbone")
CONTAINERS += ("denoiser",)
_KEPT_META = ("arch", "args", "config", "epoch", "vitkit", "passport", "model_args")
_ROWS = "convert it where you trust it: torch.load it there, then safetensors.torch.save_file the state dict"


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a weight file by their names in the file, and what else it says about itself.

    The second dict holds "format" ("safetensors" or "torch"), "container" (the key the weights were under, or None),
    "left" (other containers, not read), and where present "arch", "args", "config", "epoch", "vitkit", "passport".
    Raises WeightsError for missing, empty, truncated, foreign or hostile files, naming the file and what is wrong.
    """
    path = Path(path)
    head = _first_bytes(path)
    if _is_safetensors(head, path):
        return _read_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_torch(path)
    raise _foreign(path, head)


def json_beside(path: Path, name: str) -> tuple[Mapping[str, Any] | None, str]:
    """The mapping in the JSON file `name` beside a weight file (None where there is no such file), and its path."""
    file = path.parent / name
    if not file.is_file():
        return None, str(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}", fix="correct it, or move it away") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file} is not a mapping", fix="correct it, or move it away")
    return content, str(file)


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one step: a crash leaves the old file or the new one.

    Tensors are detached, brought to the CPU and made contiguous; tied tensors and views of larger ones are cloned.
    """
    from safetensors.torch import save

    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        ready[name] = value
    with atomic(path) as file:
        file.write(save(ready, metadata={str(k): str(v) for k, v in (metadata or {}).items()}))


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names (sorted), dtypes, shapes and bytes: the same for the same numbers in any file or order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, not a weight file", fix="name the file in it")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist", fix="check the path") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}", fix="check its permissions") from error
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes)", fix="download or copy it again")
    return head


def _foreign(path: Path, head: bytes) -> WeightsError:
    """The error for a file that is no checkpoint at all, saying what it is."""
    size, again = path.stat().st_size, "download the weights themselves"
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return WeightsError(
            f"{path} is a git-lfs pointer ({size} bytes), not the weights",
            fix="run 'git lfs pull', or download the file",
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return WeightsError(f"{path} is a saved web page ({size} bytes), not weights", fix=f"{again}, not the page")
    if head.startswith(b"\x93NUMPY"):
        return WeightsError(f"{path} is a NumPy array, not a checkpoint", fix="save a state dict as safetensors")
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh")) or head[257:262] == b"ustar":
        return WeightsError(
            f"{path} is a compressed archive, not a checkpoint", fix="unpack it and name the weight file"
        )
    if all(byte in b"\t\n\r\f\b" or byte >= 32 for byte in head) and b"\0" not in head:
        shown = head[:40].decode("utf-8", "replace").splitlines()[0]
        return WeightsError(f"{path} is a text file ({size} bytes, starts {shown!r}), not a checkpoint", fix=again)
    return WeightsError(
        f"{path} is neither a safetensors nor a torch file ({size} bytes, starts {head[:8].hex(' ')})",
        fix=f"{again} again, or save a state dict as safetensors",
    )


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Eight bytes of header length, then a JSON object. A cut inside the first bytes still counts by the file's name."""
    if len(head) < 9:
        return path.suffix == ".safetensors"
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 10**9


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        promised = _promised_bytes(path)
        size = path.stat().st_size
        if promised is None or size < promised:
            wanted = "its header is cut" if promised is None else f"its header promises {promised}"
            raise WeightsError(
                f"{path} is truncated: {size} bytes, {wanted}", fix="download or copy it again"
            ) from error
        raise WeightsError(f"{path} is a broken safetensors file: {error}", fix="download or copy it again") from error
    meta: dict[str, Any] = {key: _maybe_json(said[key]) for key in _KEPT_META if key in said}
    return tensors, {"format": "safetensors", "container": None, "left": [], **meta}


def _promised_bytes(path: Path) -> int | None:
    """The size that a safetensors header says the file should have, or None when the header itself is cut."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, MemoryError):
        return None


def _maybe_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # notes on pickle protocols and TorchScript: said below in our words
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises seven kinds for a bad file; each becomes one clear sentence
        raise _refused(path, error) from error
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a state dict", fix="save module.state_dict() instead"
        )
    tensors, container, left = _open_container(content, path)
    meta = {key: content[key] for key in _KEPT_META if key in content and not isinstance(content[key], Tensor)}
    if isinstance(meta.get("args"), argparse.Namespace):
        meta["args"] = vars(meta["args"])
    return tensors, {"format": "torch", "container": container, "left": left, **meta}


def _refused(path: Path, error: Exception) -> WeightsError:
    """Turn torch's exception for `path` into a WeightsError that names the cause."""
    text, size = str(error), path.stat().st_size
    if "TorchScript" in text:
        return WeightsError(
            f"{path} is a TorchScript program, which holds code besides weights, so it is not loaded",
            fix="where you trust it: torch.jit.load it there, then safetensors.torch.save_file its state_dict()",
        )
    if isinstance(error, pickle.UnpicklingError | AttributeError | KeyError | TypeError | ValueError):
        asked = _globals_in(path)
        if asked:
            many = f"{', '.join(asked[:4])}{' and others' if len(asked) > 4 else ''}"
            return WeightsError(
                f"{path} is refused: besides tensors it asks to import and call {many}, which could run anything",
                fix=_ROWS,
            )
        found = re.search(r"GLOBAL (\S+)", text)
        if found:
            return WeightsError(f"{path} is refused: it asks to import {found.group(1)}", fix=_ROWS)
    if any(word in text for word in ("hasRecord", "failed locating file", "file not found")):
        return WeightsError(
            f"{path} is a zip archive that torch did not write", fix="unpack it and name the weight file"
        )
    if isinstance(error, EOFError) or any(word in text for word in ("zip archive", "unexpected EOF", "truncated")):
        return WeightsError(f"{path} is truncated or corrupt ({size} bytes)", fix="download or copy it again")
    if isinstance(error, MemoryError):
        return WeightsError(f"{path} ({size} bytes) does not fit into memory", fix="use a machine with more memory")
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return WeightsError(f"{path} cannot be read as a torch checkpoint ({size} bytes): {first}", fix=_ROWS)


def _globals_in(path: Path) -> list[str]:
    """Imports that the pickles in a torch file ask for and that are not plain tensor parts. Parsed, never run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                streams = [archive.read(name) for name in names]
        else:
            streams = [path.read_bytes()[: 1 << 24]]
    except (OSError, zipfile.BadZipFile, EOFError):
        return []
    allowed = {"argparse.Namespace", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
    allowed |= {"torch._utils._rebuild_parameter", "torch.Size", "builtins.set", "__builtin__.set"}
    found: list[str] = []
    for stream in streams:
        for name in _imports(stream):
            tensor_part = re.fullmatch(r"torch\.(\w+Storage|[a-z]+\d*)", name) is not None
            if name not in allowed and not tensor_part and name not in found:
                found.append(name)
    return found


def _imports(stream: bytes) -> Iterator[str]:
    """'module.name' of every import opcode in a run of pickles, as far as they can be parsed."""
    position = 0
    while position < len(stream):
        end, top = position, None
        strings: list[str] = []
        memo: dict[int, Any] = {}
        try:
            for opcode, argument, at in pickletools.genops(stream[position:]):
                end = position + (at or 0) + 1
                if opcode.name in ("GLOBAL", "INST"):
                    yield ".".join(str(argument).split(" "))
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif opcode.name.endswith("PUT"):
                    memo[int(argument or 0)] = top
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = top
                else:
                    top = memo.get(int(argument or 0)) if opcode.name.endswith("GET") else argument
                    if isinstance(top, str):
                        strings.append(top)
        except Exception:
            return  # not a pickle from here on (tensor bytes follow in legacy files)
        if end <= position:
            return
        position = end


def _open_container(content: Mapping, path: Path) -> tuple[dict[str, Tensor], str | None, list[str]]:
    """The state dict inside a checkpoint, the key path it was under, and sibling state dicts that were left."""
    trail: list[str] = []
    left: list[str] = []
    while True:
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        inner = [key for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
        if len(tensors) > 2 or (tensors and not inner):  # a lone counter beside {"model": ...} is not the state dict
            return tensors, ".".join(trail) or None, left + [str(key) for key in inner]
        known = [key for key in CONTAINERS if key in inner]
        if not known:
            shown = ", ".join(map(str, list(content)[:8])) or "nothing"
            raise WeightsError(
                f"{path} holds no state dict that vitkit knows; its keys are: {shown}",
                fix=f"save the state dict alone, or under one of {', '.join(CONTAINERS)}",
            )
        # Optimiser state is no alternative that was passed over.
        left += [str(key) for key in inner if key != known[0] and "optim" not in str(key) and key != "scaler"]
        trail.append(known[0])
        content = content[known[0]]


def _has_tensors(content: Mapping, depth: int = 2) -> bool:
    return any(
        isinstance(value, Tensor) or (depth and isinstance(value, Mapping) and _has_tensors(value, depth - 1))
        for value in content.values()
    )
