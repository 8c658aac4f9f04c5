"""Edits of every kind for the tiny families, and the same edits put on Hugging Face's models by hand: the oracle."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mrp_lens.edits import Edit, ProjectionEdit, SteeringEdit, WeightEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import export_hf
from mrp_lens.models import LensModel, mlp_out_weight, tensor_digests
from mrp_lens.models.hooks import hook_name
from tests.support.edits import logits, projection
from tests.support.families import DEPTH, WIDTH

TOKENS = torch.arange(3, 43).view(2, 20)

EDITS: dict[str, Callable[[LensModel], Edit]] = {
    "projection, mlp_out": lambda model: projection(0, 3, site="mlp_out"),
    "projection, attn_out": lambda model: projection(1, 2, site="attn_out"),
    "projection, resid_pre of layer 0": lambda model: projection(0, site="resid_pre"),
    "projection, every write": lambda model: every_write(),
    "projection, resid_pre": lambda model: projection(2, site="resid_pre"),
    "projection, resid_mid": lambda model: projection(1, site="resid_mid"),
    "projection, resid_post": lambda model: projection(1, 3),
    "new matrices (RMU)": lambda model: reversed_matrix(model, 1),
    "new matrices + projection, mlp_out": lambda model: projection(1, site="mlp_out") + reversed_matrix(model, 1),
    "new matrices + projection, resid_post": lambda model: reversed_matrix(model, 2) + projection(2),
    "steering": lambda model: SteeringEdit.towards(torch.arange(WIDTH) % 3 - 0.5, layer=2, coefficient=2.0, mode="add"),
}


def reversed_matrix(model: LensModel, layer: int) -> WeightEdit:
    """The MLP's output matrix upside down. (Scaled, it would do nothing behind Gemma-2's norm.)"""
    weight = mlp_out_weight(model, layer)
    original = weight.read()
    return WeightEdit({weight.name: original.flip(0)}, {weight.name: tensor_digests(original)})


def every_write() -> ProjectionEdit:
    """One subspace, removed wherever something is written to the stream."""
    subspace = Subspace.random(3, WIDTH, seed=7)
    hooks = [hook_name(layer, site) for layer in range(DEPTH) for site in ("attn_out", "mlp_out")]
    return ProjectionEdit(dict.fromkeys([hook_name(0, "resid_pre"), *hooks], subspace))


# family -> list of blocks, and in a block: what attention adds, what the MLP adds, the norm in front of the MLP
PLACES = {
    "gpt2": ("transformer.h", "attn", "mlp", "ln_2"),
    "neox": ("gpt_neox.layers", "attention", "mlp", None),
    "gemma2": (
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    ),
}
LLAMA = ("model.layers", "self_attn", "mlp", "post_attention_layernorm")


def put_on_by_hand(hf_model: Any, family: str, edit: Edit) -> None:
    """Hooks and matrices on a plain model, written without mrp_lens's own; for good."""
    blocks, attention, mlp, norm = PLACES.get(family, LLAMA)
    for part in edit.parts:
        if isinstance(part, WeightEdit):
            state = hf_model.state_dict()
            with torch.no_grad():
                for name, tensor in part.tensors.items():
                    state[name].copy_(tensor)
        elif isinstance(part, SteeringEdit):
            block = hf_model.get_submodule(blocks)[int(part.hook.split(".")[1])]
            moved = (part.coefficient * part.direction / part.direction.norm()).clone()
            block.register_forward_hook(lambda m, a, out, moved=moved: (out.float() + moved).to(out.dtype))
        else:
            assert isinstance(part, ProjectionEdit)
            for hook, subspace in part.subspaces().items():
                _, number, site = hook.replace("hook_", "").split(".")
                rows = subspace.basis.double()
                keep = torch.eye(WIDTH, dtype=torch.float64) - rows.T @ rows
                block = hf_model.get_submodule(blocks)[int(number)]
                _project(block, site, keep, attention, mlp, norm)


def _project(block: nn.Module, site: str, keep: Tensor, attention: str, mlp: str, norm: str | None) -> None:
    def apply(states: Tensor) -> Tensor:
        return (states.double() @ keep).to(states.dtype)

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        return (apply(output[0]), *output[1:]) if isinstance(output, tuple) else apply(output)

    if site == "resid_post":
        block.register_forward_hook(on_output)
    elif site == "resid_pre":
        block.register_forward_pre_hook(lambda module, args: (apply(args[0]), *args[1:]))
    elif site in ("attn_out", "mlp_out"):
        block.get_submodule(attention if site == "attn_out" else mlp).register_forward_hook(on_output)
    else:  # resid_mid: the norm sees the projected sum; what the block carries past it loses the same part
        assert norm is not None
        lost: list[Tensor] = []

        def on_norm(module: nn.Module, args: Any) -> Any:
            lost[:] = [args[0].double() - args[0].double() @ keep]
            return (apply(args[0]),)

        block.get_submodule(norm).register_forward_pre_hook(on_norm)
        block.register_forward_hook(lambda module, args, out: (out.double() - lost[0]).to(out.dtype))


def write(model: LensModel, edit: Edit, out: Path, form: str = "auto", **options: Any) -> Path:
    """Export without a proof; returns the folder."""
    export_hf(model, edit, out, form, verify=False, progress=False, **options)
    return out


def content_of(folder: Path) -> dict[str, bytes]:
    """Its files, byte for byte."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def exported(folder: Path, **options: Any) -> Any:
    """What plain transformers loads from a folder, whose code may run."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def hooked(model: LensModel, edit: Edit) -> Tensor:
    """Log-probabilities of `TOKENS` in TransformerLens."""
    with edit.applied(model):
        return logits(model, TOKENS).log_softmax(-1)


def assert_exact(model: LensModel, edit: Edit, hf_model: Any) -> None:
    """A Hugging Face model, or the folder of one, computes what the hooked model does."""
    loaded = exported(hf_model) if isinstance(hf_model, Path) else hf_model
    torch.testing.assert_close(log_probabilities(loaded), hooked(model, edit), atol=1e-4, rtol=0)


def log_probabilities(hf_model: Any, tokens: Tensor = TOKENS, mask: Tensor | None = None) -> Tensor:
    """Of plain transformers; GPT-2 wants its positions told where rows are padded on the left."""
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = hf_model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    result: Tensor = output.logits.float().log_softmax(-1)
    return result


def rms_over_spread(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).double().square().mean().sqrt() / reference.double().std())


def table_of(cells: Iterable[tuple[str, str, str, str]]) -> str:
    """(edit, family, form, outcome) as the documentation shows them: one row an edit, one column a family."""
    letters = {"exact": {"folded": "F", "module": "M", "adapter": "A"}, "refused": {}, "not applicable": {}}
    known = list(cells)
    families = list(dict.fromkeys(family for _, family, _, _ in known))
    lines = [f"| edit | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for edit in dict.fromkeys(edit for edit, *_ in known):
        row = []
        for family in families:
            mine = [(form, outcome) for e, f, form, outcome in known if (e, f) == (edit, family)]
            text = "".join(letters[outcome].get(form, "") for form, outcome in mine)
            row.append(text or ("refused" if any(o == "refused" for _, o in mine) else "n/a"))
        lines.append(f"| {edit} | {' | '.join(row)} |")
    return "\n".join(lines)
