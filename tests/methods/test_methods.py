import os
import signal
from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import EditStack, WeightEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import MRP, RMU, AdaptiveRMU
from mrp_lens.models import LensModel, encoder_for, load_model, logits_of, mlp_out_weight
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.models.hooks import captured, hook_name
from mrp_lens.training.loop import NonFiniteLossError
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of

Texts = tuple[Corpus, Corpus]
QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8}
ALL = [MRP(**QUICK), RMU(**QUICK), AdaptiveRMU(**QUICK)]
FIT: dict[str, Any] = {"seed": 0, "progress": False}


def tensors_of(edit: Any) -> dict[str, torch.Tensor]:
    return dict(edit.to_parts()[1])


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_a_fit_leaves_the_model_untouched_and_repeats_with_its_seed(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    one, two, other = (method.fit(model, *texts, seed=seed, progress=False) for seed in (0, 0, 1))
    a, b, c = (tensors_of(fit.edit) for fit in (one, two, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert one.log.drop(columns="seconds").equals(two.log.drop(columns="seconds"))
    assert list(one.log["step"]) == [0, 1, 2]
    assert {"loss", "forget", "retain", "seconds"} <= set(one.log.columns)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_micro_batches_give_the_same_edit(method: Any, model: LensModel, texts: Texts, untouched: None) -> None:
    from dataclasses import replace

    whole = tensors_of(method.fit(model, *texts, **FIT).edit)
    split = tensors_of(replace(method, micro_batch=3).fit(model, *texts, **FIT).edit)
    for name in whole:
        a, b = (t if method.name != "mrp" else Subspace(t).projector() for t in (whole[name], split[name]))
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_both_backends_learn_the_same(
    method: Any, tiny_folder: Any, texts: Texts, backend: str, model: LensModel
) -> None:
    if backend == "bridge":
        pytest.skip("compared from the hooked side")
    other = load_model(str(tiny_folder), backend="bridge")
    a, b = (tensors_of(method.fit(m, *texts, **FIT).edit) for m in (model, other))
    for name in a:
        x, y = (t if method.name != "mrp" else Subspace(t).projector() for t in (a[name], b[name]))
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_fits_work_in_bfloat16_with_float32_masters(method: Any, backend: str, tiny_folder: Any, texts: Texts) -> None:
    half = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)  # type: ignore[arg-type]
    fit = method.fit(half, *texts, **FIT)
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(fit.edit).values())
    with fit.edit.applied(half):
        pass


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_ctrl_c_keeps_what_was_learned(
    method: Any, model: LensModel, texts: Texts, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mrp_lens.training.loop as training

    real, calls = training._accumulate, []

    def interrupting(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(training, "_accumulate", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    fit = method.fit(model, *texts, **FIT)
    assert fit.interrupted
    assert len(fit.log) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    with fit.edit.applied(model):
        pass


@pytest.mark.parametrize(
    "method", [MRP(lr=1e30, **QUICK), RMU(lr=1e30, **QUICK), AdaptiveRMU(lr=1e30, **QUICK)], ids=lambda m: m.name
)
def test_a_non_finite_loss_stops_the_fit_and_leaves_the_model(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    if (
        method.name == "mrp"
    ):  # its loss depends on the span alone, so no learning rate breaks it; a NaN from the model does
        name = hook_name(LAYERS - 1)

        def nan(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            return activation * float("nan")

        context = model.hooks(fwd_hooks=[(name, nan)])  # type: ignore[attr-defined]
        with context, pytest.raises(NonFiniteError, match=f"the first state that does is {name}"):
            MRP(init="random", **QUICK).fit(model, *texts, **FIT)
    else:
        with pytest.raises(NonFiniteLossError, match=r"step [12].*Lower the learning rate"):
            method.fit(model, *texts, **FIT)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_an_empty_corpus_is_refused(method: Any, model: LensModel, texts: Texts, untouched: None) -> None:
    empty = Corpus.from_texts([], name="nothing")
    with pytest.raises(ValueError, match="forget corpus 'nothing' is empty"):
        method.fit(model, empty, texts[1], **FIT)
    with pytest.raises(ValueError, match="retain corpus 'nothing' is empty"):
        method.fit(model, texts[0], empty, **FIT)
    with pytest.raises(TypeError, match="expected a Corpus, got list"):
        method.fit(model, texts[0], ["a"], **FIT)


def test_layers_and_ranks_out_of_range_are_refused(model: LensModel, texts: Texts, untouched: None) -> None:
    for method in (MRP(layers=[LAYERS], **QUICK), MRP(layers=[-1], **QUICK), RMU(layer=LAYERS, **QUICK)):
        with pytest.raises(ValueError, match=f"this model has layers 0..{LAYERS - 1}"):
            method.fit(model, *texts, **FIT)
    with pytest.raises(ValueError, match="no layers given"):
        MRP(layers=[], **QUICK).fit(model, *texts, **FIT)
    with pytest.raises(ValueError, match=f"rank {D_MODEL} must be below d_model {D_MODEL}"):
        MRP(rank=D_MODEL, **QUICK).fit(model, *texts, **FIT)
    few = Corpus.from_texts(["red blue"], name="few")
    with pytest.raises(ValueError, match=r"rank 20 is above the \d directions"):
        MRP(rank=20, **QUICK).fit(model, few, texts[1], **FIT)
    with pytest.raises(ValueError, match="unknown site 'resid'"):
        MRP(site="resid", **QUICK).fit(model, *texts, **FIT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown direction 'north'"):
        RMU(direction="north", **QUICK).fit(model, *texts, **FIT)  # type: ignore[arg-type]
    for bad in (MRP(steps=0), RMU(alpha=-1.0), AdaptiveRMU(beta=0.0), RMU(micro_batch=0)):
        with pytest.raises(ValueError, match="must be above 0"):
            bad.fit(model, *texts, **FIT)


def test_training_from_the_start_lowers_the_loss(model: LensModel, texts: Texts, untouched: None) -> None:
    for method in (MRP(steps=30, batch_size=16), RMU(steps=30, batch_size=16), AdaptiveRMU(steps=30, batch_size=16)):
        log = method.fit(model, *texts, **FIT).log
        assert log["loss"].tail(5).mean() < log["loss"].head(5).mean(), method.name


def test_rmu_after_mrp_and_after_rmu_stack_in_order(model: LensModel, texts: Texts, untouched: None) -> None:
    first = RMU(layer=1, **QUICK).fit(model, *texts, **FIT)
    second = RMU(layer=1, **QUICK).fit(model, *texts, after=first.edit, seed=1, progress=False)
    third = MRP(layers=[2], rank=2, **QUICK).fit(model, *texts, after=second.edit, **FIT)
    assert isinstance(third.edit, EditStack)
    assert [type(part).__name__ for part in third.edit.parts] == ["WeightEdit", "WeightEdit", "ProjectionEdit"]
    with third.edit.applied(model):
        last = third.edit.parts[1]
        assert isinstance(last, WeightEdit)
        for layer in (0, 1):
            weight = mlp_out_weight(model, layer)
            torch.testing.assert_close(weight.read(), last.tensors[weight.name])


def test_rmu_trains_three_matrices_and_moves_forget_states_towards_its_direction(
    model: LensModel, texts: Texts, untouched: None
) -> None:

    fit = RMU(layer=2, steps=60, batch_size=16, lr=1e-2).fit(model, *texts, **FIT)
    assert isinstance(fit.edit, WeightEdit)
    assert list(fit.edit.tensors) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 2)]
    encoder, name = encoder_for(model), hook_name(2)
    batch = encoder.collate(encoder.encode(texts[0].documents))

    def cosine() -> float:
        with captured(model, [name]) as store, torch.no_grad():
            logits_of(model, batch.tokens, batch.attention_mask)
        return float(torch.cosine_similarity(store[name][batch.content_mask], fit.direction, dim=-1).mean())

    before = cosine()
    with fit.edit.applied(model):
        assert cosine() > before + 0.3


def test_several_forget_corpora_take_turns_each_with_its_own_direction(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    other = Corpus.from_texts(["The metal of Zaxim is iron."] * 4, name="other")
    fit = RMU(direction="gaussian", **QUICK).fit(model, [texts[0], other], texts[1], **FIT)
    a, b = fit.directions["forget"], fit.directions["other"]
    assert abs(float(a @ b)) < 0.6
    assert float(a.norm()) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="2 directions"):
        _ = fit.direction
    with pytest.raises(ValueError, match="each with its own name"):
        RMU(**QUICK).fit(model, [other, other], texts[1], **FIT)
    assert (MRP(**QUICK).fit(model, [texts[0], other], texts[1], **FIT).edit.requests) == ("forget+other",)  # type: ignore[attr-defined]


@pytest.mark.parametrize("coefficient", ["token", "sample", "first_batch"])
def test_adaptive_coefficients_are_beta_times_the_stated_norm(model: LensModel, coefficient: Any) -> None:
    method = AdaptiveRMU(beta=3.0, coefficient=coefficient)
    states = torch.randn(2, 4, D_MODEL, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    norms = states.norm(dim=-1)
    got = torch.as_tensor(method.c(None, states, mask, None))
    if coefficient == "token":
        torch.testing.assert_close(got[mask][:, 0], 3.0 * norms[mask])
    elif coefficient == "sample":
        torch.testing.assert_close(got.flatten(), 3.0 * torch.stack([norms[0, 1:].mean(), norms[1, 1]]))
    else:
        assert float(got) == pytest.approx(3.0 * float(norms[mask].mean()), rel=1e-5)
        assert method.c(None, states, mask, 7.0) == 7.0


def test_uniform_directions_are_far_from_isotropic_and_gaussian_ones_are_not(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    """Two uniform directions have cosine 0.75, two Gaussian ones 0 (papers.md, checked there)."""
    for law, expected in (("uniform", 0.75), ("gaussian", 0.0)):
        directions = [
            RMU(direction=law, steps=1, batch_size=2).fit(model, *texts, seed=s, progress=False).direction
            for s in range(6)
        ]  # type: ignore[arg-type]
        cosines = [float(a @ b) for i, a in enumerate(directions) for b in directions[:i]]
        assert sum(cosines) / len(cosines) == pytest.approx(expected, abs=0.15)


def test_the_released_recipes_are_as_published() -> None:
    rmu, adaptive = RMU.released(), AdaptiveRMU.released()
    assert (rmu.layer, rmu.steering_coeff, rmu.alpha, rmu.lr, rmu.batch_size, rmu.steps) == (
        7,
        6.5,
        1200.0,
        5e-5,
        4,
        150,
    )
    assert (adaptive.beta, adaptive.coefficient, adaptive.steps) == (5.0, "first_batch", 500)
    assert rmu.positions == adaptive.positions == "all"
    assert rmu.eps == adaptive.eps == 1e-6


def test_released_counts_pads_and_bos_and_the_default_does_not(model: LensModel, texts: Texts, untouched: None) -> None:
    fits = [
        RMU(positions=positions, layer=1, steering_coeff=5.0, **QUICK).fit(model, *texts, **FIT)
        for positions in ("content", "all")
    ]  # type: ignore[arg-type]
    assert fits[0].log["forget"].iloc[0] != fits[1].log["forget"].iloc[0]


def test_a_fit_holds_no_second_copy_of_the_model(model: LensModel, texts: Texts, untouched: None) -> None:
    """Beside the model's own parameters, RMU may hold the three trained matrices with their gradient, Adam's two
    moments, and small tensors; never the other matrices again."""
    import gc

    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2 and p.numel() > 1000}
    shapes |= {shape[::-1] for shape in shapes}

    def matrices() -> dict[int, int]:
        alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and tuple(t.shape) in shapes]
        return {t.untyped_storage().data_ptr(): t.numel() for t in alive}

    before, seen = set(matrices()), []

    def census(activation: torch.Tensor, hook: Any) -> None:
        seen.append(sum(size for pointer, size in matrices().items() if pointer not in before))

    trained = 3 * mlp_out_weight(model, 0).parameter.numel()
    total = sum(p.numel() for p in model.parameters())
    with model.hooks(fwd_hooks=[(hook_name(0), census)]):  # type: ignore[attr-defined]
        RMU(layer=2, **QUICK).fit(model, *texts, **FIT)
    assert seen
    assert max(seen) <= 6 * trained < 0.8 * total


def test_the_record_says_how_the_edit_came_about(model: LensModel, texts: Texts, untouched: None) -> None:
    record = RMU(**QUICK).fit(model, *texts, **FIT).edit.provenance
    assert record["method"] == "rmu"
    assert record["data"]["forget"] == [{"name": "forget", "documents": 16, "sha256": texts[0].fingerprint}]
    assert record["settings"]["steering_coeff"] > 0
    assert record["settings"]["lr"] > 0
    assert {"torch", "transformer_lens", "mrp_lens"} <= set(record["versions"])
    assert "Zaxim" not in str(record)


def test_state_helpers_notice_a_change(model: LensModel) -> None:
    before = state_of(model)
    weight = mlp_out_weight(model, 0)
    weight.write(weight.read() + 1e-6)
    with pytest.raises(AssertionError, match="changed"):
        assert_same_state(before, state_of(model))
    weight.write(
        before["weights"][next(n for n, p in model.named_parameters() if p is weight.parameter)].T
        if weight.transposed
        else before["weights"][next(n for n, p in model.named_parameters() if p is weight.parameter)]
    )
    assert_same_state(before, state_of(model))
