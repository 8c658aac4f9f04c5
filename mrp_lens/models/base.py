"""What is asked of a loaded model everywhere: its class, precision and device, a pass over tokens, and its encoder."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import Encoder
from mrp_lens.models.protocol import LensModel
from mrp_lens.utils.validation import whole_numbers


def is_bridge(model: LensModel) -> bool:
    """Whether this is a TransformerBridge (True) or a HookedTransformer (False).

    Raises:
        TypeError: it is neither; says how to load it.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "TransformerBridge" in kinds:
        return True
    if "HookedTransformer" in kinds:
        return False
    raise TypeError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; a Hugging Face model, a folder or a name is loaded "
        "with mrp_lens.load_model(...)"
    )


def check_lens_model(model: Any) -> None:
    """Refuse what is not a model of TransformerLens, such as a plain Hugging Face model.

    Raises:
        TypeError: says how to load it.
    """
    is_bridge(model)


def dtype_named(dtype: Any) -> torch.dtype:
    """A precision that a model can have: "bfloat16", "torch.bfloat16" and torch.bfloat16 are one.

    Raises:
        ValueError: none of float16, bfloat16, float32, float64.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found in (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        raise ValueError(f"unknown dtype {dtype!r}; give 'float32', 'bfloat16' or 'float16'")
    return found


def device_named(device: Any) -> torch.device:
    """A device by its name; None: a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}; give 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {device!r} here: torch sees {torch.cuda.device_count()} GPUs; give 'cpu'")
    return found


def architecture_of(model: LensModel) -> str:
    """Hugging Face's name of the model's class, such as "LlamaForCausalLM"."""
    return str(model.cfg.architecture if is_bridge(model) else model.cfg.original_architecture)


def device_of(model: LensModel) -> torch.device:
    """Where its embedding lies, and so where batches go; of a model on several devices the first in a pass."""
    return model.W_E.device


def devices_of(model: LensModel) -> set[torch.device]:
    """All devices that hold a part of it."""
    return {parameter.device for parameter in model.parameters()}


def device_at(model: LensModel, layer: int) -> torch.device:
    """Where a block lies."""
    return next(iter(model.blocks[layer].parameters())).device


def dtype_of(model: LensModel) -> torch.dtype:
    """The precision of its first tensor."""
    return next(iter(model.parameters())).dtype


def modules_of(model: LensModel) -> list[torch.nn.Module]:
    """Every module that takes part in a pass, once: of a Bridge also those that none of its components stands for.

    Its own `modules()` leaves out the Hugging Face model's outermost ones, the dropout behind GPT-2's embeddings among
    them, although its `train()` reaches them.
    """
    found = list(model.modules())
    if is_bridge(model):
        found += model.original_model.modules()  # type: ignore[attr-defined]
    return list(dict.fromkeys(found))


