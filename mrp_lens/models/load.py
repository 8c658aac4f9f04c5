"""Loading a model into either TransformerLens class, checked against Hugging Face."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mrp_lens.models.backends import Kind, boot, check_special_tokens, give_tokenizer
from mrp_lens.models.base import device_named, dtype_named
from mrp_lens.models.devices import DeviceMap, MaxMemory, Spread
from mrp_lens.models.fidelity import context_of, hf_log_probabilities, ignored_settings, log_probabilities, probe, reach
from mrp_lens.models.precision import warn_of_slow_half
from mrp_lens.models.protocol import LensModel
from mrp_lens.models.quantised import holds_packed
from mrp_lens.models.source import OpenedModel, check_memory, opened
from mrp_lens.utils.io import one_line
from mrp_lens.utils.torch_state import ordinary_torch

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Backend = Literal["auto", "hooked", "bridge"]
LOAD_TOLERANCE = 1e-3  # largest difference of log-probabilities from Hugging Face's, in float32
SHORT, LONG = 24, 96  # tokens that a loaded model is compared on: of a text that need not be long; of any
# of bitsandbytes, which TransformerLens imports where it is installed: of a kernel for 4 bits, and one at every product in 8 bits
CHATTY = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
KERNELS = 3.0  # in half precision: rounding allowed, in units of what two attention kernels of Hugging Face's differ by


class ModelMismatchError(ValueError):
    """A loaded model does not reproduce Hugging Face's logits."""


@ordinary_torch(gradients=True)
def load_model(
    source: "str | Path | PreTrainedModel",
    *,
    backend: Backend | str = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
) -> LensModel:
    """Load a model for editing, with its weights exactly as in the checkpoint: nothing folded, nothing centred.

    No code in a folder runs: `trust_remote_code` is never given. `model.tokenizer` is a copy of the tokenizer, and
    `model.to_tokens` starts texts with BOS only where the tokenizer has one of its own.

    Args:
        source: "demo" (the embedded model that knows a small invented world), a local Hugging Face folder with
            weights and tokenizer (fine-tuned, or with an adapter merged in), a name on the Hub, or a loaded Hugging
            Face model, of which a copy is used. Of a model that reads pictures too, the language model. With bitsandbytes' matrices of
            8 bits it goes into the Bridge, for projections, steering and metrics; its matrices cannot be edited or trained.
        backend: "hooked" (HookedTransformer, TransformerLens 3 only), "bridge" (TransformerBridge), or "auto": the
            first where it exists and computes what the configuration says, else the second; the log (`logging`, level
            INFO) names the setting that stood against the first.
        device: where to put it; None: a GPU if there is one, else the CPU.
        dtype: such as torch.bfloat16 or "bfloat16"; None: float32. What 8-bit folders hold in floating point stays as they hold it.
        tokenizer: None: the one that lies beside the weights.
        device_map: instead of `device`: how the layers are spread over several, as transformers and accelerate take it: "auto",
            "balanced", "balanced_low_0" or "sequential", or names of modules -> devices, {"model.embed_tokens": 0, ...}. Bridge
            only; all GPUs, or all CPU: what is offloaded has no weights to edit.
        max_memory: device -> bytes, or text such as "20GiB", for the named maps. None: what is free.

    Returns:
        A HookedTransformer or TransformerBridge in evaluation mode. Its class was compared with Hugging Face's on a small
        random model with the same settings, in float32 and on a text that goes beyond every window and position rule; its
        weights on a short text, in its own precision.

    Raises:
        TypeError: a source that is none of these, or a tokenizer that is none.
        ValueError: no such folder or name, an unknown backend, device or dtype, no tokenizer or one whose BOS or EOS has no
            row in the embedding, weights that are missing, offloaded, or quantised other than in 8 bits, a folder with links or file
            names that lead out of it, too little memory, a device map that HookedTransformer cannot have, that offloads, or that
            names what is not there, or (ModelMismatchError) a class that computes another model than Hugging Face.

    Example:
        >>> model = load_model("demo", backend="bridge")
        >>> model.cfg.n_layers
        8
    """
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f"unknown backend {backend!r}; choose 'auto', 'hooked' or 'bridge'")
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    spread = Spread.checked(device_map, max_memory, device=device, backend=backend)
    where, precision = device_named(device), dtype_named(torch.float32 if dtype is None else dtype)
    warn_of_slow_half(precision, where)
    copies = 2 if backend == "hooked" else 1  # HookedTransformer is filled from the Hugging Face model
    checkpoint = opened(source, tokenizer, where if spread is None else spread, precision, copies)
    if spread is not None:
        where = checkpoint.hf_model.get_input_embeddings().weight.device
    packed = holds_packed(checkpoint.hf_model)
    if packed:
        if backend == "hooked":
            raise ValueError(
                f"{checkpoint.name} is quantised, and HookedTransformer has matrices of its own, which are not; use backend='bridge'"
            )
        precision = checkpoint.hf_model.get_input_embeddings().weight.dtype
    checkpoint.hf_model.config.architectures = [type(checkpoint.hf_model).__name__]  # TransformerLens goes by the name
    check_special_tokens(checkpoint.tokenizer, int(checkpoint.hf_model.get_input_embeddings().weight.shape[0]))
    if backend == "auto" and spread is None and not packed:
        try:
            _check_room(checkpoint, where, precision)
            return _loaded("hooked", checkpoint, where, precision)
        except Exception as error:  # TransformerLens raises all kinds for what it does not know
            logger.info("HookedTransformer cannot serve %s (%s); using the Bridge", checkpoint.name, one_line(error))
    kind: Kind = "hooked" if backend == "hooked" else "bridge"
    try:
        return _loaded(kind, checkpoint, where, precision)
    except (ImportError, ModelMismatchError):
        raise
    except Exception as error:
        raise ValueError(
            f"TransformerLens cannot load {checkpoint.name} as {kind}: {one_line(error)}; {_remedy(kind)}"
        ) from error


