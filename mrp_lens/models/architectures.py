"""Where Hugging Face's models keep what writes to the residual stream: one entry a family."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mrp_lens.utils.registry import Registry


@dataclass(frozen=True)
class Layout:
    """Names inside a Hugging Face model; those of a block's parts are relative to the block.

    Attributes:
        blocks: the list of decoder layers.
        modules: "attn_out", "mlp_out" -> whose output is added to the stream; "stream" -> the norm in front of attention, whose
            input is the stream as the block receives it.
        matrices: site -> the linear layer behind it.
        transposed: matrices are stored as [d_out, d_in] (nn.Linear), not as [d_in, d_out] (GPT-2's Conv1D).
        embeddings: what block 0 receives is the sum of these.
        head: the unembedding; in a tied model the first of the embeddings.
        foldable: nothing stands between a matrix and the stream; False where a norm does.
    """

    blocks: str
    modules: Mapping[str, str]
    matrices: Mapping[str, str]
    embeddings: tuple[str, ...]
    head: str = "lm_head"
    transposed: bool = True
    foldable: bool = True

    def block(self, layer: int) -> str:
        """The name of a block."""
        return f"{self.blocks}.{layer}"

    def matrix(self, layer: int, site: str) -> str:
        """The name of the linear layer behind a site, without `.weight`."""
        return f"{self.block(layer)}.{self.matrices[site]}"


# Architecture (the class that a config.json names) -> layout: this library's own, then those that plugins register.
LAYOUTS: Registry[Layout] = Registry("family", __name__, names=re.compile(r"[A-Za-z_]\w*"))


def register_family(layout: Layout, *architectures: str) -> Layout:
    """Say where models of some architectures keep what writes to their stream, so that edits export and fold there too.

    TransformerLens must know the architecture (`load_model` loads it without a layout as well). A package that registers one
    at import may be named as a plugin (`mrp_lens.utils.registry`), so that other processes know the family too.

    Args:
        layout: of their Hugging Face classes.
        architectures: the names of these classes, as config.json gives them.

    Raises:
        ValueError: an architecture has another layout already.

    Example:
        >>> olmo = register_family(
        ...     Layout(
        ...         blocks="model.layers",
        ...         modules={"stream": "input_layernorm", "attn_out": "self_attn", "mlp_out": "mlp"},
        ...         matrices={"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"},
        ...         embeddings=("model.embed_tokens",),
        ...     ),
        ...     "OlmoForCausalLM",
        ... )  # doctest: +SKIP
    """
    for architecture in architectures:
        LAYOUTS.add(architecture, layout)
    return layout


def layout_of(architecture: str) -> Layout:
    """The layout of an architecture (the class name that its config.json gives).

    Raises:
        ValueError: it is none of those known.
    """
    if architecture not in LAYOUTS:
        raise ValueError(
            f"where {architecture} keeps its residual stream is not known here; known are {', '.join(LAYOUTS)}. The edit itself works in "
            "TransformerLens: edit.save_pretrained(...) keeps it, edit.applied(model) applies it"
        )
    return LAYOUTS[architecture]


register_family(
    Layout(
        blocks="transformer.h",
        modules={"stream": "ln_1", "attn_out": "attn", "mlp_out": "mlp"},
        matrices={"attn_out": "attn.c_proj", "mlp_out": "mlp.c_proj"},
        embeddings=("transformer.wte", "transformer.wpe"),
        transposed=False,
    ),
    "GPT2LMHeadModel",
)
register_family(
    Layout(
        blocks="gpt_neox.layers",
        modules={"stream": "input_layernorm", "attn_out": "attention", "mlp_out": "mlp"},
        matrices={"attn_out": "attention.dense", "mlp_out": "mlp.dense_4h_to_h"},
        embeddings=("gpt_neox.embed_in",),
        head="embed_out",
    ),
    "GPTNeoXForCausalLM",
)
_LLAMA = register_family(
    Layout(
        blocks="model.layers",
        modules={"stream": "input_layernorm", "attn_out": "self_attn", "mlp_out": "mlp"},
        matrices={"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"},
        embeddings=("model.embed_tokens",),
    ),
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
)
register_family(
    replace(
        _LLAMA,
        modules={
            "stream": "input_layernorm",
            "attn_out": "post_attention_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        },
        foldable=False,
    ),
    "Gemma2ForCausalLM",
)
