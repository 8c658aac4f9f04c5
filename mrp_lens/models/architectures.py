"""Where Hugging Face's models keep what writes to the residual stream, by architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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


def _layout(
    blocks: str, modules: tuple[str, str, str], matrices: tuple[str, str], *embeddings: str, **more: object
) -> Layout:
    return Layout(
        blocks,
        MappingProxyType(dict(zip(("stream", "attn_out", "mlp_out"), modules, strict=True))),
        MappingProxyType(dict(zip(("attn_out", "mlp_out"), matrices, strict=True))),
        embeddings,
        **more,  # type: ignore[arg-type]
    )


_LLAMA = _layout(
    "model.layers",
    ("input_layernorm", "self_attn", "mlp"),
    ("self_attn.o_proj", "mlp.down_proj"),
    "model.embed_tokens",
)
_GEMMA2 = _layout(
    "model.layers",
    ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    ("self_attn.o_proj", "mlp.down_proj"),
    "model.embed_tokens",
    foldable=False,
)
_GPT2 = _layout(
    "transformer.h",
    ("ln_1", "attn", "mlp"),
    ("attn.c_proj", "mlp.c_proj"),
    "transformer.wte",
    "transformer.wpe",
    transposed=False,
)
_NEOX = _layout(
    "gpt_neox.layers",
    ("input_layernorm", "attention", "mlp"),
    ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox.embed_in",
    head="embed_out",
)

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "GPT2LMHeadModel": _GPT2,
        "GPTNeoXForCausalLM": _NEOX,
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": _LLAMA,
        "Qwen3ForCausalLM": _LLAMA,
        "Gemma2ForCausalLM": _GEMMA2,
        "Phi3ForCausalLM": _LLAMA,
    }
)


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
