"""What a model writes: answers, the same on both TransformerLens classes, and texts of its own."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mrp_lens.data import Document
from mrp_lens.data.tokenization import valid_id
from mrp_lens.models.backends import set_tokenizer
from mrp_lens.models.base import device_of, encoder_for, is_bridge
from mrp_lens.models.finite import non_finite
from mrp_lens.models.hooks import frozen
from mrp_lens.models.protocol import LensModel
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_whole, int_seed

AT_ONCE = 256  # texts written side by side


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        prompt: the prompt's token ids, BOS included where texts start with one.
        ids: those behind it, up to the first of `end_tokens`, and with it, if the model came to one.
        text: the same as text, special tokens and that end left out.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


def continuations(
    model: LensModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 12,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """What the model writes after each prompt, up to the first of `end_tokens`, special tokens left out.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        prompts: what it goes on from.
        max_new_tokens: of an answer, at most. Prompts are cut at their start where they would not leave room for them in the
            model's context; a UserWarning tells how many were.
        temperature: of the sampling; 0: greedy, the likeliest token each time.
        seed: of the sampling; the global random state is left as it is.
        progress: show a progress bar.

    Raises:
        NonFiniteError: its logits became NaN or infinite, after which any token would be as good.
        TypeError: one text in place of several.
        ValueError: a temperature below 0 or not finite, more new tokens than leave room for a prompt in the context, or an
            empty prompt, where the tokenizer has no BOS to start from.
    """
    answers = continued(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, progress=progress
    )
    return [answer.text for answer in answers]


@ordinary_torch(gradients=False)
def continued(
    model: LensModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> list[Continuation]:
    """`continuations` with their token ids; arguments and errors are the same."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number from 0 (greedy), got {temperature}")
    check_whole(max_new_tokens=max_new_tokens)
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be several texts, got one, {prompts[:40]!r}; put it into a list")
    context = int(model.cfg.n_ctx)
    if max_new_tokens > context - 2:  # a BOS and the end of the prompt come before
        raise ValueError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's context of {context} tokens; give at most {context - 2}"
        )
    documents = [Document("", prompt) for prompt in prompts]
    rows = encoder_for(model, max_length=context - max_new_tokens).encode(documents, keep="end")
    starts = [list(row.ids) for row in rows]
    if not all(starts):
        raise ValueError("a prompt is empty, and this model's texts start without BOS: there is nothing to go on from")
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    answers: dict[int, Continuation] = {}
    with frozen(model), torch.no_grad(), _drawing(seed):
        for place, ids in _side_by_side(model, starts, max_new_tokens, progress=progress, **how):
            text = str(model.tokenizer.decode(without_end(model, ids), skip_special_tokens=True)).strip()
            answers[place] = Continuation(tuple(starts[place]), tuple(ids), text)
    return [answers[place] for place in range(len(starts))]


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Inside, libraries that take no generator draw from this seed; the global random state is as before on exit."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(int_seed(seed))
        yield


@ordinary_torch(gradients=False)
def written_after(
    model: LensModel, prompts: Sequence[str], *, max_new_tokens: int, seed: int, progress: bool = True
) -> list[str]:
    """What the model writes from each prompt on, sampled at temperature 1: whole texts, in the order of the prompts.

    Args:
        model: HookedTransformer or TransformerBridge.
        prompts: what the texts begin with; an empty one is written from nothing (`start_token`).
        max_new_tokens: behind the prompt, at most; fewer where the context ends before. Of a prompt that fills the
            context only the start is read, with a warning. A text ends before the first of `end_tokens`.
        seed: of the sampling; the global random state is left as it is.
        progress: show a progress bar.

    Raises:
        ValueError: a prompt is empty, and the tokenizer has neither BOS nor EOS to start from; NonFiniteError where
            logits become NaN or infinite.
    """
    encoder = encoder_for(model, max_length=int(model.cfg.n_ctx) - 1)  # room for a token behind each
    rows = encoder.encode([Document("", prompt) for prompt in prompts])
    starts = [list(row.ids) or [start_token(model)] for row in rows]
    before = [0 if row.ids and row.content[0] else 1 for row in rows]  # the token that a text starts behind
    texts = [""] * len(starts)
    with frozen(model), torch.no_grad(), _drawing(seed):
        how = {"do_sample": True, "temperature": 1.0}
        for place, ids in _side_by_side(model, starts, max_new_tokens, progress=progress, **how):
            whole = [*starts[place][before[place] :], *without_end(model, ids)]
            text = model.tokenizer.decode(whole, skip_special_tokens=True)
            texts[place] = str(text).strip()
    return texts


def written_texts(model: LensModel, count: int, *, max_new_tokens: int, seed: int, progress: bool = True) -> list[str]:
    """Texts that the model writes from nothing, sampled at temperature 1; no text twice, in order of the alphabet.

    Args:
        model: HookedTransformer or TransformerBridge.
        count: how many are sampled; equal ones count once, so fewer may be left.
        max_new_tokens, seed, progress: as in `written_after`.

    Raises:
        ValueError: the tokenizer has neither BOS nor EOS to start from; NonFiniteError where logits become NaN or
            infinite.
    """
    texts = written_after(model, [""] * count, max_new_tokens=max_new_tokens, seed=seed, progress=progress)
    return sorted(set(texts) - {""})


