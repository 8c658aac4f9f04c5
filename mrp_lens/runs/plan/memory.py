"""What a pass holds in memory, in bytes: the formulas of `plan`, each for a batch of texts of one length.

The widths were read off what both classes of TransformerLens keep (every tensor that a block of Llama, GPT-2 and Mixtral leaves behind
for a backward pass, in float32 and bfloat16). They are counts of tensors and of nothing else: there is no factor that makes the sum
come out. In the formulas e is the size of a number in the model's precision, d its width, a the width of all heads together, m that
of the MLP (times the experts that a token goes through) and s the length of the texts.
"""

from dataclasses import dataclass, replace

from mrp_lens.models.backends import Kind
from mrp_lens.models.sizes import ModelSizes

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Setup:
    """What is planned for.

    Attributes:
        sizes: of the model.
        form: the class of TransformerLens.
        itemsize: bytes of a number in the model's precision.
        length: tokens of a text.
        documents: texts of each side.
    """

    sizes: ModelSizes
    form: Kind
    itemsize: int
    length: int
    documents: int

    @property
    def is_half(self) -> bool:
        """Whether the model is in half precision, in which norms are computed in float32 all the same."""
        return self.itemsize < FLOAT32

    def of_length(self, length: int) -> "Setup":
        """The same for texts of another length, if they are shorter."""
        return replace(self, length=min(length, self.length))


@dataclass(frozen=True)
class Phase:
    """What a part of a fit holds at its peak besides the weights, in bytes.

    Attributes:
        name: of the part.
        caches: states and log-probabilities that are kept over passes.
        activations: states, gradients and attention of the pass under way.
        logits: numbers as wide as the vocabulary.
        optimizer: matrices under training, gradients and moments.
        spread: of these, what lies with the blocks that it belongs to, if they are on several devices.
    """

    name: str
    caches: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    optimizer: float = 0.0
    spread: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.caches + self.activations + self.logits + self.optimizer


def weights(setup: Setup) -> float:
    """The model itself. HookedTransformer has tied embeddings twice."""
    sizes = setup.sizes
    again = sizes.d_vocab * sizes.d_model if setup.form == "hooked" and sizes.is_tied else 0
    return float((sizes.n_parameters + again) * setup.itemsize)


def loading(setup: Setup) -> float:
    """While it is loaded: HookedTransformer is filled from Hugging Face's model, which the Bridge wraps."""
    copy = setup.sizes.n_parameters * setup.itemsize if setup.form == "hooked" else 0
    return weights(setup) + copy


def mlp_width(setup: Setup) -> int:
    """m: the MLP's width, of a mixture that of the experts that a token goes through."""
    return setup.sizes.d_mlp * setup.sizes.n_experts_a_token


def saved_by_block(setup: Setup, rows: int) -> float:
    """What a block keeps for its backward pass while its weights are frozen.

    - Stream: what both norms received, in float32: 2d. HookedTransformer also keeps both results of LayerNorm, and in half
      precision those of RMSNorm: 4d.
    - Attention: queries, and keys and values for every head: 3a e. HookedTransformer keeps rotary angles for every text, 4 of a head's
      width.
    - Patterns, of as many numbers as there are heads times s: 1; in half precision Llama's softmax in float32 as well.
      HookedTransformer has them with and without what is not a number, and a mask of that: 2e + 1.
    - MLP: 3m e where it is gated, 4m e for GPT-2's activation, m e else; a mixture of experts also has the states that it sends to
      them, d e each.
    """
    sizes, e = setup.sizes, setup.itemsize
    hooked = setup.form == "hooked"
    heads = sizes.n_heads * sizes.d_head
    doubled = hooked and (sizes.is_layer_norm or setup.is_half)
    stream = (4 if doubled else 2) * sizes.d_model * FLOAT32
    attention = 3 * heads * e + (4 * sizes.d_head * e if hooked and not sizes.is_layer_norm else 0)
    softmax = FLOAT32 if setup.is_half and not sizes.is_layer_norm else 0
    patterns = (2 * e + 1 if hooked else e + softmax) * sizes.n_heads * setup.length
    mlp = sizes.maps * mlp_width(setup) * e
    sent = sizes.n_experts_a_token * sizes.d_model * e if sizes.is_mixture else 0
    return float(rows * setup.length * (stream + attention + patterns + mlp + sent))


def passing_block(setup: Setup, rows: int) -> float:
    """What a block holds at most while a pass without gradient is in it: in the MLP (its maps, and their product) or in attention (up
    to four sets of scores with queries, keys and values), besides the stream and what is added to it, 3d."""
    sizes, e = setup.sizes, setup.itemsize
    mlp = (sizes.maps + 1) * mlp_width(setup) * e
    attention = (4 * sizes.n_heads * setup.length + 3 * sizes.n_heads * sizes.d_head) * e
    return float(rows * setup.length * (max(mlp, attention) + 3 * sizes.d_model * e))


def stream(setup: Setup, tokens: float, itemsize: int = FLOAT32) -> float:
    """One state of each token."""
    return tokens * setup.sizes.d_model * itemsize


def vocabulary(setup: Setup, tokens: float) -> float:
    """Log-probabilities of each token: one number in float32 for each entry of the vocabulary."""
    return tokens * setup.sizes.d_vocab * FLOAT32


def widest(name: str, standing: Phase, *, inside: float, logits: float, beside: float = 0.0) -> Phase:
    """A pass at the more of two moments, beside what stands meanwhile: in a block, with `beside` numbers as wide as the vocabulary, or
    at its end, with `logits` of them."""
    if logits >= inside + beside:
        return replace(standing, name=name, logits=logits)
    return replace(standing, name=name, logits=beside, activations=standing.activations + inside)


def reading(name: str, setup: Setup, rows: int, counted: float, standing: Phase, *, copies: int = 2) -> Phase:
    """A pass without gradient that ends with predictions at `counted` tokens: logits and log-probabilities, or as many copies as are
    made of these."""
    return widest(name, standing, inside=passing_block(setup, rows), logits=copies * vocabulary(setup, counted))