def available_backends() -> tuple[str, ...]:
    """("hooked", "bridge"), or ("bridge",) where TransformerLens no longer has HookedTransformer (from 4.0 on)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return ("bridge",)
    return ("hooked", "bridge")


def check_layers(model: LensModel, layers: Iterable[int]) -> tuple[int, ...]:
    """The layers in ascending order, without repeats.

    Raises:
        TypeError: a single number instead of a list, or a layer that is no whole number.
        ValueError: no layer, or one outside 0..n_layers-1.
    """
    check_lens_model(model)
    chosen = sorted(set(whole_numbers(layers, "layers")))
    if not chosen:
        raise ValueError("no layers given; name at least one, such as layers=[3]")
    for layer in chosen:
        if not 0 <= layer < model.cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range: this model has layers 0..{model.cfg.n_layers - 1}")
    return tuple(chosen)


def forward(
    model: LensModel, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"], cache: Any = None
) -> Any:
    """A forward pass, always with the attention mask; what a row gives does not depend on the others.

    Args:
        model: HookedTransformer or TransformerBridge.
        tokens: of the pass.
        attention_mask: of the tokens; with a cache of Hugging Face's also of what it holds, in front.
        cache: keys and values of the tokens before, to which those of this pass are added. None: nothing comes before.
    """
    if is_bridge(model):
        how = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    else:
        how = {} if cache is None else {"past_kv_cache": cache}
    with each_row_alone(model, attention_mask):
        return model(tokens, attention_mask=attention_mask.long(), return_type="logits", **how)


def logits_of(
    model: LensModel, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq d_vocab"]:
    """Logits of a padded batch."""
    logits: Tensor = forward(model, tokens, attention_mask)
    return logits.to(tokens.device)


def logits_at(
    model: LensModel,
    tokens: Int[Tensor, "batch seq"],
    attention_mask: Bool[Tensor, "batch seq"],
    positions: Bool[Tensor, "batch seq"],
    cache: Any = None,
) -> Float[Tensor, "chosen d_vocab"]:
    """Logits at some positions of a padded batch, row by row; no others are computed, which with a large vocabulary would
    take more memory than everything else. They are where the tokens are; arguments as for `forward`."""
    chosen = False

    def choose(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal chosen
        chosen = True
        return (args[0][positions.to(args[0].device)][None], *args[1:])

    handle = model.unembed.register_forward_pre_hook(choose)
    try:
        logits: Tensor = forward(model, tokens, attention_mask, cache)
    finally:
        handle.remove()
    logits = logits.to(tokens.device)
    return logits[0] if chosen else logits[positions]


@contextmanager
def each_row_alone(model: Any, attention_mask: Bool[Tensor, "batch seq"]) -> Iterator[None]:
    """Inside, a text has the positions that it has alone, whatever it is batched with.

    "longrope" (Phi-3 with long context) has two sets of frequencies, and transformers takes for a whole batch the one
    that its longest row calls for: a text up to `original_max_position_embeddings` would be read as another model's
    beside a longer one.

    Args:
        model: HookedTransformer (which has no such rule) or TransformerBridge.
        attention_mask: True at real tokens.
    """
    limit = _limit(model)
    short = attention_mask.sum(dim=1) <= limit
    if not limit or attention_mask.shape[1] <= limit or not bool(short.any()):
        yield
        return
    # Positions count from a row's first token: all differences are as before, and none is beyond the limit.
    places = (attention_mask.long().cumsum(dim=1) - 1).clamp(0, limit - 1)

    def of_each_row(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, ...]:
        states = args[0] if args else kwargs["x"]
        with torch.no_grad():
            shorter = module.forward(states, places)
        return tuple(torch.where(short[:, None, None], own, whole) for own, whole in zip(shorter, output, strict=True))

    with ExitStack() as stack:
        for module in model.original_model.modules():
            if getattr(module, "rope_type", None) == "longrope":
                stack.callback(module.register_forward_hook(of_each_row, with_kwargs=True).remove)
        yield


def same_positions(model: Any, length: int, other: int) -> bool:
    """Whether the beginning of a text has the same states in two texts of these lengths, in tokens; False where
    "longrope" reads the longer one with its other frequencies."""
    limit = _limit(model)
    return (length <= limit) == (other <= limit)


def reads_by_length(model: Any) -> bool:
    """Whether how the beginning of a text is read depends on how long the text is ("longrope")."""
    return _limit(model) > 0


def _limit(model: Any) -> int:
    """Tokens beyond which "longrope" takes its other frequencies; 0 for all other rules."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    rule = getattr(config, "rope_parameters", None) or {}
    return int(rule.get("original_max_position_embeddings") or 0) if rule.get("rope_type") == "longrope" else 0


def encoder_for(
    model: LensModel,
    *,
    prepend_bos: bool | None = None,
    append_eos: bool = False,
    max_length: int | None = None,
) -> Encoder:
    """The encoder of a model.

    Args:
        model: HookedTransformer or TransformerBridge.
        prepend_bos: start each document with BOS, unless its text does. None: as `cfg.default_prepend_bos` says, where
            the tokenizer has a BOS; else a document starts with its own first token.
        append_eos: end each document with EOS.
        max_length: tokens at which documents are cut, BOS and EOS included. None: the context length `cfg.n_ctx`.

    Raises:
        TypeError: not a model of TransformerLens.
        ValueError: the model has no tokenizer, its tokenizer lacks the BOS or EOS that is asked for, or `max_length` is
            not from 2 to the context length.
    """
    check_lens_model(model)
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer; set one with model.set_tokenizer(...) or load a folder that holds one"
        )
    context = int(model.cfg.n_ctx)
    if max_length is not None and not 2 <= max_length <= context:
        raise ValueError(
            f"max_length {max_length} must be from 2 to the model's context length {context}; leave it out to use all of it"
        )
    for asked, kind in ((prepend_bos, "bos"), (append_eos, "eos")):
        if asked and getattr(model.tokenizer, f"{kind}_token_id") is None:
            raise ValueError(f"this model's tokenizer has no {kind.upper()} token to put to a document; leave it out")
    bos = bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos
    return Encoder(
        tokenizer=model.tokenizer,
        prepend_bos=bos and model.tokenizer.bos_token_id is not None,
        append_eos=append_eos,
        max_length=context if max_length is None else max_length,
        rows=int(model.W_E.shape[0]),
        device=device_of(model),
    )
