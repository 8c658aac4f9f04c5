"""A checkpoint on disk: which tensor lies in which file, and writing it again with some of them changed."""

import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrp_lens.models import Layout
from mrp_lens.models.architectures import layout_of
from mrp_lens.models.quantised import refuse_quantised
from mrp_lens.models.source import check_shards, leads_out, read_object, weight_files
from mrp_lens.utils.io import write_json

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
TOKENIZER_SETTINGS = "tokenizer_config.json"
# Settings that name code, or kernels, which transformers would fetch from elsewhere; and a path on somebody's machine.
LEFT_BEHIND = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
)
# Precisions in which weights are read and written.
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODE = (".py", ".pyc", ".so", ".pkl", ".pickle")
HEAD = "lm_head.weight"  # what transformers 5 calls every unembedding
ROOM = 1.05  # what is written may be a little larger than what is read


@dataclass(frozen=True)
class HFCheckpoint:
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
    def open(cls, folder: Path) -> "HFCheckpoint":
        """Read the configuration and the names of the tensors.

        Raises:
            ValueError: quantised weights, an unknown architecture, no weights, a damaged file, or an index or a link that
                leads out of the folder.
        """
        config = read_object(folder / "config.json")
        for key in ("quantization_config", "compression_config"):
            refuse_quantised(config.get(key), str(folder))
        layout = layout_of(architecture_in(config))
        found = {name: file for file in _weight_files(folder) for name in _names(file)}
        prefix = layout.blocks.split(".", 1)[0] + "."
        # A checkpoint of the bare decoder (such as GPT-2's on the Hub) leaves the first part of each name out.
        bare = not any(name.startswith(prefix) for name in found)
        heads = (f"{layout.head}.weight", HEAD)
        files = {name if not bare or name in heads else prefix + name: (file, name) for name, file in found.items()}
        checkpoint = cls(folder, config, layout, files)
        if checkpoint.name_in_files(HEAD) not in files and not checkpoint.says_tied:
            raise ValueError(
                f"{folder} holds no {layout.head}.weight, and its config.json does not say that the unembedding is the embedding: "
                "transformers would make one up; fetch the checkpoint again"
            )
        return checkpoint

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of its embedding.

        Raises:
            ValueError: it is stored as integers or in 8 bits.
        """
        stored = self.read(f"{self.layout.embeddings[0]}.weight").dtype
        if stored not in STORED:
            raise ValueError(
                f"the embedding in {self.folder} is stored as {str(stored).removeprefix('torch.')}, as in quantised checkpoints; give one in "
                "float32, bfloat16 or float16"
            )
        return stored

    @cached_property
    def says_tied(self) -> bool:
        """What its configuration says of the unembedding, or leaves to the default of its kind."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        default = getattr(CONFIG_MAPPING[str(self.config["model_type"])](), "tie_word_embeddings", False)
        return bool(self.config.get("tie_word_embeddings", default))

    @cached_property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding once transformers has loaded it: not if the files hold two that differ."""
        if not self.says_tied:
            return False
        embedding, head = f"{self.layout.embeddings[0]}.weight", self.name_in_files(HEAD)
        both = embedding in self.files and head in self.files
        return not both or torch.equal(self.read(embedding), self.read(head))

    @property
    def size(self) -> int:
        """Bytes of its weight files."""
        return sum(file.stat().st_size for file in {file for file, _ in self.files.values()})

    def name_in_files(self, name: str) -> str:
        """What the files call a tensor, which may be the name that transformers gives it or that of the architecture's layout.

        GPT-NeoX's unembedding is `embed_out` in its files and `lm_head` in transformers 5; of a tied pair the files may hold
        either.
        """
        embedding, head = f"{self.layout.embeddings[0]}.weight", f"{self.layout.head}.weight"
        if name in (head, HEAD):
            return head if head in self.files or HEAD not in self.files else HEAD
        if name == embedding and name not in self.files and self.says_tied:
            return self.name_in_files(HEAD)
        return name

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The names under which the files hold the values of a tensor: both, where they hold both of a tied pair."""
        embedding, head = f"{self.layout.embeddings[0]}.weight", self.name_in_files(HEAD)
        pair = tuple(other for other in (embedding, head) if other in self.files)
        return pair if self.tied and name in (embedding, head, HEAD) else (self.name_in_files(name),)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: the checkpoint has none of that name.
        """
        stored = self.name_in_files(name)
        if stored not in self.files:
            raise ValueError(
                f"{self.folder} holds no tensor {name!r}; is it the checkpoint of this model, and complete?"
            )
        file, inside = self.files[stored]
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
        """Tokenizer, generation settings, chat template and licence, as they are but for references to code that stays behind.

        Raises:
            ValueError: a link among them leads out of the folder.
        """
        for pattern in COMPANIONS:
            for file in self.folder.glob(pattern):
                if not file.is_file() or file.suffix in CODE:
                    continue
                check_inside(self.folder, file)
                target = out / file.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        if (out / TOKENIZER_SETTINGS).is_file():
            settings = read_object(out / TOKENIZER_SETTINGS)
            if "auto_map" in settings:
                write_json(out / TOKENIZER_SETTINGS, {k: v for k, v in settings.items() if k != "auto_map"})

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
                    tensors[key] = round_to(dtype or tensors[key].dtype, values, inside[key])
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
        ValueError: there are none, an index names some that are missing or not in the folder, or a link leads out of it.
    """
    check_shards(folder)
    found = weight_files(folder)
    for file in found:
        check_inside(folder, file)
    if not found:
        raise ValueError(f"{folder} holds no weights: expected model.safetensors, or shards with {INDEX}")
    return found


def architecture_in(config: Mapping[str, Any]) -> str:
    """The class that transformers loads a language model of these settings as.

    It goes by `model_type`. `architectures` may name another: the bare decoder, or the class that the model was derived
    from.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    return known if isinstance(known, str) else f"a model of the type {kind!r}"


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a link that leads out of the folder; in the Hub's cache, out of it and the model's `blobs`.

    Raises:
        ValueError: says where it leads.
    """
    if leads_out(folder, file):
        raise ValueError(
            f"{file} is a link to {file.resolve()}, outside of its folder: a stranger's link could name any file of this machine. If the "
            "file belongs there, put it in the place of the link"
        )


def _names(file: Path) -> Iterable[str]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch the checkpoint again") from error
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
    """The tensors of a file that torch wrote; nothing in it is run.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    try:
        # Files from before torch 1.6 are no archives, and cannot be mapped into memory.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{file} is damaged, or holds more than tensors ({reason}); use a checkpoint in safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{file} holds more than tensors by name; use a checkpoint in safetensors")
    return loaded


def _safetensors_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def round_to(dtype: torch.dtype, values: Tensor, name: str) -> Tensor:
    """The values of a tensor in another precision.

    Raises:
        ValueError: one that is no precision of weights, or values that are too large for it.
    """
    if dtype not in STORED:
        raise ValueError(
            f"{name} is stored as {str(dtype).removeprefix('torch.')}, which cannot hold the edit; use a checkpoint in float32, bfloat16 or "
            "float16"
        )
    result = values.to(dtype, copy=True).contiguous()  # a tied pair is written as two tensors
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"{name} holds values too large for {str(dtype).removeprefix('torch.')}; export with dtype=torch.float32"
        )
    return result
