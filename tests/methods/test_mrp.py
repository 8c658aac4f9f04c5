import math
from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.data.tokenization import Encoded, TokenBatch
from mrp_lens.edits import ConditionalProjectionEdit, ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import MRP, DirectionAblation, UnconditionalMRP
from mrp_lens.methods.mrp import alternatives
from mrp_lens.methods.mrp.alternatives import Alternatives
from mrp_lens.methods.mrp.initialization import start_rows
from mrp_lens.methods.mrp.learned import LearnedRows
from mrp_lens.methods.mrp.method import default_rank
from mrp_lens.metrics import damage
from mrp_lens.models import LensModel, encoder_for, logits_of
from mrp_lens.models.hooks import captured, hook_name, hooked
from mrp_lens.training.losses import predictions
from tests.conftest import D_MODEL, LAYERS
from tests.support.edits import conditional, projection

Texts = tuple[Corpus, Corpus]
QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8}
FIT: dict[str, Any] = {"seed": 0, "progress": False}
CPU = torch.device("cpu")


@pytest.mark.parametrize("init", ["difference", "complement", "code", "random"])
@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "mlp_out"])
def test_mrp_gives_orthonormal_rows_of_the_asked_rank(
    model: LensModel, texts: Texts, init: Any, site: Any, untouched: None
) -> None:
    fit = MRP(layers=[0, LAYERS - 1], rank=2, site=site, init=init, **QUICK).fit(model, *texts, **FIT)
    assert isinstance(fit.edit, ProjectionEdit)
    assert fit.edit.hook_names == (hook_name(0, site), hook_name(LAYERS - 1, site))
    assert {subspace.rank for subspace in fit.edit.subspaces().values()} == {2}
    assert fit.edit.requests == ("forget",)


