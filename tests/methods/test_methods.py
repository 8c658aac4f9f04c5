"""What holds for every method, and RMU."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mrp_lens as ml
from mrp_lens.data import Corpus, Document
from mrp_lens.edits import EditStack, ProjectionEdit, SteeringEdit, WeightEdit, projection_in
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import (
    METHODS,
    MRP,
    NPO,
    RMU,
    UNDIAL,
    AdaptiveRMU,
    Coverage,
    DirectionAblation,
    GradientDifference,
    IdkPreference,
    NoisyRMU,
    SimNPO,
    UnconditionalMRP,
)
from mrp_lens.models import LensModel, available_backends, encoder_for, load_model, logits_of, mlp_out_weight
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.models.hooks import captured, hook_name
from mrp_lens.training import Evaluation, NonFiniteLossError, TrainingRun
from mrp_lens.utils.registry import Registry
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of
from tests.support.edits import conditional, projection

Texts = tuple[Corpus, Corpus]
QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8}
PREDICTED = [kind(**QUICK) for kind in (NPO, SimNPO, IdkPreference, UNDIAL)]
ALL = [MRP(**QUICK), RMU(**QUICK), AdaptiveRMU(**QUICK), *PREDICTED]
FIT: dict[str, Any] = {"seed": 0, "progress": False}

every_method = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)


def tensors_of(edit: Any) -> dict[str, torch.Tensor]:
    """Of an edit: projections as what they project on, since a subspace has many bases; of their gates the numbers, too."""
    tensors = dict(edit.to_parts()[1])
    if isinstance(edit, ProjectionEdit):
        tensors = {name: t if name.startswith("gate.") else Subspace(t).projector() for name, t in tensors.items()}
        for request in edit.requests:
            for hook, gate in edit.gates(request).items():
                tensors |= {f"{request} {hook} {n}": torch.tensor(x) for n, x in gate.numbers.items()}
    return tensors


def assert_close(one: Any, other: Any) -> None:
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    # a projection starts from eigenvectors and L-BFGS, which magnify differences of rounding
    projected = projection_in(one) is not None
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3 if projected else 2e-4, rtol=2e-3 if projected else 1e-3)


@every_method
def test_an_update_reads_a_piece_of_a_long_retain_document(
    model: LensModel, texts: Texts, method: Any, untouched: None
) -> None:
    longest = max(len(row.ids) for row in encoder_for(model).encode(texts[1].documents))

    def fitted(length: int | None) -> dict[str, torch.Tensor]:
        quick = replace(method, retain_length=length, coverage=None, budget=None)
        return tensors_of(quick.fit(model, *texts, **FIT).edit)

    whole, longer, pieces = fitted(None), fitted(longest), fitted(4)
    assert all(torch.equal(whole[name], longer[name]) for name in whole)  # no document is longer
    assert not all(torch.equal(whole[name], pieces[name]) for name in whole)
    with pytest.raises(ValueError, match="retain_length must be"):
        fitted(0)


@every_method
def test_a_fit_leaves_the_model_untouched_and_repeats_with_its_seed(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    one, two, other = (method.fit(model, *texts, seed=seed, progress=False) for seed in (0, 0, 1))
    a, b, c = (dict(fit.edit.to_parts()[1]) for fit in (one, two, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert one.log.drop(columns="seconds").equals(two.log.drop(columns="seconds"))
    assert list(one.log["step"]) == [0, 1, 2]
    assert {"loss", "forget", "retain", "seconds"} <= set(one.log.columns)


@pytest.mark.slow
@every_method
def test_micro_batches_give_the_same_edit(method: Any, model: LensModel, texts: Texts, untouched: None) -> None:
    assert_close(*(replace(method, micro_batch=size).fit(model, *texts, **FIT).edit for size in (None, 3)))


@pytest.mark.slow
@every_method
def test_both_classes_learn_the_same(method: Any, tiny_folder: Path, texts: Texts) -> None:
    if len(available_backends()) < 2:
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    models = [load_model(tiny_folder, backend=backend) for backend in ("hooked", "bridge")]
    assert_close(*(method.fit(each, *texts, **FIT).edit for each in models))


@pytest.mark.slow
@every_method
def test_fits_work_in_bfloat16_with_float32_masters(method: Any, backend: str, tiny_folder: Path, texts: Texts) -> None:
    half = load_model(tiny_folder, backend=backend, dtype=torch.bfloat16)  # type: ignore[arg-type]
    edit = replace(method, lr=1e-5 if method in PREDICTED else None).fit(half, *texts, **FIT).edit
    tensors = edit.to_parts()[1].values()
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert all(
        (tensor != tensor.to(torch.bfloat16).float()).any() for tensor in tensors
    )  # bfloat16 would round it away
    with edit.applied(half):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@every_method
def test_an_evaluation_during_a_fit_sees_what_the_edit_makes_of_the_model(
    method: Any, model: LensModel, texts: Texts, tokens: torch.Tensor, gated: bool, untouched: None
) -> None:
    """Also the last of an odd number of steps, in which MRP trains without the earlier rows."""

    def logits(into: dict[int, torch.Tensor], done: int) -> None:
        with torch.no_grad():
            into[done] = logits_of(model, tokens, torch.ones_like(tokens, dtype=torch.bool))

    seen: dict[int, torch.Tensor] = {}
    after = DirectionAblation(layers=[0]).fit(model, *texts, request="earlier", **FIT).edit
    if gated:
        after = conditional(*range(LAYERS), rank=1, request="earlier")
    method = replace(method, steps=2)
    evaluation = Evaluation(lambda done: logits(seen, done), marks=(0, 2))
    edit = method.fit(model, *texts, after=after, callbacks=[evaluation], **FIT).edit
    assert_close(edit.parts[-1], method.fit(model, *texts, after=after, **FIT).edit.parts[-1])
    for done, on in ((2, edit), (0, method.start(model, *texts, after=after) if method.name == "mrp" else after)):
        with on.applied(model):
            logits(seen, 9)
        torch.testing.assert_close(seen[done], seen[9], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(seen[0], seen[2], atol=1e-4)


@every_method
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


@pytest.mark.parametrize("method", [RMU(lr=1e30, **QUICK), AdaptiveRMU(lr=1e30, **QUICK)], ids=lambda m: m.name)
def test_a_non_finite_loss_stops_the_fit_and_leaves_the_model(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step [12].*Lower the learning rate"):
        method.fit(model, *texts, **FIT)


def test_a_nan_from_the_model_stops_mrp_whose_own_loss_no_rate_can_break(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    def nan(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation * float("nan")

    name = hook_name(LAYERS - 1)
    context = model.hooks(fwd_hooks=[(name, nan)])  # type: ignore[attr-defined]
    with context, pytest.raises(NonFiniteError, match=f"the first state that does is {name}"):
        MRP(init="random", **QUICK).fit(model, *texts, **FIT)


@every_method
def test_an_empty_corpus_is_refused(method: Any, model: LensModel, texts: Texts, untouched: None) -> None:
    empty = Corpus.from_texts([], name="nothing")
    with pytest.raises(ValueError, match="forget corpus 'nothing' is empty"):
        method.fit(model, empty, texts[1], **FIT)
    with pytest.raises(ValueError, match="retain corpus 'nothing' is empty"):
        method.fit(model, texts[0], empty, **FIT)
    with pytest.raises(TypeError, match="retain must be a Corpus, got list"):
        method.fit(model, texts[0], ["a"], **FIT)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MRP(layers=[LAYERS], **QUICK), f"this model has layers 0..{LAYERS - 1}"),
        (MRP(layers=[-1], **QUICK), f"this model has layers 0..{LAYERS - 1}"),
        (RMU(layer=LAYERS, **QUICK), f"this model has layers 0..{LAYERS - 1}"),
        (NPO(layers=[9]), f"this model has layers 0..{LAYERS - 1}"),
        (RMU(layer=1, trained_layers=(2,)), r"trained_layers \(2,\) reach beyond layer 1"),
        (
            RMU(layer=2, trained_layers=(2,), site="attn_out"),
            "layer 1, the last whose MLP comes before 'attn_out' of layer 2",
        ),
        (RMU(layer=0, site="resid_pre"), "'resid_pre' of layer 0 lies before every MLP"),
        (MRP(layers=[], **QUICK), "no layers given"),
        (MRP(rank=D_MODEL, **QUICK), f"rank {D_MODEL} must be below d_model {D_MODEL}"),
        (MRP(site="resid", **QUICK), "unknown site 'resid'"),
        (DirectionAblation(site="nowhere"), "unknown site 'nowhere'"),
        (RMU(direction="north", **QUICK), "unknown direction 'north'; choose one of uniform, gaussian"),
        (AdaptiveRMU(coefficient="all"), "unknown coefficient 'all'"),
        (RMU(errors="squared"), "unknown errors 'squared'; choose one of relative, absolute"),
        (MRP(init="cold"), "unknown init 'cold'"),
        (MRP(forget_loss="hinge"), "unknown forget_loss 'hinge'"),
        (MRP(steps=0), "steps must be above 0"),
        (NPO(steps=0), "steps must be above 0"),
        (RMU(alpha=-1.0), "alpha must be above 0"),
        (RMU(steering_coeff=0.0), "steering_coeff must be above 0"),
        (AdaptiveRMU(beta=0.0), "beta must be above 0"),
        (NPO(beta=0.0), "beta must be above 0"),
        (NPO(unit="token"), "unit must be 'document' for npo, got 'token'; leave it out"),
        (SimNPO(beta=-1.0), "beta must be above 0, got -1.0"),
        (SimNPO(gamma=-0.5), "gamma must be a number of at least 0, got -0.5; the paper's is 0"),
        (SimNPO(gamma=float("nan")), "gamma must be a number of at least 0, got nan"),
        (IdkPreference(beta=0.0), "beta must be above 0, got 0.0"),
        (IdkPreference(unit="word"), "unknown unit 'word'; choose one of token, document"),
        (UNDIAL(strength=0.0), "strength must be above 0, got 0.0"),
        (UNDIAL(retain_weight=-1.0), "retain_weight must be at least 0 and finite, got -1.0"),
        (UNDIAL(retain_weight=float("inf")), "retain_weight must be at least 0 and finite, got inf"),
        (NPO(target=0.3), "target 0.3 needs a budget"),
        (MRP(coverage=Coverage(repeats=-1)), "repeats must be at least 0, got -1"),
        (MRP(retain_energy=90.0), "retain_energy is a share, above 0 and at most 1; got 90.0"),
        (MRP(gate_weight=float("inf")), "gate_weight must be at least 0 and finite, got inf"),
        (MRP(forget_loss="ascent", forget_bound=3.0), "forget_loss='ascent' has no bound, got forget_bound=3.0"),
        (UnconditionalMRP(gate_directions=4), "without a gate there is nothing that gate_directions=4 could be of"),
        (MRP(coverage=False), "coverage must be a Coverage, or None to read the corpora alone, got False"),  # type: ignore[arg-type]
        (RMU(micro_batch=0), "micro_batch must be above 0"),
        (GradientDifference(retain_weight=-1.0), "retain_weight must be at least 0"),
        (NoisyRMU(retain_noise=-0.1), "retain_noise is a share"),
        (RMU(steps=2.5), "steps must be a whole number, got 2.5"),
        (RMU(lr="fast"), "lr must be a number, got 'fast'"),
        (MRP(rank=True), "rank must be a number, got True"),
        (NPO(batch_size=3.0), "batch_size must be a whole number, got 3.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(
    method: Any, message: str, model: LensModel, texts: Texts, untouched: None
) -> None:
    with pytest.raises(
        TypeError if "number, got" in message or "must be a Coverage" in message else ValueError, match=message
    ):
        method.fit(model, *texts, **FIT)


@every_method
def test_a_fit_on_a_model_with_an_edit_on_is_refused(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    """It would read the edited states as the model's own, and its edit would fit neither model."""
    with projection(1).applied(model), pytest.raises(ValueError, match=r"an edit is on this model .* after="):
        method.fit(model, *texts, **FIT)


