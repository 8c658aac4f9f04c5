"""The checkpoint that a model was loaded from, whether it is still that model, and its tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch

from mrp_lens.edits import Edit
from mrp_lens.export.checkpoint import TOKENIZER_SETTINGS, HFCheckpoint
from mrp_lens.models import LensModel, architecture_of, device_of, dtype_of, hf_state, load_model, why_not_exportable
from mrp_lens.models.architectures import LAYOUTS, layout_of
from mrp_lens.models.source import find_folder, read_object
from mrp_lens.utils.io import write_json

OF_TOKENIZERS = (  # files that say what a tokenizer does; transformers reads what lies there, whatever else was written
    *("tokenizer*", "chat_template.*", "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)
RULES = ("normalizer", "pre_tokenizer", "model", "decoder")  # of tokenizer.json; its post-processor adds special tokens


def base_of(model: LensModel, base: str | Path | None) -> HFCheckpoint:
    """The checkpoint that the model was loaded from, or the one that is named.

    Raises:
        ValueError: an unknown architecture, weights that no checkpoint has, or no folder to be found.
    """
    layout_of(architecture_of(model))
    reason = why_not_exportable(model)
    if reason is not None:
        raise ValueError(
            f"{reason}: no Hugging Face checkpoint holds these weights. Load the model with mrp_lens.load_model(...) and fit the edit there"
        )
    name = str(model.cfg.model_name) if base is None else base
    if name in LAYOUTS:  # a class: the model came out of memory, from no folder
        raise ValueError(
            "this model was loaded from memory: save the Hugging Face model with save_pretrained(FOLDER), and give base=FOLDER"
        )
    try:
        folder = find_folder(name)
    except ValueError as error:
        raise ValueError(f"{error}. Which checkpoint was this model loaded from? Say it with base=FOLDER") from error
    return HFCheckpoint.open(folder)


def write_tokenizer(folder: Path, model: LensModel, base: HFCheckpoint, *, name_class: bool) -> Any | None:
    """Replace the tokenizer that was copied from the base by the model's own, where that is another: tokens were added in
    memory, the chat template was changed, or texts become tokens by other rules, such as a normaliser that lowers their case.

    Special tokens count where the base has others; TransformerLens sets some where there are none.

    Args:
        folder: what is being written, with the base's files in it.
        model: whose tokenizer it is to be.
        base: the checkpoint that the model was loaded from.
        name_class: say of which class the base's is, which transformers else tells from the model type.

    Returns:
        The model's tokenizer, if it was written; None: the base's is right as it is.
    """
    own, stored = model.tokenizer, _tokenizer_in(base.folder)
    if (
        stored is None
        or own.get_vocab() != stored.get_vocab()
        or own.chat_template not in (None, stored.chat_template)
        or _have_other_rules(own, stored)
        or any(getattr(stored, name) not in (None, getattr(own, name)) for name in ("bos_token", "eos_token"))
    ):
        for file in (file for pattern in OF_TOKENIZERS for file in folder.glob(pattern)):
            file.unlink()
        own.save_pretrained(folder)
        return own
    settings = read_object(folder / TOKENIZER_SETTINGS) if (folder / TOKENIZER_SETTINGS).is_file() else {}
    if name_class and settings.get("tokenizer_class") != type(stored).__name__:
        write_json(folder / TOKENIZER_SETTINGS, {**settings, "tokenizer_class": type(stored).__name__})
    return None


def _tokenizer_in(folder: Path) -> Any | None:
    """The tokenizer of a folder; None if there is none that transformers can use."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # of any kind
        return None


def _have_other_rules(own: Any, stored: Any) -> bool:
    """Whether a text becomes other tokens, or tokens another text, special tokens aside; not known of a tokenizer in Python."""
    if not all(hasattr(tokenizer, "backend_tokenizer") for tokenizer in (own, stored)):
        return False
    mine, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (own, stored))
    return any(mine.get(name) != theirs.get(name) for name in RULES)


def check_unedited(model: LensModel, edit: Edit, base: HFCheckpoint) -> None:
    """Refuse a model with hooks on, with which the proof would compare; one that the edit was not made for; and a checkpoint
    that differs from the model in any tensor, in the model's precision.

    A HookedTransformer stores its weights in other shapes, so there the checkpoint is loaded once more to compare.

    Raises:
        ValueError: names the hook point or the tensor.
    """
    hooked = [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    if hooked:
        raise ValueError(
            f"hooks are on this model (at {hooked[0]}), of an attached edit perhaps, and would go into the comparison; "
            "edit.detach(model) or model.reset_hooks(including_permanent=True) first"
        )
    with edit.applied(model):  # raises where it cannot be
        pass
    dtype = dtype_of(model)
    state = hf_state(model)
    if state is None:
        other = load_model(base.folder, backend="hooked", dtype=dtype, device=device_of(model))
        theirs = dict(other.named_parameters())
        different = [name for name, values in model.named_parameters() if not torch.equal(values, theirs[name])]
    else:
        head = f"{base.layout.head}.weight"  # transformers 5 calls every unembedding lm_head
        names = {name: "lm_head.weight" if name == head else name for name in base.files}
        # What the model does not hold are masks and frequencies in old files.
        shared = {name: state[own] for name, own in names.items() if own in state}
        different = [name for name, held in shared.items() if not torch.equal(held.cpu(), base.read(name).to(dtype))]
    if different:
        raise ValueError(
            f"{base.folder} is not the checkpoint of this model: {different[0]} differs. Give base=FOLDER of the checkpoint that the model "
            "was loaded from; one that was changed in memory has to be saved first (save_pretrained)"
        )
