"""Where the editable weights of a checkpoint live in a loaded model, and how a model is recognised again."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.models.architectures import LAYOUTS
from mrp_lens.models.base import architecture_of, check_layers, is_bridge
from mrp_lens.models.protocol import LensModel
from mrp_lens.models.quantised import holds_packed, refuse_packed

SAMPLED = 1024  # values of a tensor that go into a model's identity
CENTRED = 1e-5  # a row mean below this share of the entries' size is no accident
_HASHED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the checkpoint inside a loaded model.

    Attributes:
        name: the model's own name for it.
        depth: -1 in the embeddings, the layer inside a block, the number of layers behind the last block.
        parameter: its values.
        copy: HookedTransformer keeps tied embeddings twice; the transposed second copy, which has to follow.
    """

    name: str
    depth: int
    parameter: torch.nn.Parameter
    copy: torch.nn.Parameter | None = None

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """All that holds its values."""
        return (self.parameter,) if self.copy is None else (self.parameter, self.copy)


def checkpoint_tensors(model: LensModel) -> list[CheckpointTensor]:
    """Every tensor of the checkpoint once, in the model's order.

    Both classes hold more: biases that the checkpoint lacks, all of them 0, HookedTransformer a second copy of tied
    embeddings, and the Bridge joint matrices beside the parts of them that it computes with (`joint_beside_parts`).
    Training those too would let the two classes drift apart, and the result would fit no checkpoint. (A bias that is 0 in
    the checkpoint itself counts as absent; training leaves no bias so.)

    Raises:
        ValueError: one of them is quantised.
    """
    depths = {id(p): layer for layer, block in enumerate(model.blocks) for p in block.parameters()}
    before = {id(p) for name in ("embed", "pos_embed") for p in _parameters_of(model, name)}
    tied = None if is_bridge(model) else _untied_copy(model)
    joint = joint_beside_parts(model)
    tensors = []
    for name, parameter in {id(p): (name, p) for name, p in model.named_parameters()}.values():
        is_bias = name.rsplit(".", 1)[-1].lstrip("_").startswith("b")
        refuse_packed(parameter, name)
        if parameter is tied or id(parameter) in joint or (is_bias and not bool(parameter.any())):
            continue
        depth = -1 if id(parameter) in before else depths.get(id(parameter), int(model.cfg.n_layers))
        copy = tied if name == "embed.W_E" else None
        tensors.append(CheckpointTensor(name, depth, parameter, copy))
    return tensors


def joint_beside_parts(model: Any) -> frozenset[int]:
    """Of the Bridge, the ids of joint parameters (queries, keys and values; gate and up) that stand beside the parts that it computes
    with: they hold the same memory, or memory that nothing reads. What is trained or replaced are the parts."""
    joint: set[int] = set()
    sharing: dict[Any, list[torch.nn.Parameter]] = {}
    for module in model.modules():
        children = dict(module.named_children())
        if {"q", "k", "v", "qkv"} <= children.keys():
            joint |= {id(parameter) for parameter in children["qkv"].parameters()}
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.numel():
            sharing.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(parameter)
    for several in sharing.values():
        whole = max(several, key=torch.Tensor.numel)
        if 2 * whole.numel() == sum(map(torch.Tensor.numel, several)) and len(several) > 2:
            joint.add(id(whole))
    return frozenset(joint)


