"""Where a model comes from: the embedded one, a folder, the Hub or a loaded Hugging Face model; checked before use.

transformers is imported where it is used: that takes seconds, and many who need this package load no model.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

from mrp_lens.models.attachments import entries_on
from mrp_lens.models.devices import Spread
from mrp_lens.models.quantised import is_eight_bit, refuse_quantised
from mrp_lens.utils.io import one_line, read_json

LARGEST_CONFIG = 16 * 2**20  # bytes of a config.json; real ones have some kilobytes
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What a repository on the Hub may hold besides: the weights in other formats, `consolidated` in that of the model's makers
OTHER_FORMATS = ("*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "consolidated*")
# Endings of settings that count something of which the weights hold at least as many numbers
_COUNTS = ("_size", "_dim", "_heads", "_layers", "_experts", "_layer", "_head", "_embd", "_inner", "_positions")
EDITED = "mrp_lens_"  # how the model type of an export with code of its own begins
# Where the language model's tensors lie in one that reads pictures too (newer and older names) -> in the former alone
_LANGUAGE_PART = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}


@dataclass(frozen=True)
class OpenedModel:
    """A Hugging Face model in memory, which may be changed, and its tokenizer, which may not."""

    name: str
    hf_model: Any
    tokenizer: Any


def opened(source: Any, tokenizer: Any, device: torch.device | Spread, dtype: torch.dtype, copies: int) -> OpenedModel:
    """The checkpoint behind what a user gave to `load_model`; `copies` is how many of it must fit into memory.

    Raises:
        TypeError: not a name, a path or a Hugging Face model; not a tokenizer.
        ValueError: nothing there, an adapter without its model, weights that are offloaded, missing, or quantised other than in 8 bits,
            hooks, no language-model head, no tokenizer, or too little memory.
    """
    _check_tokenizer(tokenizer)
    if isinstance(source, (str, Path)):
        return _from_folder(source, tokenizer, device, dtype, copies)
    return _from_memory(source, tokenizer, device, dtype, copies)


def _from_folder(
    source: str | Path, tokenizer: Any, device: torch.device | Spread, dtype: torch.dtype, copies: int
) -> OpenedModel:
    folder, name = find_folder(source), str(source)
    config = checked_config(folder, name)
    packed = is_eight_bit(config.get("quantization_config"), name)
    _refuse_edited(str(config.get("model_type")), name)
    if isinstance(device, torch.device):
        check_memory(count_parameters(folder), device, torch.int8 if packed else dtype, copies, name)
    language_config(folder)  # a tokenizer is found by it, and an error should not be about the tokenizer
    used = tokenizer if tokenizer is not None else read_tokenizer(folder)
    if isinstance(device, torch.device):
        return OpenedModel(name, read_weights(folder, dtype).to(device).eval(), used)
    spread = read_weights(folder, dtype, **device.options).eval()
    device.check(spread)
    return OpenedModel(name, spread, used)


def _from_memory(
    source: Any, tokenizer: Any, device: torch.device | Spread, dtype: torch.dtype, copies: int
) -> OpenedModel:
    if hasattr(source, "merge_and_unload"):
        raise ValueError("this model carries an adapter; merge it first and pass what model.merge_and_unload() returns")
    if not (hasattr(source, "config") and hasattr(source, "save_pretrained") and hasattr(source, "parameters")):
        raise TypeError(
            f"cannot load a {type(source).__name__}; give 'demo', a Hugging Face model folder, a Hub name, or a loaded "
            "Hugging Face model with a language-model head. A HookedTransformer or TransformerBridge needs no loading"
        )
    packed = is_eight_bit(getattr(source.config, "quantization_config", None), type(source).__name__)
    name = str(getattr(source.config, "_name_or_path", "") or type(source).__name__)
    _refuse_edited(str(source.config.model_type), name)
    _refuse_offloaded(source)
    _refuse_hooked(source)
    _check_head(source)
    if tokenizer is None:
        if not Path(name).is_dir():
            raise ValueError("a loaded Hugging Face model brings no tokenizer; pass load_model(model, tokenizer=...)")
        tokenizer = read_tokenizer(Path(name))
    if isinstance(device, torch.device):
        numbers = sum(parameter.numel() for parameter in source.parameters())
        check_memory(numbers, device, torch.int8 if packed else dtype, copies, name)
        return OpenedModel(name, _copied(source, dtype).to(device), tokenizer)
    spread = device.dispatched(_copied(source, dtype))
    device.check(spread)
    return OpenedModel(name, spread, tokenizer)


def _check_tokenizer(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerBase

    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer must be one of transformers, such as AutoTokenizer.from_pretrained(FOLDER), got {type(tokenizer).__name__}"
        )


def check_memory(parameters: int, device: torch.device, dtype: torch.dtype, copies: int, name: str) -> None:
    """Refuse before loading what cannot fit.

    Raises:
        ValueError: says what is needed and what there is.
    """
    needed = parameters * torch.empty((), dtype=dtype).element_size() * copies
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"{name} needs about {needed / 2**30:.1f} GiB on {device} to load in {str(dtype).removeprefix('torch.')} "
            f"({parameters / 1e9:.2f} billion numbers, {copies} at a time), and {free / 2**30:.1f} GiB are free. "
            "Load it with dtype=torch.bfloat16, with backend='bridge', or on another device"
        )


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _refuse_edited(model_type: str, name: str) -> None:
    """An exported module is for transformers: TransformerLens does not know its architecture.

    Raises:
        ValueError: says what to load instead.
    """
    if model_type.startswith(EDITED):
        raise ValueError(
            f"{name} is an edited model with code of its own, made by export_hf(form='module') for transformers. In TransformerLens load "
            "the base model that its README.md names, and apply the edit: load_edit(FOLDER).applied(model)"
        )


def local_folder(source: str | Path) -> Path | None:
    """The folder of a name or path; None: it can only be a name on the Hub.

    Raises:
        ValueError: says what is wrong with the folder or the name.
    """
    if source == "demo":
        return Path(str(files("mrp_lens.data.world") / "model"))
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{path} holds an adapter and no model; merge it first: "
                "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
            )
        raise ValueError(
            f"{path} holds no config.json; give a Hugging Face model folder (one written by save_pretrained)"
        )
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise ValueError(
            f"no folder at {str(source)!r}; give 'demo', a Hugging Face model folder, or a Hub name such as 'org/name'"
        )
    return None


def find_folder(source: str | Path) -> Path:
    """The folder of a name or path; what is on the Hub is downloaded.

    Raises:
        ValueError: says what is wrong with the folder or the name.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=list(OTHER_FORMATS)))
    except Exception as error:
        raise ValueError(
            f"{str(source)!r} is neither a local folder nor to be had from the Hugging Face Hub: {error}"
        ) from error


