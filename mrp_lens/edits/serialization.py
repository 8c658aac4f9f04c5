"""An edit as a folder: `edit_config.json` and `edit.safetensors`, both hashed, no pickle."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mrp_lens.edits.base import Edit
from mrp_lens.edits.folder import (
    check_finite,
    check_room,
    check_same,
    file_in,
    one_line,
    read_config,
    read_tensors,
    sha256_of,
)
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.utils.io import recover, whole_folder, write_json

CONFIG_FILE = "edit_config.json"
TENSOR_FILE = "edit.safetensors"
FORMAT = 1
KEYS = {"format", "kind", "settings", "provenance", "tensors_sha256"}

KINDS: dict[str, type[Edit]] = {}


def register(kind: type[Edit]) -> None:
    """Make a kind of edit known to `load_edit`."""
    KINDS[kind.kind] = kind


for _kind in (ProjectionEdit, SteeringEdit, WeightEdit):
    register(_kind)


def save_edit(edit: Edit, path: str | Path, *, overwrite: bool = False) -> None:
    """See `Edit.save_pretrained`."""
    with whole_folder(path, overwrite=overwrite) as folder:
        write_edit(edit, folder)


def write_edit(edit: Edit, folder: Path) -> None:
    """Write the two files of an edit into a folder that exists."""
    settings, tensors = edit.to_parts()
    # Copies: one subspace may stand at several hooks, and the format refuses tensors that share memory.
    content = save({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    config: dict[str, Any] = {
        "format": FORMAT,
        "kind": edit.kind,
        "settings": settings,
        "provenance": dict(edit.provenance),
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / TENSOR_FILE).write_bytes(content)
    write_json(folder / CONFIG_FILE, {**config, "config_sha256": _config_hash(config)})


def stored_bytes(folder: Path) -> int:
    """The size of a saved edit."""
    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))


def load_edit(path: str | Path) -> Edit:
    """Load an edit from a folder that `save_pretrained` wrote; tensors come back bit-identical.

    Raises:
        FileNotFoundError: no such folder, or one of its two files is missing.
        ValueError: a file was truncated or altered, is a link out of the folder, does not fit into memory, or holds anything
            that no edit saves. No code of the folder is ever run.

    Example:
        >>> edit = load_edit("runs/mrp/edit")  # doctest: +SKIP
    """
    folder = Path(path)
    recover(folder)
    config_file, tensor_file = (file_in(folder, name) for name in (CONFIG_FILE, TENSOR_FILE))
    config = read_config(config_file)
    stated = config.pop("config_sha256", None)
    if missing := sorted(KEYS - set(config)):
        raise ValueError(
            f"{folder / CONFIG_FILE} is truncated or no edit configuration ({missing[0]!r} is missing); save the edit again"
        )
    if type(config["format"]) is not int or config["format"] != FORMAT:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {config['format']!r}; this version of mrp_lens reads format {FORMAT}"
        )
    check_room(tensor_file)
    for file, found, wanted in (
        (CONFIG_FILE, _config_hash(config), stated),
        (TENSOR_FILE, sha256_of(tensor_file), config["tensors_sha256"]),
    ):
        if found != wanted:
            raise ValueError(
                f"{folder / file} is truncated or was altered since it was saved (its hash does not match); save the edit again"
            )
    # Anybody can make hashes match: they tell of accidents. What follows holds against strangers.
    kind, settings, provenance = (config[key] for key in ("kind", "settings", "provenance"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind of edit {kind!r}; this version of mrp_lens knows {', '.join(KINDS)}")
    try:
        if extra := sorted(set(config) - KEYS):
            raise ValueError(f"{extra[0]!r} is nothing that this version of mrp_lens knows")
        if not isinstance(provenance, dict):
            raise ValueError(f"its provenance must be an object, got {type(provenance).__name__}")
        check_finite(settings, "settings")
        tensors = read_tensors(tensor_file)
        edit = KINDS[kind].from_parts(settings, tensors)
        check_same(settings, tensors, edit.to_parts())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"{folder} does not hold what its configuration says ({one_line(error)}); save the edit again"
        ) from error
    edit.provenance = provenance
    return edit


def _config_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
