"""A NaN is never a number: what is not finite is refused with the first place where it appears, the precision and the remedy."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.models.base import dtype_of, forward
from mrp_lens.models.hooks import HookFunction, frozen, hook_name, hooked
from mrp_lens.models.protocol import LensModel

STOPS = ("attn_out", "mlp_out", "resid_post")  # where the stream is looked at in each layer, in the order of the pass


class NonFiniteError(ValueError):
    """A state, a logit or a derivative is NaN or infinite, so that no figure can be made of it."""


def check_log_probabilities(
    model: LensModel, batch: TokenBatch, log_probabilities: Float[Tensor, "counted d_vocab"]
) -> None:
    """Refuse rows of a log-softmax that are NaN.

    That is what a NaN or +infinity among the logits of a row makes of all of it, and -infinity in all of them, so that one
    column tells. A logit of -infinity beside finite ones is no fault: the model rules that token out, at probability 0.

    Args:
        model: as it computed them, with the edit on if there is one.
        batch: that they belong to.
        log_probabilities: at some of its positions.

    Raises:
        NonFiniteError: names the first state of the batch that is NaN or infinite.
    """
    if bool(log_probabilities[:, :1].isnan().any()):
        raise non_finite(model, batch.tokens, batch.attention_mask, "the logits")


def check_states(model: LensModel, batch: TokenBatch, states: Mapping[str, Float[Tensor, "tokens d_model"]]) -> None:
    """Refuse states of real tokens that hold NaN or infinity; what padding holds, no figure sees.

    Args:
        model: as it computed them.
        batch: that they belong to.
        states: hook name -> states.

    Raises:
        NonFiniteError: names the first state of the batch that is NaN or infinite.
    """
    for name, of_hook in states.items():
        if not bool(torch.isfinite(of_hook).all()):
            raise non_finite(model, batch.tokens, batch.attention_mask, f"states at {name}")


def non_finite(
    model: LensModel, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"], what: str
) -> NonFiniteError:
    """The error that says where a batch first becomes NaN or infinite; to find that, the model reads the batch once more.

    Args:
        model: with the edit on, as it was when `what` came out.
        tokens: of the batch.
        attention_mask: True for real tokens; what stands at the others does not matter.
        what: that holds NaN or infinity, such as "the logits".
    """
    found: list[tuple[str, int]] = []

    def look(name: str) -> HookFunction:
        def hook(activation: Tensor, hook: Any) -> None:
            if not found and activation.shape[:2] == attention_mask.shape:
                bad = ~torch.isfinite(activation).all(dim=-1).to(attention_mask.device) & attention_mask
                if bool(bad.any()):
                    found.append((name, int(tokens[bad][0])))

        return hook

    names = ["hook_embed", hook_name(0, "resid_pre")]
    names += [hook_name(layer, stop) for layer in range(int(model.cfg.n_layers)) for stop in STOPS]
    known = model.hook_dict
    with frozen(model), torch.no_grad(), hooked(model, [(name, look(name)) for name in names if name in known]):
        logits = forward(model, tokens, attention_mask)
    if found:
        name, token = found[0]
        where = f"the first state that does is {name}, at the token {_text_of(model, token)}"
    elif not bool(logits[attention_mask.to(logits.device)].amax(dim=-1).isfinite().all()):
        where = "all states are finite, so it comes from the final norm or the unembedding"
    elif bool(logits[attention_mask.to(logits.device)].isinf().any()):
        where = "its logits of -infinity rule out a token that a text holds"
    else:
        where = "reading the same texts again gave finite values, so it comes from something random, such as an edit's noise"
    dtype = str(dtype_of(model)).removeprefix("torch.")
    padded = (
        ""
        if bool(attention_mask[:, 0].all())
        else ", and pad on the right: some models read NaN out of padding on the left"
    )
    return NonFiniteError(f"{what} hold NaN or infinity: {where}; the model is in {dtype}. {_remedy(model)}{padded}")


def check_finite(model: LensModel, values: Float[Tensor, "..."], what: str, *, remedy: str = "weaken the edit") -> None:
    """Refuse figures of which none may be NaN or infinite, where states and logits were finite.

    Args:
        model: as it computed them, with the edit on if there is one.
        values: the figures.
        what: they are, such as "the gradient".
        remedy: besides a wider precision.

    Raises:
        NonFiniteError: names the model's precision.
    """
    if not bool(torch.isfinite(values).all()):
        dtype = str(dtype_of(model)).removeprefix("torch.")
        raise NonFiniteError(
            f"{what} is NaN or infinite; the model is in {dtype}: load it in float32 or bfloat16, or {remedy}"
        )


def not_finite_weights(model: LensModel) -> list[str]:
    """The names of the model's weights that hold NaN or infinity themselves."""
    named = model.named_parameters()
    return [
        name.replace("._original_component", "") for name, tensor in named if not bool(torch.isfinite(tensor).all())
    ]


def _remedy(model: LensModel) -> str:
    broken = not_finite_weights(model)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f"Its weight {broken[0]}{more} holds NaN or infinity itself: load an undamaged checkpoint, or take off the edit that wrote it"
    if dtype_of(model) == torch.float16:
        return "Its weights are finite, but float16 ends at 65504: load it in float32 or bfloat16, or weaken the edit"
    return "Its weights are finite: weaken the edit, if one is on; else load it in float32 or a wider precision"


def _text_of(model: LensModel, token: int) -> str:
    text = "" if model.tokenizer is None else f"{str(model.tokenizer.decode([token]))!r}, "
    return f"{text}id {token}"
