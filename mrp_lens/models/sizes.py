"""How large a model is, by its configuration alone: it is built on torch's meta device, where tensors have shapes and no values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from mrp_lens.models.fidelity import context_of
from mrp_lens.models.protocol import LensModel
from mrp_lens.models.source import config_of, is_count
from mrp_lens.utils.io import one_line

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig

MOST_LAYERS = 1000
_NEEDED = ("hidden_size", "num_attention_heads", "vocab_size")
_WIDTHS = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_STEPWISE = (
    "gelu_new",
    "gelu_fast",
    "gelu_python",
    "gelu_pytorch_tanh",
)  # computed in several operations, each of them kept


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of a model that its memory and time follow from.

    Attributes:
        name: of the model.
        n_layers, d_model, n_heads, d_head, d_vocab, n_ctx: as TransformerLens calls them.
        n_kv_heads: heads that have keys and values of their own.
        d_mlp: width of the MLP; of a mixture of experts, of one expert.
        maps: tensors of that width that an MLP keeps for a backward pass.
        is_layer_norm: norms with a mean and a bias (GPT-2's), not root mean squares.
        n_experts, n_experts_a_token: of a mixture of experts; else 1.
        n_parameters: numbers in the checkpoint.
        block_parameters: of a block, on average.
        active_block_parameters: of a block, that one token is multiplied by.
        is_tied: the unembedding is the embedding.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    maps: int
    d_vocab: int
    n_ctx: int
    is_layer_norm: bool
    n_experts: int
    n_experts_a_token: int
    n_parameters: int
    block_parameters: int
    active_block_parameters: int
    is_tied: bool

    @property
    def is_mixture(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return self.n_experts > 1

    @property
    def active_parameters(self) -> int:
        """Numbers that one token is multiplied by."""
        return self.n_parameters - self.n_layers * (self.block_parameters - self.active_block_parameters)

    @property
    def stand_in(self) -> LensModel:
        """A Bridge (which is known by its class's name) with sizes and nothing else: what settings are checked and derived with."""
        return cast(LensModel, type("TransformerBridge", (SimpleNamespace,), {})(cfg=self))


def sizes_of(source: "str | Path | PretrainedConfig") -> ModelSizes:
    """The sizes of a model, from its configuration; no weights are read.

    Args:
        source: "demo", a folder with a `config.json`, a name on the Hub (whose `config.json` is downloaded), or a configuration of
            transformers.

    Raises:
        TypeError: a source that is none of these.
        ValueError: no such folder or name, or a configuration of which no model can be built.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        config, name = source.get_text_config(), str(source._name_or_path or source.model_type)
    elif isinstance(source, (str, Path)):
        config, name = config_of(source), str(source)
    else:
        raise TypeError(
            f"cannot plan for a {type(source).__name__}; give 'demo', a Hugging Face model folder, a Hub name, or a configuration of "
            "transformers"
        )
    if not is_count(getattr(config, "num_hidden_layers", None)) or config.num_hidden_layers > MOST_LAYERS:
        raise ValueError(
            f"{name}: its configuration says num_hidden_layers = {getattr(config, 'num_hidden_layers', None)!r}; it must be from 1 to {MOST_LAYERS}"
        )
    try:
        with torch.random.fork_rng([]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # whatever a configuration that makes no sense lets transformers and torch say
        raise ValueError(f"no model can be built of the configuration of {name}: {one_line(error)}") from error
    lacking = next((setting for setting in _NEEDED if not is_count(getattr(config, setting, None))), None)
    if lacking is not None:
        raise ValueError(
            f"{name}: its configuration says {lacking} = {getattr(config, lacking, None)!r}, and a plan needs a count of it; it can be made "
            "for language models with attention in every layer"
        )
    return _read(name, config, model)


def _read(name: str, config: Any, model: Any) -> ModelSizes:
    depth, width = int(config.num_hidden_layers), int(config.hidden_size)
    blocks = next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    )
    parameters = dict(blocks.named_parameters())
    in_blocks = sum(tensor.numel() for tensor in parameters.values())
    in_experts = sum(tensor.numel() for key, tensor in parameters.items() if ".experts." in key)
    experts = _first(config, _EXPERTS, 1)
    experts = experts if in_experts else 1
    chosen = int(getattr(config, "num_experts_per_tok", None) or 1) if experts > 1 else 1
    heads = int(config.num_attention_heads)
    gated = any("gate_proj" in key or "gate_up_proj" in key or ".w3." in key for key in parameters)
    act = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", ""))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    idle = in_experts * (1.0 - chosen / experts)
    return ModelSizes(
        name=name,
        n_layers=depth,
        d_model=width,
        n_heads=heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        d_head=int(getattr(config, "head_dim", None) or width // heads),
        d_mlp=_first(config, _WIDTHS, 4 * width),
        maps=3 if gated else 4 if act in _STEPWISE else 1,
        d_vocab=int(config.vocab_size),
        n_ctx=context_of(config),
        is_layer_norm=any(isinstance(module, torch.nn.LayerNorm) for module in model.modules()),
        n_experts=experts,
        n_experts_a_token=chosen,
        n_parameters=sum(tensor.numel() for tensor in model.parameters()),
        block_parameters=in_blocks // depth,
        active_block_parameters=round((in_blocks - idle) / depth),
        is_tied=tied,
    )


def _first(config: Any, names: Sequence[str], default: int) -> int:
    """The first of these settings that is a count."""
    found: Any = next(filter(is_count, (getattr(config, name, None) for name in names)), default)
    return int(found)