def checked_config(folder: Path, name: str) -> dict[str, Any]:
    """A folder's configuration, after a look at what a stranger could have put into the folder.

    No code in the folder runs, here or later: `trust_remote_code` is never given.

    Raises:
        ValueError: a broken configuration, links or file names that lead out of the folder, sizes that the weights do not
            have, or an architecture that only code in the folder knows.
    """
    from transformers import CONFIG_MAPPING

    check_links(folder)
    config = read_object(folder / "config.json")
    check_shards(folder)
    check_sizes(config, count_parameters(folder), name)
    kind = config.get("model_type")
    if not isinstance(kind, str) or (kind not in CONFIG_MAPPING and not kind.startswith(EDITED)):
        own_code = "; it brings code of its own, which is never run here" if config.get("auto_map") else ""
        raise ValueError(
            f"{name}: its config.json says model_type {kind!r}, which transformers {transformers_version()} does not know{own_code}"
        )
    if config.get("auto_map") and not kind.startswith(EDITED):
        warnings.warn(
            f"{name} brings code of its own (auto_map in its config.json), which is never run here: it is loaded as the {kind} model of "
            f"transformers {transformers_version()}",
            stacklevel=6,  # the line that calls load_model
        )
    return config


def transformers_version() -> str:
    """Of the installed transformers."""
    from transformers import __version__

    return str(__version__)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder.

    Raises:
        ValueError: too large, not JSON, or not an object.
    """
    return read_json(file, "a configuration is one object of some kilobytes: download it again", largest=LARGEST_CONFIG)


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


def is_count(value: Any) -> bool:
    """Whether a setting is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def count_parameters(folder: Path) -> int:
    """Numbers stored in the weight files that are loaded (from their headers where they are safetensors).

    Raises:
        ValueError: the folder holds no weights, or broken ones.
    """
    safe, torch_files = (sorted(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    loaded = weight_files(folder) or safe or torch_files  # config.json may give the weights another name
    if not loaded:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    return sum(_numbers_in(file) for file in loaded)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, by their usual names: a whole one before shards, safetensors before pickled ones. Others
    that lie beside, such as `consolidated.safetensors`, hold the same weights once more.

    Args:
        folder: whose index names files in it (`check_shards`).
    """
    for name, index in zip(WHOLE, INDEXES, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return sorted({folder / shard for shard in read_object(folder / index)["weight_map"].values()})
    return []


def _numbers_in(file: Path) -> int:
    """Numbers in a weight file; of a pickled one, how many there are if each takes two bytes.

    Raises:
        ValueError: the file is broken.
    """
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        return file.stat().st_size // 2
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{file} is not a safetensors file: {one_line(error)}; download it again") from error


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. No code in the folder runs.

    Raises:
        ValueError: there is none, or a broken one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library panics with a BaseException
        raise ValueError(
            f"no usable tokenizer in {folder}: {one_line(error)}. Save one there with tokenizer.save_pretrained(...), or pass "
            "load_model(..., tokenizer=...)"
        ) from error


def config_of(source: str | Path) -> Any:
    """The configuration of the language model of a folder or name; of a name on the Hub `config.json` alone is downloaded, and no
    weights are looked at.

    Raises:
        ValueError: no such folder or name, a broken configuration or one that only code of its own can use, no language model,
            quantised weights, or an edited model with code of its own.
    """
    folder, name = local_folder(source), str(source)
    if folder is None:
        config, _ = language_config(name)
    else:
        check_links(folder)
        _refuse_edited(str(read_object(folder / "config.json").get("model_type")), name)
        config, _ = language_config(folder)
    refuse_quantised(getattr(config, "quantization_config", None), name)
    return config


def language_config(source: str | Path) -> tuple[Any, bool]:
    """The configuration of the language model of a folder, or of a name on the Hub, and whether that is part of a model that reads
    pictures too.

    Raises:
        ValueError: a broken configuration, or no language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = f"{source}/config.json"
    try:
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config = whole.get_text_config()
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(source, Path):
            raise ValueError(
                f"{source!r} is neither a local folder nor a model whose configuration is to be had from the Hugging Face Hub: {one_line(error)}"
            ) from error
        raise ValueError(f"transformers cannot use {place}: {one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{source} holds a {config.model_type} model, which is none that writes text; load_model takes causal language models"
        )
    for name in ("max_position_embeddings", "num_hidden_layers", "hidden_size", "vocab_size"):
        value = getattr(config, name, None)
        if value is not None and not is_count(value):
            raise ValueError(f"{place} says {name} = {value!r}; it must be a whole number above 0")
    window = getattr(config, "sliding_window", None)
    if window is not None and not isinstance(window, int):
        raise ValueError(f"{place} says sliding_window = {window!r}; it must be a number of tokens, or null")
    return config, config is not whole


def read_weights(folder: Path, dtype: torch.dtype, **placing: Any) -> Any:
    """The Hugging Face model of a folder, of one that reads pictures too its language model. No code in the folder runs.

    Args:
        folder: with the weights.
        dtype: of the parameters.
        placing: `device_map` and `max_memory` of `from_pretrained`. Without: on the CPU.

    Raises:
        ValueError: a broken configuration, no language model, or tensors that are missing or have other shapes than the
            configuration says, where transformers would fill in random weights.
    """
    from transformers import AutoModelForCausalLM

    config, is_part = language_config(folder)
    renamed = {"key_mapping": _LANGUAGE_PART} if is_part else {}
    # The Bridge computes attention eagerly; the same choice here keeps the comparison free of kernel differences.
    try:
        hf_model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            trust_remote_code=False,
            **renamed,
            **placing,
        )
    except Exception as error:  # shapes, pickled code (which is not run), broken files
        raise ValueError(
            f"the weights in {folder} cannot be loaded into the model of its config.json: {one_line(error)}"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing or loaded["mismatched_keys"]:
        raise ValueError(
            f"the weights in {folder} do not fill the model of its config.json: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])} ...), {len(loaded['mismatched_keys'])} have other shapes. "
            "Is this a language model's own checkpoint, and complete?"
        )
    return hf_model


def _check_head(source: Any) -> None:
    """Refuse a model that gives no logits of a next token.

    Raises:
        ValueError: names the class to load it with.
    """
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    wanted = known.get(type(source.config), None)
    if source.get_output_embeddings() is None or (wanted is not None and not isinstance(source, wanted)):
        remedy = "it is none that writes text" if wanted is None else f"load it as {wanted.__name__}"
        raise ValueError(
            f"a {type(source).__name__} has no language-model head, so it predicts no next token; {remedy}"
        )


def _refuse_offloaded(source: Any) -> None:
    """Refuse a model of which parts lie elsewhere.

    Raises:
        ValueError: says how to load it.
    """
    away = [name for name, parameter in source.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(
            f"parts of this model are offloaded to disk or were never filled (on the meta device: {away[0]} and {len(away) - 1} more), and "
            "cannot be read or written; load it whole, without an offload_folder, or give load_model the folder"
        )


def _refuse_hooked(source: Any) -> None:
    """Refuse a model that somebody has hooked: a copy would lose the hooks on one class and hide them on the other. And one into
    which an edit has written: the copy would take its matrices for the model's own.

    Raises:
        ValueError: names the module, or the matrix.
    """
    for name, module in source.named_modules():
        written = next((written for entry in entries_on(module) for written in entry.written), None)
        if written is not None:
            raise ValueError(
                f"an edit is on this model and has written {written.weight.name}; detach it first (edit.detach(hf_model)), load the bare "
                "model, and apply the edit there: edit.applied(model)"
            )
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            maker = getattr(hook, "func", hook)  # a partial's
            if not str(getattr(maker, "__module__", "")).startswith(("transformers.", "accelerate.")):
                raise ValueError(
                    f"hooks are on this model (at {name or 'its top'}), of an attached edit perhaps; detach it first, load the bare model, and "
                    "apply the edit there: edit.applied(model)"
                )


def _copied(source: Any, dtype: torch.dtype) -> Any:
    """A copy of a model in memory (TransformerBridge wraps the modules of what it is given), in a precision.

    Only parameters change their precision, as in `from_pretrained`: rotary angles in bfloat16 would be other angles.
    """
    own = _language_part(source)
    if hasattr(source, "hf_device_map"):
        from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]

        remove_hook_from_module(own, recurse=True)
        own.__dict__.pop("hf_device_map", None)
    for module in own.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    for parameter in own.eval().parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    own.set_attn_implementation("eager")
    return own


def _language_part(source: Any) -> Any:
    """A copy of a model, or of the text model inside one that reads pictures too."""
    from transformers import AutoModelForCausalLM

    config = source.config.get_text_config()
    if config is source.config:
        return copy.deepcopy(source)
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    inner = getattr(getattr(source, "model", None), "language_model", None)
    if type(inner) is not type(text.model):
        raise ValueError(
            f"where {type(source).__name__} keeps its language model is not known here; save it with save_pretrained(FOLDER) and load the folder"
        )
    text.model, text.lm_head = copy.deepcopy((inner, source.lm_head))  # together: tied tensors stay one
    return text