def test_prompts_that_fill_what_is_read_are_told(model: LensModel, texts: Texts) -> None:
    asked = [
        Document("the old man " * 40, "walked"),
        Document("The old", " man walked."),
        Document("", "The sage is old."),
    ]
    fit = UnconditionalMRP(**QUICK, max_length=24)
    with (
        pytest.warns(UserWarning, match="1 of 3 documents are longer than 24 tokens"),
        pytest.warns(UserWarning, match="the prompts of 1 of 3 documents of 'asked' fill the 24 tokens that are read"),
    ):
        fit.fit(model, Corpus(tuple(asked), "asked"), texts[1], **FIT)
    with (
        pytest.warns(UserWarning, match="1 of 1 documents are longer"),
        pytest.raises(ValueError, match="'asked' is empty: the prompts of 1 of 1 documents"),
    ):
        fit.fit(model, Corpus(tuple(asked[:1]), "asked"), texts[1], **FIT)


def test_what_is_steered_before_the_mlp_is_trained_in_the_layers_below(model: LensModel, texts: Texts) -> None:
    fit = RMU(layer=2, site="attn_out", steps=3, budget=None, coverage=None).fit(model, *texts, **FIT)
    assert fit.edit.layers == (0, 1)
    assert fit.log["forget"].iloc[-1] != fit.log["forget"].iloc[0]


