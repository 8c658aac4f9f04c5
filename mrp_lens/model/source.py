"""Where a model comes from: the embedded one, a folder, the Hub or a loaded Hugging Face model; checked before use."""

import copy
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
EDITED = "mrp_lens_"  # how the model type of an export with code of its own begins


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model in memory, its tokenizer, and a folder with the configuration of both."""

    name: str
    folder: Path
    hf_model: Any
    tokenizer: Any


@contextmanager
def opened(source: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype, copies: int) -> Iterator[Checkpoint]:
    """The checkpoint behind what a user gave to `load_model`; `copies` is how many of it must fit into memory.

    Raises:
        TypeError: not a name, a path or a Hugging Face model.
        ValueError: nothing there, an adapter without its model, quantised weights, missing weights, no tokenizer, or
            too little memory.
    """
    if isinstance(source, (str, Path)):
        folder = find_folder(source)
        config = json.loads((folder / "config.json").read_text())
        refuse_quantised(config.get("quantization_config"), str(source))
        _refuse_edited(str(config.get("model_type")), str(source))
        check_memory(count_parameters(folder), device, dtype, copies, str(source))
        used = tokenizer if tokenizer is not None else read_tokenizer(folder)
        name = "demo" if source == "demo" else str(source)
        yield Checkpoint(name, folder, read_weights(folder, dtype).to(device).eval(), used)
        return
    if hasattr(source, "merge_and_unload"):
        raise ValueError("this model carries an adapter; merge it first and pass what model.merge_and_unload() returns")
    if not (hasattr(source, "config") and hasattr(source, "save_pretrained") and hasattr(source, "parameters")):
        raise TypeError(
            f"cannot load a {type(source).__name__}; give 'demo', a Hugging Face model folder, a Hub name, or a loaded "
            "Hugging Face model with a language-model head. A HookedTransformer or TransformerBridge needs no loading"
        )
    refuse_quantised(getattr(source.config, "quantization_config", None), type(source).__name__)
    name = str(getattr(source.config, "_name_or_path", "") or type(source).__name__)
    _refuse_edited(str(source.config.model_type), name)
    if tokenizer is None:
        if not Path(name).is_dir():
            raise ValueError("a loaded Hugging Face model brings no tokenizer; pass load_model(model, tokenizer=...)")
        tokenizer = read_tokenizer(Path(name))
    parameters = sum(parameter.numel() for parameter in source.parameters())
    check_memory(parameters, device, dtype, copies, name)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        source.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # A copy: TransformerBridge wraps the modules of the model that it is given.
        own = copy.deepcopy(source).to(device, dtype).eval()
        own.set_attn_implementation("eager")
        yield Checkpoint(name, Path(temporary), own, tokenizer)


def find_folder(source: str | Path) -> Path:
    """The folder of a name or path; what is on the Hub is downloaded.

    Raises:
        ValueError: says what is wrong with the folder or the name.
    """
    if source == "demo":
        return Path(str(files("mrp_lens.world") / "data"))
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
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]))
    except Exception as error:
        raise ValueError(
            f"{str(source)!r} is neither a local folder nor to be had from the Hugging Face Hub: {error}"
        ) from error


def refuse_quantised(setting: Any, name: str) -> None:
    """Edits need the weights themselves.

    Raises:
        ValueError: the configuration says that the weights are quantised.
    """
    if setting:
        method = setting.get("quant_method") if isinstance(setting, dict) else getattr(setting, "quant_method", None)
        raise ValueError(
            f"{name} is quantised ({method or 'see quantization_config'}): its matrices are packed integers that can be "
            "neither projected exactly nor trained. Load the checkpoint in float32, bfloat16 or float16"
        )


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


def count_parameters(folder: Path) -> int:
    """Numbers stored in the weight files (from their headers where they are safetensors).

    Raises:
        ValueError: the folder holds no weights.
    """
    from safetensors import safe_open

    total = 0
    safe, torch_files = (sorted(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    if not safe and not torch_files:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    for file in safe:
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total or sum(file.stat().st_size for file in torch_files) // 2


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
    import psutil

    return int(psutil.virtual_memory().available)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"no usable tokenizer in {folder}: {error}. Save one there with tokenizer.save_pretrained(...), or pass "
            "load_model(..., tokenizer=...)"
        ) from error


def read_weights(folder: Path, dtype: torch.dtype) -> Any:
    """The Hugging Face model of a folder, refused where transformers would fill in random weights.

    Raises:
        ValueError: tensors are missing or have other shapes than the configuration says.
    """
    from transformers import AutoModelForCausalLM

    # The Bridge computes attention eagerly; the same choice here keeps the comparison free of kernel differences.
    hf_model, loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    missing = sorted(loaded["missing_keys"])
    if missing or loaded["mismatched_keys"]:
        raise ValueError(
            f"the weights in {folder} do not fill the model of its config.json: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])} ...), {len(loaded['mismatched_keys'])} have other shapes. "
            "Is this a language model's own checkpoint, and complete?"
        )
    return hf_model
