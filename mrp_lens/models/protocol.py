"""The type of a model: what HookedTransformer and TransformerBridge have in common.

Both classes of TransformerLens 3.9 and 4.3 satisfy it, also for a type checker. Where their own annotations say less than is
true of a loaded model, the type here is `X | Any`: an editor shows X, and neither class is refused.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:  # transformers and TransformerLens take seconds to import
    from transformer_lens import ActivationCache
    from transformer_lens.config import TransformerLensConfig
    from transformer_lens.hook_points import HookPoint
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class LensModel(Protocol):
    """A model of TransformerLens, as `load_model` returns it: called with texts or token ids [batch, seq], it gives logits
    [batch, seq, d_vocab]. What is not named here is in TransformerLens's documentation of its two classes."""

    training: bool

    @property
    def cfg(self) -> "TransformerLensConfig":
        """Sizes and settings: `n_layers`, `d_model`, `d_vocab`, `n_ctx`, ..."""
        ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | Any":
        """The checkpoint's own tokenizer."""
        ...

    @property
    def blocks(self) -> Any:
        """The layers, whose parts each class names in its own way."""
        ...

    @property
    def embed(self) -> torch.nn.Module | Any:
        """The token embedding."""
        ...

    @property
    def unembed(self) -> torch.nn.Module | Any:
        """From the stream behind the final norm to logits."""
        ...

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix of the token embedding."""
        ...

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The matrix of the unembedding."""
        ...

    @property
    def hook_dict(self) -> "dict[str, HookPoint]":
        """Hook points by name, aliases included."""
        ...

    @overload
    def __call__(
        self, input: Any, /, *, return_type: Literal["logits", "loss"] = "logits", **options: Any
    ) -> Tensor: ...
    @overload
    def __call__(self, input: Any, /, *, return_type: Literal["both"], **options: Any) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, input: Any, /, *, return_type: None, **options: Any) -> None: ...

    def run_with_cache(
        self,
        input: str | list[str] | Tensor,
        /,
        *,
        names_filter: str | list[str] | Callable[[str], bool] | None = None,
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
    ) -> "tuple[Tensor | Any, ActivationCache]":
        """Logits, and what passed the hook points that the filter names (None: all)."""
        ...

    def run_with_hooks(
        self,
        input: str | list[str] | Tensor,
        /,
        *,
        fwd_hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = ...,
        bwd_hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = ...,
        reset_hooks_end: bool = True,
        return_type: str | None = "logits",
    ) -> Tensor | Any:
        """Logits of a pass with hooks on."""
        ...

    def hooks(
        self,
        fwd_hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = ...,
        bwd_hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = ...,
        reset_hooks_end: bool = True,
    ) -> Any:
        """Hooks that are on inside of a `with` block."""
        ...

    def add_hook(self, name: str | Callable[[str], bool], hook: Any, dir: Literal["fwd", "bwd"] = "fwd") -> None:
        """Put a hook on, which `reset_hooks()` takes off."""
        ...

    def reset_hooks(self, *, including_permanent: bool = False) -> None:
        """Take hooks off."""
        ...

    def to_tokens(
        self, input: str | list[str], prepend_bos: bool | None = None, *, truncate: bool = True
    ) -> Int[Tensor, "batch seq"]:
        """Texts as token ids, padded to one length."""
        ...

    def to_string(self, tokens: list[int] | Tensor) -> str | list[str]:
        """Token ids as a text; of several rows a list of texts."""
        ...

    def to_str_tokens(self, input: str | Tensor, prepend_bos: bool | None = None) -> list[str] | Any:
        """The tokens of a text, each as a text."""
        ...

    def to_single_token(self, string: str) -> int | Any:
        """The id of a text that is one token."""
        ...

    def generate(
        self,
        input: str | list[str] | Tensor = "",
        max_new_tokens: int = 10,
        *,
        stop_at_eos: bool = True,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        return_type: str | None = "input",
        verbose: bool = True,
    ) -> Any:
        """The input with what the model writes after it: a text for a text, token ids for token ids."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """As torch.nn.Module."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As torch.nn.Module."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """As torch.nn.Module."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As torch.nn.Module."""
        ...

    def to(self, device_or_dtype: torch.device | str | torch.dtype, /) -> "LensModel | Any":
        """The same model, moved or cast."""
        ...

    def eval(self) -> "LensModel | Any":
        """The same model, in evaluation mode."""
        ...

    def train(self, mode: bool = True) -> "LensModel | Any":
        """The same model, in training mode."""
        ...
