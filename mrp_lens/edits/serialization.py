"""An edit as files: `edit_config.json` and `edit.safetensors`, both hashed, no pickle; in a folder, or on the Hugging Face Hub.

A folder may come from a stranger. Of it two plain files are read, checked before they are used, and no code is ever run.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mrp_lens.models.source import leads_out
from mrp_lens.utils.io import one_line, read_json, recover, write_bytes, write_json

CONFIG_FILE = "edit_config.json"
TENSOR_FILE = "edit.safetensors"
FORMAT = 1
KEYS = {"format", "kind", "settings", "provenance", "tensors_sha256"}

CONFIG_BYTES = 16 * 2**20  # a configuration of 20,000 matrices takes 6 MB
HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Stored:
    """What the two files of an edit say."""

    folder: Path
    kind: Any  # until it is known to be one
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_edit(
    folder: Path, kind: str, provenance: Mapping[str, Any], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the two files of an edit into a folder that exists.

    Raises:
        OSError: one of them cannot be written, because the disk is full for example; names it.
    """
    # Copies: one subspace may stand at several hooks, and the format refuses tensors that share memory.
    content = save({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    config: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "settings": settings,
        "provenance": dict(provenance),
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_bytes(folder / TENSOR_FILE, content)
    write_json(folder / CONFIG_FILE, {**config, "config_sha256": _config_hash(config)})


def stored_bytes(folder: Path) -> int:
    """The size of a saved edit."""
    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))


def read_edit(folder: Path) -> Stored:
    """Read the two files of an edit; what they say of it is not known to fit together yet.

    Raises:
        FileNotFoundError: no such folder, or one of its two files is missing.
        ValueError: a file was truncated or altered, is a link out of the folder, does not fit into memory, or is not of this
            format.
    """
    config_file, tensor_file = (_file_in(folder, name) for name in (CONFIG_FILE, TENSOR_FILE))
    _check_bytes(config_file, CONFIG_FILE, config_file.stat().st_size)
    config = read_json(config_file, "save the edit again", strict=True)
    stated = config.pop("config_sha256", None)
    if missing := sorted(KEYS - set(config)):
        raise ValueError(
            f"{folder / CONFIG_FILE} is truncated or no edit configuration ({missing[0]!r} is missing); save the edit again"
        )
    if type(config["format"]) is not int or config["format"] != FORMAT:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {config['format']!r}; this version of mrp_lens reads format {FORMAT}"
        )
    _check_size(tensor_file)
    with tensor_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    for name, digest, wanted in (
        (CONFIG_FILE, _config_hash(config), stated),
        (TENSOR_FILE, found, config["tensors_sha256"]),
    ):
        if digest != wanted:
            raise ValueError(
                f"{folder / name} is truncated or was altered since it was saved (its hash does not match); save the edit again"
            )
    # Anybody can make hashes match: they tell of accidents. What follows holds against strangers.
    with explained(folder):
        if extra := sorted(set(config) - KEYS):
            raise ValueError(f"{extra[0]!r} is nothing that this version of mrp_lens knows")
        if not isinstance(config["provenance"], dict):
            raise ValueError(f"its provenance must be an object, got {type(config['provenance']).__name__}")
        _check_finite(config["settings"], "settings")
        tensors = _read_tensors(tensor_file)
    return Stored(folder, config["kind"], config["settings"], config["provenance"], tensors)