@contextmanager
def restored(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, values may change; on exit they are as before, bit for bit, and so is the gradient (kept in main memory)."""
    before = [(parameter, parameter.detach().to("cpu", copy=True), parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values, gradient in before:
                parameter.copy_(values)
                parameter.grad = gradient


@contextmanager
def exchanged(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters have other values, of the same shapes and precision; on exit their own. Nothing is copied."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def _parameters_of(model: LensModel, name: str) -> list[torch.nn.Parameter]:
    component = getattr(model, name, None)
    return list(component.parameters()) if isinstance(component, torch.nn.Module) else []


def _untied_copy(model: LensModel) -> torch.nn.Parameter | None:
    """HookedTransformer's unembedding, where it holds the embedding's values."""
    unembedding: torch.nn.Parameter = dict(model.named_parameters())["unembed.W_U"]
    return unembedding if torch.equal(unembedding.T, model.W_E) else None


@dataclass(frozen=True)
class EditableWeight:
    """One matrix of the checkpoint inside a loaded model.

    `name` and `read`/`write` follow the checkpoint (Hugging Face's name and layout), `key` is the parameter's name
    inside its block; so the same edit fits either class. `layer` is -1 outside of blocks, or where nobody asked for it.
    """

    name: str
    layer: int
    key: str
    parameter: torch.nn.Parameter
    transposed: bool

    def read(self) -> Tensor:
        """A contiguous copy in the checkpoint's layout.

        Raises:
            ValueError: it is quantised.
        """
        refuse_packed(self.parameter, self.name)
        return self.to_checkpoint(self.parameter.detach())

    def write(self, tensor: Tensor) -> None:
        """Overwrite the model's values in place.

        Raises:
            ValueError: they are quantised.
        """
        refuse_packed(self.parameter, self.name)
        with torch.no_grad():
            self.parameter.copy_(self.to_model(tensor))

    def to_checkpoint(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, in the checkpoint's layout, of a tensor in the model's."""
        return (tensor.T if self.transposed else tensor).clone(memory_format=torch.contiguous_format)

    def to_model(self, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint's layout in the model's layout and dtype, gradient kept."""
        return (tensor.T if self.transposed else tensor).to(self.parameter.device, self.parameter.dtype)


def mlp_out_weight(model: LensModel, layer: int) -> EditableWeight:
    """The MLP's output matrix of a layer (`down_proj`, `c_proj`, `dense_4h_to_h`; TransformerLens `W_out`).

    Raises:
        ValueError: the layer does not exist, or the architecture keeps no single such matrix there.
    """
    check_layers(model, [layer])
    block, bridge = model.blocks[layer], is_bridge(model)
    if bridge:
        component = getattr(getattr(getattr(block, "mlp", None), "out", None), "original_component", None)
        parameter = getattr(component, "weight", None)
    else:
        parameter = getattr(block.mlp, "W_out", None)
    if parameter is None or (not bridge and parameter.ndim != 2):
        raise ValueError(
            f"layer {layer} has no single MLP output matrix (a mixture of experts, perhaps), so that none can be trained or replaced there; "
            "choose a method whose edit is hooks, such as MRP()"
        )
    if bridge:
        key = next(key for key, value in block.named_parameters() if value is parameter)
        full = next(key for key, value in model.named_parameters() if value is parameter)
        return EditableWeight(_hf_name(full), layer, key, parameter, transposed=False)
    layout = LAYOUTS.get(architecture_of(model))
    name = f"blocks.{layer}.mlp.W_out" if layout is None else f"{layout.matrix(layer, 'mlp_out')}.weight"
    # TransformerLens has [d_mlp, d_model]
    return EditableWeight(name, layer, "mlp.W_out", parameter, layout is not None and layout.transposed)


def hf_state(model: Any) -> dict[str, Tensor] | None:
    """The Bridge's tensors under Hugging Face's names; None for a HookedTransformer, which keeps other shapes."""
    if not is_bridge(model):
        return None
    return {_hf_name(name): values for name, values in model.original_model.state_dict().items()}


def _hf_name(name: str) -> str:
    """Of a tensor of the Bridge, which wraps Hugging Face's modules."""
    return name.replace("._original_component", "")


def hf_weights(hf_model: Any) -> dict[str, EditableWeight]:
    """`weights_by_name` of a plain Hugging Face model: all of its tensors."""
    return {
        name: EditableWeight(name, -1, name, parameter, transposed=False)
        for name, parameter in hf_model.named_parameters()
    }


def weights_by_name(model: LensModel) -> dict[str, EditableWeight]:
    """Every tensor that a weight edit can replace, by its name in the checkpoint: on the Bridge all of them (of joint matrices of some
    families the parts that it computes with, whose names are its own: see `checkpoint_names`), on a HookedTransformer, which keeps others
    in shapes of its own, the MLP output matrices."""
    if not is_bridge(model):
        return {weight.name: weight for weight in (mlp_out_weight(model, layer) for layer in range(model.cfg.n_layers))}
    layers = {id(p): layer for layer, block in enumerate(model.blocks) for p in block.parameters()}
    bridge: Any = model
    joint = joint_beside_parts(bridge)
    named = {
        _hf_name(name): parameter
        for name, parameter in bridge.original_model.named_parameters()
        if id(parameter) not in joint
    }
    return {
        name: EditableWeight(name, layers.get(id(parameter), -1), name, parameter, transposed=False)
        for name, parameter in named.items()
    }


def checkpoint_names(model: LensModel) -> frozenset[str]:
    """The names of all tensors of a plain Hugging Face model of the Bridge's kind; takes no memory for its values."""
    from transformers import AutoModelForCausalLM

    bridge: Any = model
    with torch.random.fork_rng([]), torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(bridge.original_model.config)
    return frozenset(name for name, _ in plain.named_parameters())


def why_not_exportable(model: LensModel) -> str | None:
    """Why an edit made on this model has no counterpart in a Hugging Face checkpoint; None if it has.

    `load_model` gives the checkpoint's own weights. `HookedTransformer.from_pretrained` folds and centres them by
    default, and the Bridge's compatibility mode rewrites them: hooks and fits work there, on another residual stream. Of a
    family without a layout (`register_family`) they are the checkpoint's own, and where an edit belongs in it is not known.
    """
    bridge: Any = model
    if holds_packed(bridge):
        return "its matrices are quantised"
    if architecture_of(model) not in LAYOUTS:
        return (
            f"where {architecture_of(model)} keeps its residual stream is not known here (mrp_lens.models.register_family(...) says it, and "
            "edit.save_pretrained(...) keeps the edit)"
        )
    if is_bridge(model):
        return "its compatibility mode rewrote the weights" if getattr(model, "compatibility_mode", False) else None
    if str(model.cfg.normalization_type).endswith("Pre"):
        return "LayerNorm is folded into its weights"
    # Attention's, which a mixture of experts has, too.
    written = model.blocks[0].attn.W_O.detach().float()
    if float(written.mean(dim=-1).abs().max()) < CENTRED * float(written.square().mean().sqrt()):
        return "its writing weights are centred"
    return None


def tensor_digests(tensor: Float[Tensor, "..."]) -> dict[str, str]:
    """SHA-256 of the values as float32, bfloat16 and float16, so that a checkpoint is known in any precision."""
    return {name: _digest(tensor, dtype) for name, dtype in _HASHED_DTYPES.items()}


def same_tensor(tensor: Float[Tensor, "..."], digests: Mapping[str, str]) -> bool:
    """Whether the tensor holds the hashed values, compared in its own precision."""
    name = next((name for name, dtype in _HASHED_DTYPES.items() if dtype == tensor.dtype), "float32")
    return _digest(tensor, _HASHED_DTYPES[name]) == digests.get(name)


def same_checkpoint(tensor: Float[Tensor, "..."], digests: Mapping[str, str]) -> bool:
    """Whether the tensor is of the checkpoint whose values were hashed, in whatever precision both were loaded: also where those that
    were hashed are these, rounded to half precision."""
    if same_tensor(tensor, digests):
        return True
    halves = ("bfloat16", "float16") if tensor.dtype in (torch.float32, torch.float64) else ()
    return any(
        digests.get(name) == _digest(tensor, _HASHED_DTYPES[name])
        and digests.get("float32") == _digest(tensor.to(_HASHED_DTYPES[name]), torch.float32)
        for name in halves
    )


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    values = tensor.detach().to("cpu", dtype).contiguous()
    return hashlib.sha256(str(list(values.shape)).encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def describe(model: Any) -> dict[str, Any]:
    """What identifies a model in an edit's provenance: sizes, and the hash of 128 rows of its embedding.

    Args:
        model: HookedTransformer, TransformerBridge, or a plain Hugging Face model.
    """
    name, n_layers, embedding = _identity(model)
    return {
        "name": name,
        "n_layers": n_layers,
        "d_model": int(embedding.shape[1]),
        "d_vocab": int(embedding.shape[0]),
        "embedding": tensor_digests(_some_rows(embedding)),
    }


def identity_of(model: LensModel) -> dict[str, Any]:
    """What a run depends on: `describe`, the class, the precision, and a hash of every tensor's values at 1,024 places, by
    which a fine-tuned model is told from its base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    dtype = str(next(iter(model.parameters())).dtype)
    return describe(model) | {"class": type(model).__name__, "dtype": dtype, "weights": digest.hexdigest()}


def check_same_model(model: Any, described: Mapping[str, Any]) -> None:
    """Refuse a model other than the one an edit was made for, by what `describe` says of both: a fine-tune that left the
    embedding as it was is taken for its base.

    Raises:
        ValueError: says what differs.
    """
    current = describe(model)
    different = [
        f"{key} {current[key]} instead of {described[key]}"
        for key in ("n_layers", "d_model", "d_vocab")
        if current[key] != described[key]
    ]
    if not different and not same_checkpoint(_some_rows(_identity(model)[2]), described["embedding"]):
        different = ["its embedding matrix has other values"]
    if different:
        raise ValueError(
            f"this edit was made for {described['name']!r}, and this model is another: {'; '.join(different)}. "
            "Load the model it was made for, or pass check=False to apply it all the same"
        )


def joint_description(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What `describe` says of the model that two edits were both made for; None if neither says for which it was.

    Of one checkpoint in two precisions the hashes are kept that both have in common, so that what refuses either model of the two
    edits refuses theirs.

    Raises:
        ValueError: they were made for different models; names both.
    """
    if one is None or other is None:
        return other if one is None else one
    different = [
        f"{key} {one.get(key)} and {other.get(key)}"
        for key in ("n_layers", "d_model", "d_vocab")
        if one.get(key) != other.get(key)
    ]
    mine, theirs = (dict(described.get("embedding", {})) for described in (one, other))
    shared = {name: digest for name, digest in mine.items() if theirs.get(name) == digest}
    if not different and not shared and (mine or theirs):
        different = ["their embedding matrices have other values"]
    if different:
        raise ValueError(
            f"these edits were made for different models, {one.get('name')!r} and {other.get('name')!r} ({'; '.join(different)}), and both "
            "together fit neither; fit them on one model"
        )
    return {**one, "embedding": shared} if shared != mine else one


def _identity(model: Any) -> tuple[str, int, Float[Tensor, "d_vocab d_model"]]:
    """Name, number of layers and embedding of a model of either library."""
    if hasattr(model, "cfg"):
        return str(model.cfg.model_name), int(model.cfg.n_layers), model.W_E.detach()
    config = model.config
    return str(config._name_or_path), int(config.num_hidden_layers), model.get_input_embeddings().weight.detach()


def _some_rows(embedding: Float[Tensor, "d_vocab d_model"]) -> Float[Tensor, "rows d_model"]:
    return embedding[torch.linspace(0, len(embedding) - 1, 128).long().to(embedding.device)]
