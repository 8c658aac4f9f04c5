"""A checkpoint on disk: which tensor lies in which file, and writing it again with some of them changed."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrp_lens.files import write_json
from mrp_lens.model.layout import Layout, layout_of
from mrp_lens.model.source import refuse_quantised

INDEX = "model.safetensors.index.json"
# What belongs to a checkpoint besides its weights; optimizer states, logs and model cards do not.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
ROOM = 1.05  # what is written may be a little larger than what is read


@dataclass(frozen=True)
class Checkpoint:
    """A folder written by `save_pretrained`.

    Attributes:
        folder: where it lies.
        config: its config.json.
        layout: of its architecture.
        files: name of a tensor, as transformers calls it -> (file, name inside the file).
    """

    folder: Path
    config: Mapping[str, Any]
    layout: Layout
    files: Mapping[str, tuple[Path, str]]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the configuration and the names of the tensors.

        Raises:
            ValueError: quantised weights, an unknown architecture, no weights, or an index that names missing files.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        refuse_quantised(config.get("quantization_config"), str(folder))
        layout = layout_of(str((config.get("architectures") or ["a model without a named architecture"])[0]))
        found = {name: file for file in _weight_files(folder) for name in _names(file)}
        prefix = layout.blocks.split(".", 1)[0] + "."
        # A checkpoint of the bare decoder (such as GPT-2's on the Hub) leaves the first part of each name out.
        bare = not any(name.startswith(prefix) for name in found)
        files = {
            name if not bare or name.startswith(layout.head) else prefix + name: (f, name) for name, f in found.items()
        }
        return cls(folder, config, layout, files)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of its embedding."""
        return self.read(f"{self.layout.embeddings[0]}.weight").dtype

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding."""
        return f"{self.layout.head}.weight" not in self.files or bool(self.config.get("tie_word_embeddings", False))

    @property
    def size(self) -> int:
        """Bytes of its weight files."""
        return sum(file.stat().st_size for file in {file for file, _ in self.files.values()})

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: the checkpoint has none of that name.
        """
        if name not in self.files:
            raise ValueError(
                f"{self.folder} holds no tensor {name!r}; is it the checkpoint of this model, and complete?"
            )
        file, inside = self.files[name]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                values: Tensor = tensors.get_tensor(inside)
                return values
        return _load_bin(file)[inside]

    def check_room(self, out: Path, *, added: Iterable[Tensor], dtype: torch.dtype | None) -> None:
        """Refuse before writing what would not fit, further tensors included.

        Raises:
            ValueError: too little room on the disk.
        """
        place = next(parent for parent in out.absolute().parents if parent.exists())
        grown = 1.0 if dtype is None else dtype.itemsize / self.dtype.itemsize
        more = sum(tensor.numel() * tensor.element_size() for tensor in added)
        needed, free = int((self.size + more) * grown * ROOM), shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"the edited model needs about {needed / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB left; free some, or "
                "export to another disk"
            )

    def copy_companions(self, out: Path) -> None:
        """Tokenizer, generation settings, chat template and licence, as they are."""
        for pattern in COMPANIONS:
            for file in self.folder.glob(pattern):
                if file.is_file():
                    target = out / file.relative_to(self.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)

    def write_weights(
        self,
        out: Path,
        *,
        changed: Mapping[str, Tensor],
        added: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Write the weights as safetensors; files without a change are copied byte for byte.

        Args:
            out: the new folder.
            changed: name -> new values, rounded to the precision of those that they replace.
            added: name -> further tensors, written as they are.
            dtype: of all tensors but the added ones; None: as they were.
            progress: told how many bytes have been read.

        Raises:
            ValueError: a changed value is too large for the precision.
        """
        placed: dict[str, str] = {}
        files = sorted({file for file, _ in self.files.values()})
        inside = {key: name for name, (_, key) in self.files.items()}
        prefix = self._prefix_in_files()
        extra = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in added.items()}
        for file in files:
            mine = {key for other, key in self.files.values() if other == file}
            new = {key: changed[inside[key]] for key in mine if inside[key] in changed}
            target = _safetensors_name(file.name)
            if not new and dtype is None and file.suffix == ".safetensors":
                shutil.copyfile(file, out / target)
            else:
                tensors = _load(file)
                for key, values in new.items():
                    tensors[key] = _rounded(values, dtype or tensors[key].dtype, inside[key])
                if dtype is not None:
                    tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
                if new:  # beside what was changed, rather than in a file of their own
                    tensors, extra = {**tensors, **extra}, {}
                _save(tensors, out / target)
                mine = set(tensors)
            placed |= dict.fromkeys(mine, target)
            progress(file.stat().st_size)
        if extra:
            self._add_file(out, placed, extra)
        if set(placed.values()) != {"model.safetensors"}:
            size = sum((out / file).stat().st_size for file in set(placed.values()))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
            write_json(out / INDEX, index)

    def _add_file(self, out: Path, placed: dict[str, str], extra: Mapping[str, Tensor]) -> None:
        target = "model-edit.safetensors"
        if set(placed.values()) == {"model.safetensors"}:
            # transformers would take a file of this name for the whole model
            first, target = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
            (out / "model.safetensors").rename(out / first)
            placed |= dict.fromkeys(placed, first)
        _save(extra, out / target)
        placed |= dict.fromkeys(extra, target)

    def _prefix_in_files(self) -> str:
        """What the files leave out of the names."""
        name, (_, key) = next(iter(self.files.items()))
        return name.removesuffix(key)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load.

    Raises:
        ValueError: there are none, or an index names some that are missing.
    """
    for single, index in (("model.safetensors", INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            named = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in named if not (folder / name).is_file())
            if missing:
                raise ValueError(
                    f"{folder} lacks {', '.join(missing)}, which its {index} names; fetch the checkpoint again"
                )
            return sorted(folder / name for name in named)
    raise ValueError(f"{folder} holds no weights: expected model.safetensors, or shards with {INDEX}")


def _names(file: Path) -> Iterable[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(_load_bin(file))


def _load(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, each with a storage of its own."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return {name: tensor.clone().contiguous() for name, tensor in _load_bin(file).items()}


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file that others may read as they may any new file; safetensors itself would make it the owner's alone."""
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} could not be written ({error}); is the disk full?") from error
    file.chmod(mode)


def _load_bin(file: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return loaded


def _safetensors_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = values.to(dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(
            f"{name} holds values too large for {str(dtype).removeprefix('torch.')}; export with dtype=torch.float32"
        )
    return rounded