def folder_of(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of an edit; of a repository on the Hub the two files are downloaded into the Hub's cache.

    What is a local folder, or a `Path`, is never looked for on the Hub.

    Raises:
        FileNotFoundError: a name of the Hub under which no edit is to be had; says why.
        ValueError: a revision of a local folder, or files that are too large.
    """
    folder, name = Path(source).expanduser(), str(source)
    recover(folder)
    if isinstance(source, Path) or folder.is_dir() or not _is_hub_name(name):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of the Hub, and {name!r} is none of its names; leave it out")
        return folder
    options = {"revision": revision, "token": token, "library_name": "mrp_lens"}
    try:
        for file in (CONFIG_FILE, TENSOR_FILE):
            _check_bytes(f"{file} of {name}", file, hf_hub_download(name, file, **options, dry_run=True).file_size or 0)
            place = hf_hub_download(name, file, **options)
    except (HTTPError, OSError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor an edit that is to be had from the Hub ({one_line(cause)}); give a folder written by "
            "edit.save_pretrained(...), or the name of such a folder on the Hub (with token=... where it is private)"
        ) from error
    return Path(place).parent


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith(".")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What goes wrong inside is raised as one error that says that the folder does not hold what it says."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        cause = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(
            f"{folder} does not hold what its configuration says ({one_line(cause)}); save the edit again"
        ) from error


def setting(settings: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """One of the settings.

    Raises:
        ValueError: it is missing or of another kind.
    """
    if not isinstance(settings, dict) or name not in settings:
        raise ValueError(f"{name!r} is missing from its settings")
    value = settings[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(one_line(f"{name!r} must be {wanted} in its settings, got {value!r}"))
    return value


def check_same(stored: Stored, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse stored settings and tensors that the edit made of them would save as others, or not at all.

    Raises:
        ValueError: says what.
    """
    if set(stored.tensors) != set(tensors):
        odd = sorted(set(stored.tensors) ^ set(tensors))[0]
        raise ValueError(f"it holds the tensor {odd!r}, which its configuration does not name")
    for name, tensor in stored.tensors.items():
        if tensor.dtype != tensors[name].dtype or not torch.equal(tensor, tensors[name]):
            raise ValueError(f"{name!r} holds other values than an edit saves (dtype, length or precision)")
    if not _same_json(stored.settings, settings):
        raise ValueError(f"its settings are not as an edit saves them: {_difference(stored.settings, settings)}")


def _config_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _file_in(folder: Path, name: str) -> Path:
    """A plain file of a folder, with links resolved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a link out of the folder, other than one into the blobs of a Hugging Face cache.
    """
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; give a folder written by edit.save_pretrained(...)")
    if leads_out(folder, file):
        raise ValueError(
            f"{file} is a link to a file outside of the folder, which is not followed; copy the file itself"
        )
    return file.resolve()


def _check_bytes(what: str | Path, name: str, size: int) -> None:
    """Refuse, before it is read, what no edit's configuration needs, and tensors that would not fit into memory."""
    free = int(psutil.virtual_memory().available)
    if name == CONFIG_FILE and size > CONFIG_BYTES:
        raise ValueError(f"{what} has {size:,} bytes and no edit's configuration more than {CONFIG_BYTES:,}")
    if name == TENSOR_FILE and size > free:
        raise ValueError(f"{what} has {size:,} bytes, and {free:,} of memory are free")


def _check_size(path: Path) -> None:
    """Refuse tensors that would not fit into memory, and headers that are none, before anything is read."""
    size = path.stat().st_size
    _check_bytes(path, TENSOR_FILE, size)
    with path.open("rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if header > min(HEADER_BYTES, size - 8):
        raise ValueError(
            f"{path} is truncated or holds no tensors (its header has {header:,} bytes); save the edit again"
        )


def _check_finite(value: Any, name: str) -> None:
    """Refuse NaN and infinity anywhere in settings."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, and must be finite")
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        _check_finite(entry, f"{name}.{key}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each copied once."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} does not hold tensors that can be read ({one_line(error)})") from error


def _same_json(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _difference(settings: Any, others: Any) -> str:
    if isinstance(settings, dict) and isinstance(others, dict) and settings.keys() == others.keys():
        for key in settings:
            if not _same_json(settings[key], others[key]):
                return one_line(f"{key!r} is {settings[key]!r} and has to be {others[key]!r}")
    return one_line(f"{settings!r} has to be {others!r}")
