"""A fit on disk while it runs: what another process needs to go on with it, bit for bit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mrp_lens.utils.io import as_json, make_folder, read_json, write_bytes, write_json
from mrp_lens.utils.validation import check_whole

IDENTITY_FILE = "fit.json"
STATE_FILE = "training.safetensors"  # no pickle: a run folder may come from a stranger
STRUCTURE = "structure"  # the entry of its metadata that says where each tensor belongs
EVERY = 25


class CheckpointError(ValueError):
    """A folder holds the checkpoint of another fit, or a damaged one: nothing that the fit itself would say."""


class Resumable(Protocol):
    """Something whose state a checkpoint keeps, such as a stream of batches."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one fit: `fit.json` says which, `training.safetensors` how far it is. Each file is written whole or not at all.

    Attributes:
        folder: of this fit alone.
        every: updates after which the state is written; it is written at the end, on Ctrl-C and on SIGTERM as well.
    """

    folder: Path
    every: int = EVERY

    @classmethod
    def claim(cls, folder: str | Path, identity: Mapping[str, Any], *, every: int = EVERY) -> "Checkpoint":
        """Make the folder, or go on in one of the same fit.

        Args:
            folder: of this fit alone.
            identity: everything that the fit depends on; JSON.
            every: updates after which the state is written.

        Raises:
            TypeError, ValueError: `every` is not a whole number above 0.
            CheckpointError: the folder holds another fit (what differs is said).
            OSError: the folder cannot be made or written into.
        """
        check_whole(every=every)
        target = make_folder(folder)
        wanted: dict[str, Any] = as_json(identity)
        path = target / IDENTITY_FILE
        if path.is_file():
            known = read_json(path, "remove the folder and fit again")
            differing = [key for key in {**wanted, **known} if known.get(key) != wanted.get(key)]
            if differing:
                raise CheckpointError(
                    f"{target} holds the checkpoint of another fit (other {', '.join(differing)}); choose another folder, or the same "
                    "method, settings, data, model and seed"
                )
        else:
            write_json(path, wanted)
        return cls(target, every)

    def part(self, name: str) -> "Checkpoint":
        """The checkpoint of a later phase of the same fit."""
        return Checkpoint(make_folder(self.folder / name), self.every)

    def load(self) -> dict[str, Any] | None:
        """The state that was last written, if any.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / STATE_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state: dict[str, Any] = _joined(json.loads(file.metadata()[STRUCTURE]), file)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}); remove the folder and fit again"
            ) from error
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state; a process killed at any moment leaves the old one or the new one."""
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_apart(state, tensors))
        write_bytes(self.folder / STATE_FILE, save(tensors, metadata={STRUCTURE: structure}))


def _apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with its tensors in `tensors`; dicts as lists of pairs, since their keys may be numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _apart(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [_apart(entry, tensors) for entry in value]
    return value


def _joined(value: Any, file: Any) -> Any:
    """The inverse, given the open file; tuples come back as lists."""
    if isinstance(value, list):
        return [_joined(entry, file) for entry in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return file.get_tensor(value["tensor"])
        return {key: _joined(entry, file) for key, entry in value["pairs"]}
    return value
