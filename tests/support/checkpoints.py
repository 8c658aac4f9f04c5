"""Tiny checkpoints as they come out of other people's hands: each function changes a saved one in place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens.models.architectures import layout_of

WEIGHTS = "model.safetensors"


def set_config(folder: Path, **settings: Any) -> None:
    """Write settings into config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def set_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in change(tensors_in(folder)).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def tensors_in(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def ends(folder: Path) -> tuple[str, str]:
    """The names of embedding and unembedding in the files of the folder."""
    layout = layout_of(json.loads((folder / "config.json").read_text())["architectures"][0])
    return f"{layout.embeddings[0]}.weight", f"{layout.head}.weight"


def own_head_under_a_tied_config(folder: Path) -> None:
    embedding, head = ends(folder)
    set_tensors(folder, lambda t: {**t, head: t[embedding].flip(0)})
    set_config(folder, tie_word_embeddings=True)


def identical_head_under_a_tied_config(folder: Path) -> None:
    embedding, head = ends(folder)
    set_tensors(folder, lambda t: {**t, head: t[embedding]})
    set_config(folder, tie_word_embeddings=True)


def identical_head_under_an_untied_config(folder: Path) -> None:
    embedding, head = ends(folder)
    set_tensors(folder, lambda t: {**t, head: t[embedding]})
    set_config(folder, tie_word_embeddings=False)


def head_alone_under_a_tied_config(folder: Path) -> None:
    embedding, head = ends(folder)
    set_tensors(folder, lambda t: {head: t[embedding], **{k: v for k, v in t.items() if k not in (embedding, head)}})
    set_config(folder, tie_word_embeddings=True)


def tied_left_to_the_default(folder: Path) -> None:
    if "mistral" in json.loads((folder / "config.json").read_text())["model_type"]:  # tied here, and not by default
        identical_head_under_an_untied_config(folder)
    set_config(folder, tie_word_embeddings=...)


def own_head_and_tied_left_to_the_default(folder: Path) -> None:
    own_head_under_a_tied_config(folder)
    set_config(folder, tie_word_embeddings=...)


def own_head_under_the_name_of_transformers(folder: Path) -> None:
    embedding, head = ends(folder)
    set_tensors(folder, lambda t: {"lm_head.weight": t[embedding].flip(0), **{k: v for k, v in t.items() if k != head}})
    set_config(folder, tie_word_embeddings=False)


def padded_vocabulary(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 61)
    with torch.no_grad():
        for parameter in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            parameter[-61:] = 0.05 * torch.randn(parameter[-61:].shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)


def other_architectures(folder: Path) -> None:
    set_config(folder, architectures=["T5Model"])


def no_architectures(folder: Path) -> None:
    set_config(folder, architectures=...)


def old_dtype(folder: Path) -> None:
    set_tensors(folder, lambda t: {name: tensor.bfloat16() for name, tensor in t.items()})
    set_config(folder, dtype=..., torch_dtype="bfloat16")


def no_dtype(folder: Path) -> None:
    set_tensors(folder, lambda t: {name: tensor.bfloat16() for name, tensor in t.items()})
    set_config(folder, dtype=...)


def float64(folder: Path) -> None:
    set_tensors(folder, lambda t: {name: tensor.double() for name, tensor in t.items()})
    set_config(folder, dtype="float64")


def pickled_before_2020(folder: Path) -> None:
    torch.save(tensors_in(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / WEIGHTS).unlink()


def generation_settings_that_cannot_be_saved(folder: Path) -> None:
    settings = {"do_sample": False, "temperature": 0.3, "top_p": 0.5, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def no_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(folder)


def masks_of_old_files(folder: Path) -> None:
    layout = layout_of(json.loads((folder / "config.json").read_text())["architectures"][0])
    mask = torch.ones(4, 4, dtype=torch.uint8).tril()
    set_tensors(folder, lambda t: {**t, f"{layout.block(0)}.attn.bias_mask": mask})


VARIANTS: dict[str, Callable[[Path], None]] = {
    change.__name__.replace("_", " "): change
    for change in (
        own_head_under_a_tied_config,
        identical_head_under_a_tied_config,
        identical_head_under_an_untied_config,
        head_alone_under_a_tied_config,
        tied_left_to_the_default,
        own_head_and_tied_left_to_the_default,
        own_head_under_the_name_of_transformers,
        padded_vocabulary,
        other_architectures,
        no_architectures,
        old_dtype,
        no_dtype,
        float64,
        pickled_before_2020,
        generation_settings_that_cannot_be_saved,
        no_special_tokens,
        masks_of_old_files,
    )
}
