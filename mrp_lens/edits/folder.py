"""What is read of an edit's folder, which may come from a stranger: two plain files inside of it, checked before they are used."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_BYTES = 16 * 2**20  # a configuration of 20,000 matrices takes 6 MB
HEADER_BYTES = 16 * 2**20
DEPTH = 64  # of JSON within JSON
CHUNK = 2**20


def file_in(folder: Path, name: str) -> Path:
    """A plain file of a folder, with links resolved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a link out of the folder, other than one into the blobs of a Hugging Face cache.
    """
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; give a folder written by edit.save_pretrained(...)")
    home, target = folder.resolve(), (folder / name).resolve()
    cached = home.parent.name == "snapshots" and target.parent == home.parents[1] / "blobs"
    if target.parent != home and not cached:
        raise ValueError(
            f"{folder / name} is a link to a file outside of the folder, which is not followed; copy the file itself"
        )
    return target


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: too large, too deeply nested, not UTF-8, not JSON, not an object, a key that stands twice, or a lone surrogate.
    """
    size = path.stat().st_size
    if size > CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes and no edit's configuration more than {CONFIG_BYTES:,}")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once_each)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be an edit's configuration") from None
    except ValueError as error:
        raise ValueError(f"{path} is truncated or no edit configuration ({error}); save the edit again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is truncated or no edit configuration (no object); save the edit again")
    _check_values(config, path, DEPTH)
    return config


def sha256_of(path: Path) -> str:
    """Of a file's content, a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def check_room(path: Path) -> None:
    """Refuse tensors that would not fit into memory, and headers that are none, before anything is read.

    Raises:
        ValueError: says how large it is.
    """
    size, free = path.stat().st_size, int(psutil.virtual_memory().available)
    if size > free:
        raise ValueError(f"{path} has {size:,} bytes, and {free:,} of memory are free")
    with path.open("rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if header > min(HEADER_BYTES, size - 8):
        raise ValueError(
            f"{path} is truncated or holds no tensors (its header has {header:,} bytes); save the edit again"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each copied once.

    Raises:
        ValueError: it is none.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} does not hold tensors that can be read ({_one_line(error)})") from error


def check_same(settings: Any, tensors: Mapping[str, Tensor], again: tuple[Any, Mapping[str, Tensor]]) -> None:
    """Refuse settings and tensors that come out of the edit made of them as others, or that it does not have at all.

    Raises:
        ValueError: says what.
    """
    others, other_tensors = again
    if set(tensors) != set(other_tensors):
        odd = sorted(set(tensors) ^ set(other_tensors))[0]
        raise ValueError(f"it holds the tensor {odd!r}, which its configuration does not name")
    for name, tensor in tensors.items():
        kept = other_tensors[name]
        if tensor.dtype != kept.dtype or not torch.equal(tensor, kept):
            raise ValueError(f"{name!r} holds other values than an edit saves (dtype, length or precision)")
    if json.dumps(settings, sort_keys=True) != json.dumps(others, sort_keys=True):
        raise ValueError(f"its settings are not as an edit saves them: {_difference(settings, others)}")


def one_line(error: Exception) -> str:
    """An error's message on one line, of a readable length."""
    return _one_line(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _one_line(what: object) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= 500 else f"{text[:500]} ..."


def _difference(settings: Any, others: Any) -> str:
    if isinstance(settings, dict) and isinstance(others, dict) and settings.keys() == others.keys():
        for key in settings:
            if json.dumps(settings[key], sort_keys=True) != json.dumps(others[key], sort_keys=True):
                return _one_line(f"{key!r} is {settings[key]!r} and has to be {others[key]!r}")
    return _one_line(f"{settings!r} has to be {others!r}")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:50]!r} stands there twice")
            seen.add(name)
    return content


def _check_values(value: Any, path: Path, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"{path} is nested too deeply to be an edit's configuration")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path} holds half of a letter ({value[:50]!r}); save the edit again") from None
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_values(key, path, depth - 1)
            _check_values(entry, path, depth - 1)
    elif isinstance(value, list):
        for entry in value:
            _check_values(entry, path, depth - 1)


def check_finite(value: Any, name: str) -> None:
    """Refuse NaN and infinity anywhere in settings.

    Raises:
        ValueError: names the setting.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, and must be finite")
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        check_finite(entry, f"{name}.{key}")


def field(settings: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """One of the settings.

    Raises:
        ValueError: it is missing or of another kind.
    """
    if not isinstance(settings, dict) or name not in settings:
        raise ValueError(f"{name!r} is missing from its settings")
    value = settings[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(_one_line(f"{name!r} must be {wanted} in its settings, got {value!r}"))
    return value