def drawn_seed(generator: torch.Generator) -> int:
    """A seed for a library that takes no generator."""
    return int(torch.randint(2**31, (1,), generator=generator))


def end_tokens(model: LensModel) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's EOS, and those of the checkpoint's generation config, where alone many
    chat models name the end of a turn."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [model.tokenizer.eos_token_id, *(listed if isinstance(listed, list | tuple) else [listed])]
    return tuple(dict.fromkeys(token for token in ids if valid_id(token, int(model.W_E.shape[0]))))


def without_end(model: LensModel, ids: Sequence[int]) -> list[int]:
    """What is written, without the token that ends it."""
    return list(ids[:-1] if ids and ids[-1] in end_tokens(model) else ids)


def _side_by_side(
    model: LensModel, starts: Sequence[list[int]], max_new_tokens: int, *, progress: bool, **how: Any
) -> Iterator[tuple[int, list[int]]]:
    """The place of each start, and the ids that the model writes behind it, up to the first of `end_tokens`, and with it.

    Starts of equal length go side by side, so that none is padded, and a text does not depend on how a family treats
    padding.
    """
    ends = end_tokens(model)
    by_length: dict[int, list[int]] = {}
    for place, start in enumerate(starts):
        by_length.setdefault(len(start), []).append(place)
    with progress_bar(total=len(starts), desc="writing texts", progress=progress) as bar:
        for length, places in sorted(by_length.items()):
            room = min(max_new_tokens, int(model.cfg.n_ctx) - length)
            for begun in range(0, len(places), AT_ONCE):
                chosen = places[begun : begun + AT_ONCE]
                tokens = torch.tensor([starts[place] for place in chosen], device=device_of(model))
                rows = _written(model, tokens, max_new_tokens=room, **how)[:, length:].tolist()
                for place, ids in zip(chosen, rows, strict=True):
                    end = next((number for number, token in enumerate(ids, start=1) if token in ends), len(ids))
                    yield place, ids[:end]
                bar.update(len(chosen))


def _written(model: LensModel, tokens: Int[Tensor, "batch seq"], **how: Any) -> Int[Tensor, "batch longer"]:
    """The model's own `generate`, which would take NaN for a token, stopped where logits are not finite."""
    read: list[Tensor] = []
    ends = list(end_tokens(model))
    stopping: dict[str, Any] = {"stop_at_eos": True, "eos_token_id": ends} if ends else {"stop_at_eos": False}

    def remember(_module: Any, args: tuple[Any, ...]) -> None:
        read.append(args[0])

    def check(_module: Any, _args: Any, logits: Tensor) -> None:
        if not bool(logits[:, -1].amax(dim=-1).isfinite().all()):
            raise _NonFinite

    with ExitStack() as stack, suppress(_NonFinite), _unmasked(model):
        stack.callback(model.embed.register_forward_pre_hook(remember).remove)
        stack.callback(model.unembed.register_forward_hook(check).remove)
        output: Tensor = model.generate(
            tokens, prepend_bos=False, return_type="tokens", verbose=False, **stopping, **how
        )
        return output
    cached = len(read) > 1 and read[-1].shape[1] == 1  # then each pass read what was new
    whole = torch.cat(read, dim=1) if cached else read[-1]
    raise non_finite(model, whole, torch.ones_like(whole, dtype=torch.bool), "the logits of a text that is written")


@contextmanager
def _unmasked(model: LensModel) -> Iterator[None]:
    """Inside, `generate` of a HookedTransformer reads every token: from a tokenizer it would take which ones are pads, and a BOS whose id
    is the pad token's as well would be masked. Nothing is padded here."""
    if is_bridge(model):
        yield
        return
    tokenizer = model.tokenizer
    set_tokenizer(model, None)
    try:
        yield
    finally:
        set_tokenizer(model, tokenizer)


class _NonFinite(Exception):
    """Ends a model's `generate` at logits that are not finite."""


def can_start(model: LensModel) -> bool:
    """Whether the model can write from nothing: it has a `start_token`."""
    return bool(_starts(model))


def start_token(model: LensModel) -> int:
    """What a text of the model's own starts from: BOS, or EOS where there is none.

    A text from nothing needs a token to start behind. Models without BOS are trained on documents with EOS between
    them, so EOS is what comes before a text there; a text that is given (`Encoder`) still starts with its own first token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    starts = _starts(model)
    if not starts:
        raise ValueError(
            "this model's tokenizer has neither a BOS nor an EOS token, so it cannot start texts of its own"
        )
    return starts[0]


def _starts(model: LensModel) -> list[int]:
    tokens = (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id)
    return [int(token) for token in tokens if token is not None]
