"""A Hugging Face model inside one of TransformerLens's two classes, its weights and its tokenizer as they are.

TransformerLens is imported where it is used: that takes seconds, and 4.x has no HookedTransformer to import.
"""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from mrp_lens.data.tokenization import valid_id, without_row

Kind = Literal["hooked", "bridge"]


def boot(kind: Kind, hf_model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A HookedTransformer filled from the model, or a TransformerBridge around its modules; without tokenizer.

    Raises:
        ImportError: there is no HookedTransformer in this TransformerLens.
        Exception: TransformerLens raises all kinds for what it does not know.
    """
    return (_boot_hooked if kind == "hooked" else _boot_bridge)(hf_model, device, dtype).eval()


def _boot_bridge(hf_model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    placed = None if hasattr(hf_model, "hf_device_map") else device  # else each layer is where its map says
    model = TransformerBridge.boot_transformers(
        "local", hf_model=hf_model, tokenizer=_stand_in(), device=placed, dtype=dtype
    )
    set_tokenizer(model, None)
    return model


def _boot_hooked(hf_model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """HookedTransformer's own loader refuses local folders; its parts do not."""
    try:
        from transformer_lens import HookedTransformer, loading_from_pretrained
    except ImportError as error:
        raise ImportError(
            "HookedTransformer exists in TransformerLens 3 only; use backend='bridge' or install transformer-lens<4"
        ) from error
    # The architecture is guessed from the path: "llama" or "gemma" in it would misroute.
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as neutral:
        settings = json.loads(hf_model.config.to_json_string(use_diff=False))
        settings["architectures"] = [type(hf_model).__name__]
        settings.setdefault("n_ctx", settings.get("n_positions") or settings.get("max_position_embeddings"))
        (Path(neutral) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            neutral, fold_ln=False, device=str(device), dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
    cfg.tokenizer_name = None  # it would be read from the folder's path
    cfg.n_ctx = int(settings["n_ctx"])  # some families are capped at 2,048 tokens, or raised to them
    model = HookedTransformer(cfg, move_to_device=False)
    unchanged = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(state, **unchanged)
    _lay_out(model)
    return model.to(device, print_details=False)


def _lay_out(model: Any) -> None:
    """Place the numbers of its matrices in memory as its passes read them; their values and shapes are as before.

    A pass multiplies by `W.T.contiguous()`, a copy of every matrix, the unembedding's vocabulary included, each time. Of a
    matrix whose transpose lies in memory row by row that is no copy: a sixth of the time of a training step of SmolLM2-135M,
    and more of a token that is written, for which as much is copied as for a batch.
    """
    transposed = [module for module in model.modules() if type(module).__name__ in ("GatedMLP", "Unembed")]
    matrices = [parameter for module in transposed for parameter in module.parameters() if parameter.ndim == 2]
    for parameter in matrices:
        parameter.data = parameter.data.T.contiguous().T
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2].removeprefix("_")  # with an underscore where several heads share keys and values
        if kind in ("W_Q", "W_K", "W_V") and parameter.ndim == 3:  # head d_model d_head
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
        elif kind == "W_O" and parameter.ndim == 3:  # head d_head d_model
            parameter.data = parameter.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def set_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give a model a tokenizer as it is: both classes would read another from disk and set special tokens on it."""
    model.__dict__["_tokenizer" if hasattr(type(model), "tokenizer") else "tokenizer"] = tokenizer


@cache
def _stand_in() -> Any:
    """A tokenizer that TransformerLens finds nothing to change about."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "a")
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, name_or_path="", add_bos_token=True, **special)


def give_tokenizer(model: Any, tokenizer: Any) -> None:
    """Put a copy of a tokenizer into a model, and make `model.to_tokens` start texts as `mrp_lens` does.

    TransformerLens would read it again from disk, put EOS where there is no BOS, and set special tokens on the caller's
    own. Here texts start with BOS where TransformerLens says so for the architecture and the tokenizer has one, and
    otherwise with nothing.

    Raises:
        ValueError: BOS or EOS has no row in the embedding.
    """
    own = copy.deepcopy(tokenizer)
    rows = int(model.W_E.shape[0])
    check_special_tokens(own, rows)
    if not valid_id(own.pad_token_id, rows):  # masked everywhere, so any will do; TransformerLens's own choice is EOS
        own.pad_token = own.eos_token if own.eos_token_id is not None else own.convert_ids_to_tokens(0)
    cfg = model.cfg
    cfg.default_prepend_bos = bool(cfg.default_prepend_bos) and own.bos_token_id is not None
    if cfg.default_prepend_bos and _bos_changes_the_text(own):
        own.add_bos_token = True
    # Where it finds no such flag, TransformerLens replaces a tokenizer that is assigned again by the one on disk.
    own.init_kwargs = {**own.init_kwargs, "name_or_path": own.name_or_path, "add_bos_token": True}
    ids = own("a")["input_ids"]
    cfg.tokenizer_prepends_bos = own.bos_token_id is not None and ids[:1] == [own.bos_token_id]
    cfg.tokenizer_appends_eos = own.eos_token_id is not None and len(ids) > 1 and ids[-1] == own.eos_token_id
    set_tokenizer(model, own)


def _bos_changes_the_text(tokenizer: Any) -> bool:
    """Whether the text behind a BOS becomes other tokens (where a space goes in front of a text only), and that can be helped."""
    if not hasattr(tokenizer, "add_bos_token"):
        return False
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    behind = tokenizer(f"{tokenizer.bos_token}a", add_special_tokens=False)["input_ids"]
    return bool(behind != [tokenizer.bos_token_id, *alone])


def check_special_tokens(tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer whose BOS or EOS the embedding has no row for. (Padding may be any id.)

    Raises:
        TypeError: not a tokenizer of transformers.
        ValueError: names the token, its id and the number of rows.
    """
    for kind in ("bos", "eos"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None and not valid_id(token, rows):
            text = getattr(tokenizer, f"{kind}_token")
            raise ValueError(f"{kind.upper()}, {without_row(text, token, rows)}")