def test_a_later_request_that_has_no_room_is_refused_before_training(model: LensModel, texts: Texts) -> None:
    first = UnconditionalMRP(layers=[1], rank=D_MODEL // 2, steps=1).fit(model, *texts, request="a", **FIT).edit
    method = UnconditionalMRP(layers=[1], rank=D_MODEL // 2, steps=1, init="random")
    with pytest.raises(
        ValueError,
        match=rf"earlier requests take {D_MODEL // 2} of {D_MODEL} directions.* have {D_MODEL // 2 - 1}; give",
    ):
        method.fit(model, *texts, after=first, request="b", **FIT)


@pytest.mark.slow
def test_a_single_short_text_is_unlearned_though_nothing_can_be_asked_about_it(
    model: LensModel, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    single = Corpus.from_texts(["The old man walked near the quiet house."])
    # A bound above what a model that has learned nothing gives: below it nothing would be learned.
    fit = MRP(layers=[1], rank=2, steps=40, budget=0.5, forget_bound=20.0, coverage=None).fit(
        model, single, texts[1], **FIT
    )
    assert fit.outcome is not None
    assert (fit.outcome.ended, bool(fit.outcome), len(fit.log)) == ("unknown", False, 40)
    assert "too much alike for control questions: the fit makes all of its updates" in caplog.text
    assert fit.log["forget_cross_entropy"].iloc[-1] > fit.log["forget_cross_entropy"].iloc[0] + 0.1


def test_a_rank_above_the_directions_that_the_texts_leave_is_refused(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    few = Corpus.from_texts(["red blue"], name="few")
    with pytest.raises(ValueError, match=r"rank 20 is above the \d directions"):
        MRP(rank=20, **QUICK).fit(model, few, texts[1], **FIT)


@pytest.mark.slow
def test_training_from_the_start_lowers_the_loss(model: LensModel, texts: Texts, untouched: None) -> None:
    for method in (MRP(steps=30, batch_size=16), RMU(steps=30, batch_size=16), AdaptiveRMU(steps=30, batch_size=16)):
        log = method.fit(model, *texts, **FIT).log
        assert log["loss"].tail(5).mean() < log["loss"].head(5).mean(), method.name


def test_rmu_after_mrp_and_after_rmu_stack_in_order(model: LensModel, texts: Texts, untouched: None) -> None:
    first = RMU(layer=1, **QUICK).fit(model, *texts, **FIT)
    second = RMU(layer=1, **QUICK).fit(model, *texts, after=first.edit, seed=1, progress=False)
    third = MRP(layers=[2], rank=2, **QUICK).fit(model, *texts, after=second.edit, **FIT)
    assert isinstance(third.edit, EditStack)
    assert [type(part).__name__ for part in third.edit.parts] == [
        "WeightEdit",
        "WeightEdit",
        "ConditionalProjectionEdit",
    ]
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


@pytest.mark.slow
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
    published = {"layer": 7, "steering_coeff": 6.5, "alpha": 1200.0, "lr": 5e-5, "batch_size": 4, "steps": 150}
    assert {name: getattr(rmu, name) for name in published} == published
    assert (adaptive.beta, adaptive.coefficient, adaptive.steps) == (5.0, "first_batch", 500)
    assert rmu.errors == adaptive.errors == "absolute"
    assert rmu.positions == adaptive.positions == "all"
    assert rmu.eps == adaptive.eps == 1e-6


def test_released_counts_pads_and_bos_and_the_default_does_not(model: LensModel, texts: Texts, untouched: None) -> None:
    fits = [
        RMU(positions=positions, layer=1, steering_coeff=5.0, **QUICK).fit(model, *texts, **FIT)
        for positions in ("content", "all")
    ]  # type: ignore[arg-type]
    assert fits[0].log["forget"].iloc[0] != fits[1].log["forget"].iloc[0]


@pytest.mark.slow
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
        RMU(layer=2, coverage=None, **QUICK).fit(model, *texts, **FIT)
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
    old = before["weights"][next(name for name, own in model.named_parameters() if own is weight.parameter)]
    weight.write(old.T if weight.transposed else old)
    assert_same_state(before, state_of(model))


def test_the_methods_are_listed_with_mrp_first_and_say_what_they_are() -> None:
    names = (
        "mrp mrp-unconditional rmu adaptive-rmu gradient-ascent gradient-difference rmu-noise direction-ablation "
        "npo simnpo idk-preference undial"
    )
    assert [name for name, kind in METHODS.items() if kind.__module__.startswith("mrp_lens.")] == names.split()
    for name, kind in METHODS.items():
        assert kind.name == name
        assert kind.summary.endswith(".")
        assert kind.report


@dataclass(frozen=True)
class WhereSettings:
    layer: int


def test_a_method_of_ones_own_is_one_class_by_the_template_or_with_a_fit_whole(
    model: LensModel, texts: Texts, tmp_path: Path, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrp_lens.methods.registry.METHODS", Registry("method", "mrp_lens.methods"))
    told = {"source": "here", "report": "steered at {layer}"}

    @ml.methods.register("mine", summary="Steers.", **told)
    @dataclass(frozen=True, kw_only=True)
    class Mine(ml.methods.FitTemplate[WhereSettings]):
        layer: int | None = None

        def resolve(self, model: LensModel, data: ml.methods.Data) -> WhereSettings:
            return WhereSettings(layer=1 if self.layer is None else self.layer)

        def learn(self, settings: WhereSettings, context: ml.methods.FitContext) -> ml.methods.Fit:
            direction = torch.randn(context.model.cfg.d_model, generator=context.generator)
            run = TrainingRun(pd.DataFrame([{"step": 0, "loss": 0.0, "seconds": 0.0}]), interrupted=False)
            edit = SteeringEdit.towards(direction, layer=settings.layer, coefficient=3.0)
            edit.provenance = context.provenance(steps=1)
            return context.result(edit, run)

    @ml.methods.register("whole", summary="Steers.", **told)
    @dataclass(frozen=True)
    class Whole(ml.methods.Method):
        def fit(self, model: LensModel, forget: Any, retain: Any, **options: Any) -> ml.methods.Fit:  # type: ignore[override]
            return Mine(layer=2).fit(model, forget, retain, **options)

    first = Mine().fit(model, *texts, seed=1, checkpoint=tmp_path, progress=False)
    assert first.edit.layers == (1,)
    assert first.settings == {"layer": 1}
    assert first.edit.provenance["method"] == "mine"
    assert first.edit.provenance["steps_done"] == 1
    assert Whole().fit(model, *texts, after=first.edit, **FIT).edit.layers == (1, 2)
    with pytest.raises(ValueError, match="another fit"):
        Mine().fit(model, *texts, seed=2, checkpoint=tmp_path, progress=False)
    for abstract in (ml.methods.Method, ml.methods.FitTemplate, RMU.__mro__[1]):
        with pytest.raises(TypeError, match="abstract"):
            abstract()  # type: ignore[abstract]
