"""The tokenizer inside a loaded model: the one that was given, with its own BOS or none."""

import copy
from typing import Any

from mrp_lens.model.boot import set_tokenizer


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


def valid_id(token: Any, rows: int) -> bool:
    """Whether the embedding has a row for a token id."""
    return isinstance(token, int) and 0 <= token < rows


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


def without_row(text: str, token: int, rows: int) -> str:
    """What is wrong with a token id, and what helps."""
    return (
        f"the token {text!r} has id {token}, and the model's embedding has {rows} rows (0..{rows - 1}); pass the tokenizer that the model "
        "was trained with, or resize the model first: hf_model.resize_token_embeddings(len(tokenizer)), then load_model(hf_model, tokenizer=...)"
    )