def _loaded(kind: Kind, checkpoint: OpenedModel, device: torch.device, dtype: torch.dtype) -> LensModel:
    """The model in a class that computes what its configuration says.

    Raises:
        ModelMismatchError: it does not; says which setting it leaves out, or how far it is off.
        ImportError: there is no such class.
        Exception: whatever TransformerLens says to what it does not know.
    """
    judged = _judged(kind, checkpoint)
    tokens, expected, allowed = _expected(checkpoint.hf_model, dtype, judged)
    model = boot(kind, checkpoint.hf_model, device, dtype)
    model.cfg.model_name = checkpoint.name
    _compare(model, tokens, expected, allowed, kind)
    give_tokenizer(model, checkpoint.tokenizer)
    if kind == "hooked":  # the Bridge has its Hugging Face model's
        model.generation_config = getattr(checkpoint.hf_model, "generation_config", None)
    return model


def _check_room(checkpoint: OpenedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Whether a second copy of a loaded model fits, as HookedTransformer needs for a moment."""
    numbers = sum(parameter.numel() for parameter in checkpoint.hf_model.parameters())
    check_memory(numbers, device, dtype, 1, checkpoint.name)


def _judged(kind: Kind, checkpoint: OpenedModel) -> bool:
    """Whether a class is known to compute what the configuration says, whatever the model's size and precision.

    Raises:
        ModelMismatchError: it is known not to.
    """
    try:
        reason = ignored_settings(kind, checkpoint.hf_model.config)
    except ImportError:
        raise
    except Exception as error:
        logger.info(
            "no small model like %s can be made (%s); only the model itself is compared", checkpoint.name, error
        )
        return False
    if reason is not None:
        names = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
        raise ModelMismatchError(
            f"{names[kind]} computes another model than the configuration of {checkpoint.name} says: {reason}; {_remedy(kind)}"
        )
    return True


def _remedy(kind: Kind) -> str:
    return "use backend='bridge'" if kind == "hooked" else "see TransformerLens's list of supported models"


def _expected(hf_model: Any, dtype: torch.dtype, judged: bool) -> tuple[Tensor, Tensor, float]:
    """Tokens, Hugging Face's log-probabilities for them, and how far a right model may be off. The text is short, however far
    the configuration's rules reach, only where the class has been judged on a small model.

    In half precision two right implementations differ by rounding, more in deeper models; Hugging Face's own two
    attention kernels show by how much in this one (HookedTransformer was at 1.5 times that at most, in seven families).
    """
    config = hf_model.config
    length = reach(config)
    length = length if length <= LONG or not judged else SHORT
    tokens = probe(config, min(length, context_of(config))).to(hf_model.device)
    expected = hf_log_probabilities(hf_model, tokens)
    rounding = torch.finfo(dtype).eps
    if rounding < 1e-4:
        return tokens, expected, LOAD_TOLERANCE
    try:
        hf_model.set_attn_implementation("sdpa")
        kernels = _half_difference(hf_log_probabilities(hf_model, tokens), expected)
    except Exception:  # no such kernel in this architecture
        kernels = 0.0
    finally:
        hf_model.set_attn_implementation("eager")
    return tokens, expected, min(max(KERNELS * kernels, 4 * rounding), 32 * rounding)


def _half_difference(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of the spread."""
    return float((got - expected).square().mean().sqrt() / expected.std())


def _compare(model: LensModel, tokens: Tensor, expected: Tensor, allowed: float, kind: Kind) -> None:
    got = log_probabilities(model, tokens)
    exact = allowed == LOAD_TOLERANCE
    difference = float((got - expected).abs().max()) if exact else _half_difference(got, expected)
    if not difference <= allowed:
        unit = "" if exact else " of their spread"
        raise ModelMismatchError(
            f"the {kind} model's log-probabilities differ from Hugging Face's by {difference:.3g}{unit} (allowed: {allowed:.3g}); "
            f"{_remedy(kind)}"
        )