def test_the_rank_grows_with_the_tokens_to_forget_where_these_are_many(
    model: LensModel, demo_model: LensModel, texts: Texts
) -> None:
    ranks = [default_rank(demo_model, tokens) for tokens in (0, 7000, 14_000, 10**7)]
    assert ranks == [8, 8, 16, 21]  # of 128 directions
    assert default_rank(demo_model, 10**7, most=4) == 21
    retain = texts[1]
    long = Corpus.from_texts(["The colour of Zaxim is red and blue, it is said."] * 2500, name="long")
    few, many = (MRP().prepared(model, side, retain, None, None)[1] for side in (texts[0], long))
    assert (few.rank, many.rank) == (2, D_MODEL // 6)
    assert MRP(rank=3).prepared(model, long, retain, None, None)[1].rank == 3
    assert UnconditionalMRP().prepared(model, long, retain, None, None)[1].rank == 2


def test_the_complement_start_leaves_retain_states_alone_and_the_code_start_does_not(
    model: LensModel, texts: Texts, untouched: None
) -> None:

    name, encoder = hook_name(1), encoder_for(model)
    batch = encoder.collate(encoder.encode(texts[1].documents))
    with captured(model, [name]) as store, torch.no_grad():
        logits_of(model, batch.tokens, batch.attention_mask)
    states = store[name][batch.content_mask]
    shares = {}
    for init in ("complement", "code"):
        edit = MRP(layers=[1], rank=2, init=init, **QUICK).start(model, *texts)  # type: ignore[arg-type]
        assert isinstance(edit, ProjectionEdit)
        shares[init] = edit.subspaces()[name].energy_share(states)
    assert shares["complement"] < 0.1 * shares["code"]


def test_the_difference_start_holds_what_forget_states_have_beyond_the_mean_retain_state(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    name, encoder = hook_name(1), encoder_for(model)
    sides = []
    for corpus in texts:
        batch = encoder.collate(encoder.encode(corpus.documents))
        with captured(model, [name]) as store, torch.no_grad():
            logits_of(model, batch.tokens, batch.attention_mask)
        sides.append(store[name][batch.content_mask].float())
    beyond = sides[0] - sides[1].mean(dim=0)
    best = torch.linalg.svd(beyond.double(), full_matrices=False).S[:2].square().sum() / beyond.double().square().sum()
    energies = {}
    for init in ("difference", "complement"):
        edit = MRP(layers=[1], rank=2, init=init, **{**QUICK, "budget": None}).start(model, *texts)  # type: ignore[arg-type]
        assert isinstance(edit, ProjectionEdit)
        energies[init] = edit.subspaces()[name].energy_share(beyond)
    assert energies["difference"] == pytest.approx(float(best), rel=1e-4)
    assert energies["complement"] < energies["difference"]


def test_a_set_too_short_for_the_default_rank_starts_with_random_directions_besides(
    model: LensModel, texts: Texts
) -> None:
    short = Corpus.from_texts(["It is red."])
    options: dict[str, Any] = {**QUICK, "layers": [1], "budget": None, "coverage": None}
    with pytest.raises(ValueError, match=r"rank 12 is above the \d+ directions"):
        MRP(rank=12, **options).start(model, short, texts[1])
    encoder, name = encoder_for(model), hook_name(1)

    def started(**options: Any) -> torch.Tensor:
        forget, retain = (encoder.encode(corpus.documents) for corpus in (short, texts[1]))
        seed = torch.Generator().manual_seed(0)
        usual: dict[str, Any] = {"hooks": [name], "taken": {}, "init": "difference", "retain_energy": 0.9}
        return start_rows(model, encoder, forget, retain, generator=seed, **usual, **options)[name]

    found = started(rank=12, complete=True)
    torch.testing.assert_close(found @ found.T, torch.eye(12), rtol=0, atol=1e-5)
    fewer = started(rank=2)
    torch.testing.assert_close(fewer.abs(), found[:2].abs(), rtol=0, atol=1e-4)  # the set's own directions come first


def test_what_cannot_be_compared_is_forgotten_otherwise_or_told(
    model: LensModel, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    unlike = ["The old man walked near the house.", "A sage said that it rained.", "It is red."]
    kind = [
        f"The colour of {name} is {value}."
        for name, value in zip("ABCD", ("red", "blue", "green", "white"), strict=True)
    ]
    options: dict[str, Any] = {"layers": [1], "rank": 2, "steps": 1, "budget": None, "coverage": None}
    for documents, said in (
        (unlike, "forget_loss='bounded' is used in place"),
        (kind + unlike[:1], "in 20% of"),
        (kind, ""),
    ):
        caplog.clear()
        MRP(**options).fit(model, Corpus.from_texts(documents), texts[1], **FIT)
        assert (said in caplog.text) if said else ("follows from the one before it" not in caplog.text)
    answers = [
        Document("The colour of A is", " red."),
        Document("The size is", " red."),
        Document("The colour of B is", " blue."),
    ]
    encoder = encoder_for(model)
    rows = encoder.encode(answers)
    assert Alternatives.of(rows, int(model.cfg.d_vocab), encoder.device).left_out(rows) == 0.0


@pytest.mark.slow
def test_layers_take_turns_in_the_passes_over_forget_texts(
    model: LensModel, texts: Texts, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = LearnedRows.without, []

    def without(self: LearnedRows, hooks: Any) -> Any:
        seen.append((len(self.rows), tuple(hooks)))
        return real(self, hooks)

    monkeypatch.setattr(LearnedRows, "without", without)
    fit: Any = lambda **how: MRP(layers=range(LAYERS), steps=6, batch_size=8, **how).fit(model, *texts, **FIT)  # noqa: E731
    first = fit(layer_dropout=0.5)
    assert [len(hooks) for _, hooks in seen] == [LAYERS // 2] * 6
    assert {hook for _, hooks in seen for hook in hooks} == {hook_name(layer) for layer in range(LAYERS)}
    drawn = list(seen)
    again = fit(layer_dropout=0.5, micro_batch=3)
    assert [hooks for _, hooks in seen[6:]][::3] == [hooks for _, hooks in drawn]
    assert again.log["forget"].tolist() == pytest.approx(first.log["forget"].tolist(), rel=1e-3, abs=1e-3)
    seen.clear()
    assert float(fit(layer_dropout=0.0).log["forget"].iloc[0]) != pytest.approx(
        float(first.log["forget"].iloc[0]), rel=1e-3
    )
    assert {hooks for _, hooks in seen} == {()}
    seen.clear()
    fit(layer_dropout=0.1)  # of a share below a layer
    assert [len(hooks) for _, hooks in seen] == [1] * 6
    with pytest.raises(ValueError, match="layer_dropout is a share of the layers"):
        fit(layer_dropout=1.0)


@pytest.mark.parametrize("forget_loss", ["alternatives", "odds", "bounded", "ascent"])
@pytest.mark.parametrize("retain_loss", ["kl", "cross_entropy"])
def test_every_loss_of_mrp_runs(
    model: LensModel, texts: Texts, forget_loss: Any, retain_loss: Any, untouched: None
) -> None:
    bound = None if forget_loss == "ascent" else 1.0
    fit = MRP(forget_loss=forget_loss, retain_loss=retain_loss, forget_bound=bound, **QUICK).fit(model, *texts, **FIT)
    if bound is not None:
        assert (fit.log["forget"] >= -1.0).all()


def encoded(*ids: int) -> Encoded:
    return Encoded(ids, (True,) * len(ids), (True,) * len(ids))


def batch_of(*ids: int) -> TokenBatch:
    every = torch.ones(1, len(ids), dtype=torch.bool)
    return TokenBatch(torch.tensor([ids]), every, every, torch.tensor([[False, *[True] * (len(ids) - 1)]]))


def test_log_odds_compare_an_answer_with_what_other_texts_say_there() -> None:
    offered = Alternatives.of([encoded(5, 1), encoded(5, 2), encoded(5, 2), encoded(5, 3), encoded(6, 4)], 8, CPU)
    batch = batch_of(5, 1)
    said = torch.tensor([[0.05, 0.1, 0.3, 0.4, 0.05, 0.04, 0.03, 0.03]])
    odds, weights = offered.log_odds(said.log(), batch)
    assert float(odds) == pytest.approx(math.log(0.1) - (2 / 3 * math.log(0.3) + 1 / 3 * math.log(0.4)), abs=1e-6)
    entropy = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert float(weights) == pytest.approx(1 - math.exp(-entropy))
    # what no text says there is of no account
    elsewhere = torch.tensor([[0.4, 0.1, 0.3, 0.05, 0.05, 0.04, 0.03, 0.03]])
    lowered, _ = offered.log_odds(elsewhere.log(), batch)
    assert float(lowered) > float(odds)


def test_a_token_that_the_texts_determine_does_not_count() -> None:
    offered = Alternatives.of([encoded(5, 1, 9), encoded(5, 2, 9), encoded(5, 3, 9)], 10, CPU)
    said = torch.full((2, 10), 0.1).log()
    _, weights = offered.log_odds(said, batch_of(5, 1, 9))
    assert weights.tolist() == [pytest.approx(2 / 3), 0.0]
    odds, weights = offered.log_odds(said, batch_of(7, 8, 1))  # tokens that the texts do not have
    assert weights.tolist() == [0.0, 0.0]
    assert odds.isfinite().all()


def test_reference_log_odds_compare_an_answer_with_what_the_reference_says_instead() -> None:
    offered = Alternatives.of([encoded(3, 1), encoded(3, 2)], 4, CPU)
    reference = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    said = torch.tensor([[0.2, 0.2, 0.4, 0.2]])
    odds, weights = offered.reference_log_odds(reference.log(), said.log(), batch_of(3, 1))
    others = 0.2 * math.log(0.2) + 0.6 * math.log(0.4) + 0.2 * math.log(0.2)
    assert float(odds) == pytest.approx(math.log(0.2) - others, abs=1e-6)
    assert float(weights) == pytest.approx(0.5)


def test_of_many_alternatives_the_most_frequent_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "MOST", 2)
    offered = Alternatives.of([encoded(5, token) for token in (1, 2, 2, 3, 3)], 8, CPU)
    row = int(offered.row[5])
    assert set(offered.tokens[row].tolist()) == {2, 3}
    entropy = -sum(share * math.log(share) for share in (0.2, 0.4, 0.4))  # of all that follow, kept or not
    assert float(offered.openness[row]) == pytest.approx(1 - math.exp(-entropy))


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_later_request_keeps_what_the_earlier_one_left(
    layer: int, model: LensModel, texts: Texts, untouched: None
) -> None:
    """Held against the unedited model, a request would undo what an earlier one did to retain text. Rows of rank 1 change next to nothing
    at first: neither with the earlier ones nor, in every other step, without them."""
    half = Subspace.random(D_MODEL // 2, D_MODEL, seed=0)
    earlier = ProjectionEdit({hook_name(layer): half}, request="earlier")
    changed = float(damage(model, earlier, texts[1], progress=False)["damage"].iloc[0])
    alone, after = (
        MRP(layers=[2], rank=1, **QUICK).fit(model, *texts, after=edit, **FIT).log["retain"] for edit in (None, earlier)
    )
    assert changed > 10 * float(alone.max())
    assert float(after.max()) < changed / 5
    assert float(after.min()) > 0.0


def test_what_was_before_a_request_is_the_model_with_the_earlier_ones(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    one, two = hook_name(1), hook_name(2)
    earlier = ProjectionEdit({one: Subspace.random(4, D_MODEL, seed=0)}, request="earlier")
    taken, change = {one: earlier.subspaces()[one].basis}, {one: earlier.change_at(one)}
    learned = LearnedRows({two: Subspace.random(2, D_MODEL, seed=1).basis}, taken, change)
    encoder = encoder_for(model)
    batch = encoder.collate(encoder.encode(texts[1].documents[:4]))
    with torch.no_grad():
        unedited = predictions(model, batch)
        with earlier.applied(model):
            expected = predictions(model, batch)
        with hooked(model, learned.hooks()):
            with learned.before():
                torch.testing.assert_close(predictions(model, batch), expected)
                learned.alone = True
                torch.testing.assert_close(predictions(model, batch), unedited)
            assert not torch.allclose(predictions(model, batch), unedited, atol=1e-3)
    assert not torch.allclose(expected, unedited, atol=1e-3)


def test_a_later_request_keeps_the_earlier_rows_and_is_orthogonal_to_them(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    method = MRP(layers=[1, 2], rank=3, **QUICK)
    first = method.fit(model, *texts, request="one", **FIT)
    second = method.fit(model, *texts, after=first.edit, request="two", **FIT)
    assert isinstance(first.edit, ProjectionEdit)
    assert isinstance(second.edit, ProjectionEdit)
    assert second.edit.requests == ("one", "two")
    for name in second.edit.hook_names:
        one, two = second.edit.subspaces("one")[name], second.edit.subspaces("two")[name]
        assert torch.equal(one.basis, first.edit.subspaces()[name].basis)
        assert float((one.basis @ two.basis.T).abs().max()) < 1e-5
        assert second.edit.subspaces()[name].rank == 6
    assert set(second.edit.provenance["requests"]) == {"one", "two"}
    with pytest.raises(ValueError, match="has a request 'one' already"):
        method.fit(model, *texts, after=first.edit, request="one", **FIT)


@pytest.mark.parametrize("method", [MRP(layers=[1, 2], rank=3, **QUICK), DirectionAblation(layers=[1, 2])])
def test_a_later_request_joins_with_an_earlier_one_behind_gates(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    earlier = conditional(1, 2, request="one")
    edit = method.fit(model, *texts, after=earlier, request="two", **FIT).edit
    assert isinstance(edit, ConditionalProjectionEdit)
    assert edit.without("two") == earlier
    assert set(edit.gates("two")) == (set(edit.hook_names) if isinstance(method, MRP) else set())
    for name in edit.hook_names:
        one, two = edit.subspaces("one")[name], edit.subspaces("two")[name]
        assert float((one.basis @ two.basis.T).abs().max()) < 1e-5


def test_a_random_control_has_the_ranks_and_hooks_of_its_projection() -> None:
    fitted = projection(1, 2, rank=3) + projection(2, rank=2, seed=9, request="later")
    assert isinstance(fitted, ProjectionEdit)
    control = fitted.random_like(seed=4)
    ranks = {hook: subspace.rank for hook, subspace in fitted.subspaces().items()}
    assert {hook: subspace.rank for hook, subspace in control.subspaces().items()} == ranks
    assert control.requests == ("random",)
    for hook, subspace in control.subspaces().items():
        assert not torch.allclose(subspace.projector(), fitted.subspaces()[hook].projector(), atol=1e-3)
        assert torch.equal(subspace.basis, fitted.random_like(seed=4).subspaces()[hook].basis)
