"""An edit as a folder: `edit_config.json` and `edit.safetensors`, both hashed, no pickle."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from mrp_lens.edit.base import Edit
from mrp_lens.edit.projection import ProjectionEdit
from mrp_lens.edit.steering import SteeringEdit
from mrp_lens.edit.weight import WeightEdit
from mrp_lens.files import recover, whole_folder, write_json

CONFIG_FILE = "edit_config.json"
TENSOR_FILE = "edit.safetensors"
FORMAT = 1

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
        ValueError: a file was truncated or altered, or holds shapes, NaN or rows that no edit may have.

    Example:
        >>> edit = load_edit("runs/mrp/edit")  # doctest: +SKIP
    """
    folder = Path(path)
    recover(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; give a folder written by edit.save_pretrained(...)")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        stated = config.pop("config_sha256")
        kind, settings, provenance, tensor_hash = (
            config[key] for key in ("kind", "settings", "provenance", "tensors_sha256")
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} is truncated or no edit configuration ({error!r}); save the edit again"
        ) from error
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {config.get('format')!r}; this version of mrp_lens reads format {FORMAT}"
        )
    content = (folder / TENSOR_FILE).read_bytes()
    for file, found, wanted in (
        (CONFIG_FILE, _config_hash(config), stated),
        (TENSOR_FILE, hashlib.sha256(content).hexdigest(), tensor_hash),
    ):
        if found != wanted:
            raise ValueError(
                f"{folder / file} is truncated or was altered since it was saved (its hash does not match); save the edit again"
            )
    if kind not in KINDS:
        raise ValueError(f"unknown kind of edit {kind!r}; this version of mrp_lens knows {', '.join(KINDS)}")
    try:
        edit = KINDS[kind].from_parts(settings, load(content))
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} does not hold what its configuration says ({error!r}); save the edit again"
        ) from error
    edit.provenance = provenance
    return edit


def _config_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
