"""A projection in the weights computes what the hook computes, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mrp_lens.edits import ProjectionEdit, SteeringEdit, without_hooks
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, load_model
from tests.conftest import D_MODEL, assert_same_state, state_of
from tests.support.edits import logits, projection, weight_edit
from tests.support.families import DEMO_FOLDER, FAMILIES, NO_HOOKED, save_family

PLACES = [((0, 3), "mlp_out"), ((1, 2), "attn_out"), ((0,), "resid_pre")]


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if backend == "hooked" and request.param in NO_HOOKED:
        pytest.skip("HookedTransformer does not load this family from a folder")
    model: Any = load_model(save_family(request.param, tmp_path_factory.mktemp(request.param)), backend=backend)
    model.family = request.param
    return model


@pytest.mark.parametrize(("layers", "site"), PLACES)
def test_weights_compute_what_hooks_compute(loaded: Any, layers: tuple[int, ...], site: str) -> None:
    edit, tokens = projection(*layers, site=site), torch.arange(3, 43).view(2, 20)
    before = state_of(loaded)
    tied = site == "resid_pre" and loaded.family in ("gpt2", "mistral", "gemma2") and "Bridge" in type(loaded).__name__
    if tied or (loaded.family == "gemma2" and site != "resid_pre"):  # a norm behind the matrix
        with (
            pytest.raises(ValueError, match="tied to the unembedding" if tied else "a norm stands"),
            edit.applied_in_weights(loaded),
        ):
            raise AssertionError("this is not exact")
    else:
        with edit.applied(loaded):
            hooked = logits(loaded, tokens)
        with edit.applied_in_weights(loaded):
            torch.testing.assert_close(logits(loaded, tokens), hooked, atol=2e-5, rtol=0)
            assert not any(point.fwd_hooks for point in loaded.hook_dict.values())
        assert float((logits(loaded, tokens) - hooked).abs().max()) > 1e-2
    assert_same_state(before, state_of(loaded))


@pytest.mark.parametrize("layer", [1, 2])  # at 1 the new matrix comes before the projection behind it
def test_stacks_fold_part_by_part(model: LensModel, tokens: torch.Tensor, layer: int, untouched: None) -> None:
    both = projection(1, site="mlp_out") + weight_edit(model, layer)
    with both.applied(model):
        wanted = logits(model, tokens)
    with both.applied_in_weights(model):
        torch.testing.assert_close(logits(model, tokens), wanted, atol=2e-5, rtol=0)


def test_the_middle_of_the_stream_has_no_matrix(model: LensModel, untouched: None) -> None:
    for site in ("resid_post", "resid_pre", "resid_mid"):
        with (
            pytest.raises(ValueError, match="sum of many layers' outputs"),
            projection(2, site=site).applied_in_weights(model),
        ):
            pass


def test_what_is_left_without_hooks(model: LensModel) -> None:
    weights, hooks = weight_edit(model, 1), projection(0)
    assert without_hooks(None) is None
    assert without_hooks(hooks) is None
    assert without_hooks(weights) is weights
    assert without_hooks(hooks + weights) is weights
    assert (hooks + weights).layers == (0, 1)
    assert isinstance(hooks, ProjectionEdit)


def test_it_folds_a_checkpoint_in_bfloat16(backend: str, tiny_folder: Path, tokens: torch.Tensor) -> None:
    half, edit = load_model(tiny_folder, backend=backend, dtype=torch.bfloat16), projection(1, site="mlp_out")
    unedited, before = logits(half, tokens).float(), state_of(half)
    with edit.applied(half):
        wanted = logits(half, tokens).float()
    with edit.applied_in_weights(half) as written:
        assert written
        assert {parameter.dtype for parameter in written} == {torch.bfloat16}
        folded = logits(half, tokens).float()
    assert float((folded - wanted).square().mean() / (unedited - wanted).square().mean()) < 0.01
    assert_same_state(before, state_of(half))


def test_merging_writes_the_edit_for_good(own: Any, tokens: torch.Tensor) -> None:
    edit = projection(0, 3, site="mlp_out") + weight_edit(own, 2)
    with edit.applied(own):
        wanted = logits(own, tokens)
    unedited, flags = logits(own, tokens), [p.requires_grad for p in own.parameters()]
    edit.merge_(own)
    assert not any(point.fwd_hooks for point in own.hook_dict.values())
    assert [p.requires_grad for p in own.parameters()] == flags
    torch.testing.assert_close(logits(own, tokens), wanted, atol=2e-5, rtol=0)
    assert float((logits(own, tokens) - unedited).abs().max()) > 1e-2


def test_what_cannot_be_merged_leaves_the_model_as_it_was(model: LensModel, loaded: Any) -> None:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0)
    before = state_of(model)
    for edit in (projection(1), steering, weight_edit(model, 1) + projection(2)):
        with pytest.raises(ValueError, match="Keep the edit as hooks"):
            edit.merge_(model)
        assert_same_state(before, state_of(model))
    if loaded.family == "gemma2":
        before = state_of(loaded)
        with pytest.raises(ValueError, match="a norm stands"):
            (projection(1, site="mlp_out") + weight_edit(loaded, 2)).merge_(loaded)
        assert_same_state(before, state_of(loaded))


def test_what_is_not_exact_is_refused_in_half_precision_too(tmp_path: Path) -> None:
    """There the comparison of logits is too coarse to tell."""
    folder = save_family("gemma2", tmp_path / "gemma2")
    half = load_model(folder, backend="bridge", dtype=torch.bfloat16)
    before = state_of(half)
    for edit, match in (
        (projection(2, rank=1, site="mlp_out"), "a norm stands"),
        (projection(0, site="resid_pre"), "tied"),
    ):
        with pytest.raises(ValueError, match=match):
            edit.merge_(half)
        assert_same_state(before, state_of(half))


def test_a_model_that_computes_something_else_once_written_is_brought_back(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(own)
    monkeypatch.setattr(
        "mrp_lens.edits.projection.project_writers", lambda writers, subspace: writers[0][0].data.mul_(1.1)
    )
    with pytest.raises(ValueError, match=r"differ by .* of their spread"):
        projection(1, site="mlp_out").merge_(own)
    assert_same_state(before, state_of(own))


@pytest.mark.parametrize(("hook", "merges"), [("blocks.1.hook_mlp_out", False), ("blocks.1.hook_attn_out", True)])
def test_a_mixture_of_experts_has_no_single_matrix(
    backend: str, tmp_path: Path, tokens: torch.Tensor, hook: str, merges: bool
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    sizes = {**FAMILIES["llama"][2], "num_local_experts": 4, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixture = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    mixture.save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    own = load_model(tmp_path / "mixtral", backend=backend)
    edit, before = ProjectionEdit({hook: Subspace.random(3, D_MODEL)}), state_of(own)
    with edit.applied(own):
        wanted = logits(own, tokens)
    if merges:
        edit.merge_(own)
        torch.testing.assert_close(logits(own, tokens), wanted, atol=1e-5, rtol=0)
    else:
        with pytest.raises(
            ValueError, match=r"no single matrix \(a mixture of experts, perhaps\)\. Keep the edit as hooks"
        ):
            edit.merge_(own)
        assert_same_state(before, state_of(own))
