"""A model folder from a stranger: what is read of it, what is refused before anything is read."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST_CONFIG = 16 * 2**20  # bytes of a config.json; real ones have some kilobytes
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# A setting that counts something of which the weights hold at least as many numbers
_COUNTS = ("_size", "_dim", "_heads", "_layers", "_experts", "_layer", "_head", "_embd", "_inner", "_positions")


def one_line(error: BaseException, longest: int = 300) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} ..."


def is_count(value: Any) -> bool:
    """Whether a setting is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: too large, not JSON, or not an object.
    """
    if file.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{file} has {file.stat().st_size / 2**20:.0f} MiB; a configuration has some kilobytes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, and a configuration is a JSON object")
    return content


def leads_out(folder: Path, file: Path) -> bool:
    """Whether a file of a folder is in truth elsewhere: a stranger's link could name any file of this machine.

    A snapshot in the Hub's cache consists of links into `blobs` beside it; those are the model itself.
    """
    home, target = folder.resolve(), file.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(target.is_relative_to(place) for place in allowed)


def check_links(folder: Path) -> None:
    """Refuse symbolic links that lead out of a folder.

    Raises:
        ValueError: names the link.
    """
    for file in folder.iterdir():
        if file.is_symlink() and leads_out(folder, file):
            raise ValueError(
                f"{file} is a symbolic link out of its folder, to {file.resolve()}, and is not followed; put the file itself there, or give the "
                "folder that it lies in"
            )


def check_shards(folder: Path) -> None:
    """Refuse an index that names files outside of its folder, or none.

    Raises:
        ValueError: names the file.
    """
    for index in (folder / name for name in INDEXES):
        if not index.is_file():
            continue
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index} has no weight_map from tensors to file names")
        for name in sorted(set(shards.values())):
            if Path(name).name != name or "\\" in name or not (folder / name).is_file():
                raise ValueError(f"{index} names {name!r}, which is no file in this folder; download the folder again")


def shapes_of(folder: Path) -> Iterator[tuple[int, ...]]:
    """The shapes of the tensors in a folder's safetensors files, from their headers.

    Raises:
        ValueError: a file is broken.
    """
    from safetensors import safe_open

    for file in sorted(folder.glob(WEIGHT_FILES[0])):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield tuple(tensors.get_slice(key).get_shape())
        except Exception as error:
            raise ValueError(f"{file} is not a safetensors file: {one_line(error)}; download it again") from error


def count_parameters(folder: Path) -> int:
    """Numbers stored in the weight files (from their headers where they are safetensors).

    Raises:
        ValueError: the folder holds no weights, or broken ones.
    """
    safe, torch_files = (sorted(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    if not safe and not torch_files:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    return sum(math.prod(shape) for shape in shapes_of(folder)) or sum(file.stat().st_size for file in torch_files) // 2


def check_sizes(config: dict[str, Any], numbers: int, name: str) -> None:
    """Refuse sizes that the weights cannot have, before a model of that size is built.

    Raises:
        ValueError: names the setting.
    """
    for path, value in _counts(config, ""):
        if is_count(value) and (value > numbers or (path.endswith(("_layers", "_layer")) and value > 10_000)):
            raise ValueError(
                f"{name}: its config.json says {path} = {value}, and its weight files hold {numbers} numbers; they do not belong together"
            )


def _counts(settings: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and not key.endswith("2id"):
            yield from _counts(value, f"{path}{key}.")
        elif key.endswith(_COUNTS):
            yield f"{path}{key}", value
