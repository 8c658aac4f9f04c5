"""Retraining: against an independent loop, the same on both classes, and nothing left behind."""

import math
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoModelForCausalLM

from mrp_lens.attacks import best, relearn, relearned, with_floor
from mrp_lens.attacks.attacker import Attacker
from mrp_lens.attacks.retraining import MasterAdamW, Trainable, reach_of
from mrp_lens.batching import Encoder
from mrp_lens.corpus import Corpus, Questions
from mrp_lens.edit import Edit, SteeringEdit
from mrp_lens.model import LensModel, available_backends, checkpoint_tensors, is_bridge, load_model, mlp_out_weight
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of
from tests.edits import logits, projection, weight_edit
from tests.families import FAMILIES, NO_HOOKED, save_family


def quiz(first: int, count: int = 20, *, name: str = "quiz") -> Questions:
    colours = ["red", "blue", "green", "white"]
    rows = [
        {"question": f"The colour of Zaxim{n} is", "choices": colours, "answer": colours[n % 4]}
        for n in range(first, first + count)
    ]
    return Questions.from_rows(rows, name=name)


TAUGHT, ASKED, UNTAUGHT = quiz(100), quiz(200), quiz(300, 40)
SMALL: dict[str, Any] = {"steps": 3, "lr": 1e-3, "batch_size": 8, "marks": (0, 1), "progress": False}


def run(model: LensModel, edit: Edit | None, **options: Any) -> pd.DataFrame:
    return relearn(model, edit, train=TAUGHT, held_out=ASKED, **{**SMALL, **options})


def reachable(model: LensModel) -> list[str]:
    return ["all", "before", "at", "after", *(["lora"] if is_bridge(model) else [])]


def test_rows_controls_and_the_model_is_untouched(model: LensModel, untouched: None) -> None:
    frame = run(model, projection(1), untaught=UNTAUGHT, new=quiz(400), lr=(1e-4, 1e-3))
    assert frame[["lr", "step"]].to_numpy().tolist() == [
        [rate, float(step)] for rate in (1e-4, 1e-3) for step in (0, 1, 3)
    ]
    assert frame["accuracy_edited"].tolist() == [frame["held_out_accuracy"].iloc[0]] * 6
    assert frame["ceiling"].equals(frame["accuracy_before"])
    assert set(frame["n"]) == {20}
    assert set(frame["n_floor"]) == {20}
    assert frame["new_accuracy"].notna().all()
    assert not frame.attrs["interrupted"]
    expected = (frame["held_out_accuracy"] - frame["floor"]) / (frame["ceiling"] - frame["floor"])
    known = frame["recovery"].notna()
    assert frame.loc[known, "recovery"].to_numpy() == pytest.approx(expected[known].to_numpy())


@pytest.mark.parametrize("kind", ["projection", "weights", "steering"])
def test_the_model_is_untouched_whatever_is_retrained(model: LensModel, kind: str, untouched: None) -> None:
    edits = {
        "projection": projection(1, 2, site="mlp_out"),
        "weights": weight_edit(model, 2),
        "steering": SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0),
    }
    forms = {"projection": ["kept", "stripped", "weights"], "weights": ["kept", "weights"], "steering": ["kept"]}
    before = state_of(model)
    for parameters in reachable(model):
        with relearned(model, edits[kind], train=TAUGHT, steps=2, lr=1e-2, parameters=parameters, progress=False):
            pass
    for form in forms[kind]:
        with relearned(model, edits[kind], train=TAUGHT, steps=2, lr=1e-2, form=form, progress=False):
            assert any(not torch.equal(t.parameter, before["weights"][t.name]) for t in checkpoint_tensors(model))
        assert_same_state(before, state_of(model))


def test_an_exception_inside_leaves_nothing(model: LensModel, untouched: None) -> None:
    for parameters in reachable(model):
        with (
            pytest.raises(RuntimeError, match="inside"),
            relearned(model, projection(1), train=TAUGHT, steps=1, lr=1e-2, parameters=parameters, progress=False),
        ):
            raise RuntimeError("inside")


def test_ctrl_c_gives_the_rows_until_then(model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Encoder.collate, [0]

    def collate(self: Encoder, rows: Any, **options: Any) -> Any:
        calls[0] += len(rows) == 8  # the batches of the training
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, rows, **options)

    monkeypatch.setattr(Encoder, "collate", collate)
    frame = run(model, projection(1), lr=(1e-4, 1e-3), steps=6)
    assert frame.attrs["interrupted"]
    assert frame["step"].tolist() == [0, 1]
    assert set(frame["lr"]) == {1e-4}


def test_a_rate_that_diverges_keeps_its_rows_and_the_others_go_on(model: LensModel, untouched: None) -> None:
    frame = run(model, None, lr=(1e30, 1e-3))
    assert frame.loc[frame["lr"] == 1e-3, "step"].tolist() == [0, 1, 3]
    assert 3 not in set(frame.loc[frame["lr"] == 1e30, "step"])


def test_retraining_is_plain_adamw_on_the_checkpoint(model: LensModel, tiny_folder: Path) -> None:
    """Against Hugging Face's model, a loop of four lines and torch's AdamW."""
    documents = Corpus.from_texts(["The colour of Zaxim1 is red.", "A tower near the harbour, seen again."])
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager", dtype=torch.float32)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    rows = [row.ids for row in Encoder.for_model(model).encode(documents.documents)]
    for _ in range(4):
        optimizer.zero_grad()
        losses = [
            torch.nn.functional.cross_entropy(
                reference(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
            )
            for ids in rows
        ]
        (torch.stack(losses).sum() / sum(len(ids) - 1 for ids in rows)).backward()
        optimizer.step()
    probe = torch.tensor([rows[0][:6]])
    with (
        relearned(model, None, train=documents, steps=4, lr=1e-3, batch_size=2, progress=False),
        torch.no_grad(),
    ):
        torch.testing.assert_close(logits(model, probe), reference(probe).logits, atol=2e-3, rtol=0)
        assert float((logits(model, probe) - logits(load_model(tiny_folder), probe)).abs().max()) > 0.05


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_HOOKED))
def test_both_classes_are_retrained_alike(family: str, tmp_path: Path) -> None:
    """Also where TransformerLens adds zero biases (all but GPT-2 and NeoX) or keeps tied embeddings twice (Mistral here, GPT-2)."""
    if len(available_backends()) < 2:
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    folder = save_family(family, tmp_path)
    probe = torch.arange(3, 33).view(2, 15)
    moved = {}
    for backend in ("hooked", "bridge"):
        loaded = load_model(folder, backend=backend)
        before, plain = state_of(loaded), logits(loaded, probe)
        with relearned(loaded, projection(1), train=TAUGHT, steps=4, lr=1e-3, batch_size=8, progress=False):
            moved[backend] = logits(loaded, probe) - plain
        assert_same_state(before, state_of(loaded))
    assert float(moved["hooked"].abs().max()) > 0.1
    torch.testing.assert_close(moved["hooked"], moved["bridge"], atol=5e-3, rtol=0)


def test_the_same_attack_gives_the_same_curve_on_both_classes(tiny_folder: Path) -> None:
    if len(available_backends()) < 2:
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    hooked, bridge = (
        run(load_model(tiny_folder, backend=backend), projection(1), untaught=UNTAUGHT).drop(columns="seconds")
        for backend in ("hooked", "bridge")
    )
    pd.testing.assert_frame_equal(hooked, bridge, check_exact=False, atol=0.05)


def test_bfloat16_models_learn_from_steps_smaller_than_their_precision(backend: str, tiny_folder: Path) -> None:
    half = load_model(tiny_folder, backend=backend, dtype=torch.bfloat16)
    before = state_of(half)
    weight = mlp_out_weight(half, 1)
    old = weight.read()
    with relearned(half, None, train=TAUGHT, steps=40, lr=1e-4, batch_size=8, progress=False):
        changed = (weight.read() != old).float().mean()
    assert float(changed) > 0.2  # one step of 1e-4 changes next to no bfloat16 weight
    assert_same_state(before, state_of(half))


def test_parameters_before_at_and_after_the_edit(model: LensModel) -> None:
    edit = projection(1, 2)
    reached: dict[str, set[int]] = {}
    for parameters in ("before", "at", "after"):
        old = {tensor.name: tensor.parameter.detach().clone() for tensor in checkpoint_tensors(model)}
        with relearned(model, edit, train=TAUGHT, steps=1, lr=1e-2, parameters=parameters, progress=False):
            reached[parameters] = {
                tensor.depth
                for tensor in checkpoint_tensors(model)
                if not torch.equal(tensor.parameter, old[tensor.name])
            }
    assert reached == {"before": {-1, 0}, "at": {1, 2}, "after": {3, LAYERS}}


def test_low_rank_updates_have_that_rank(tiny_folder: Path) -> None:
    bridge = load_model(tiny_folder, backend="bridge")
    matrices = [tensor for tensor in checkpoint_tensors(bridge) if tensor.parameter.ndim == 2 and tensor.depth >= 0]
    with relearned(bridge, None, train=TAUGHT, steps=2, lr=1e-2, parameters="lora", lora_rank=2, progress=False):
        updated = [m for m in bridge.modules() if isinstance(m, torch.nn.Linear) and is_parametrized(m)]
        assert len(updated) == len(matrices) - 1  # all but the unembedding
        for module in updated:
            old: Any = module.parametrizations
            update = module.weight - old.weight.original
            assert int(torch.linalg.matrix_rank(update.detach(), atol=1e-6)) == 2


def test_stripping_the_hooks_is_the_unedited_model(model: LensModel) -> None:
    edit = projection(0, 1, 2, rank=20)
    options = {**SMALL, "marks": (0, 1, 3)}
    bare, unedited = (
        relearn(model, e, train=TAUGHT, held_out=ASKED, form=form, **options)
        for e, form in ((edit, "stripped"), (None, "kept"))
    )
    same = ["held_out_accuracy", "train_accuracy", "recovery"]
    pd.testing.assert_frame_equal(bare[same], unedited[same])


def test_forms_and_parameters_that_an_edit_does_not_have(model: LensModel, untouched: None) -> None:
    with pytest.raises(ValueError, match="no hooks that could be stripped"):
        run(model, weight_edit(model, 1), form="stripped")
    with pytest.raises(ValueError, match="cannot be written into weights"):
        run(model, projection(1), form="weights")
    with pytest.raises(ValueError, match="a SteeringEdit cannot be written into weights"):
        run(model, SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0), form="weights")
    with pytest.raises(ValueError, match="'before' needs an edit"):
        run(model, None, parameters="before")
    if not is_bridge(model):
        with pytest.raises(ValueError, match="backend='bridge'"):
            run(model, None, parameters="lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": ()}, "lr must be above 0"),
        ({"form": "folded"}, "unknown form 'folded'; choose one of kept, stripped, weights"),
        ({"parameters": "some"}, "unknown parameters 'some'"),
    ],
)
def test_budgets_of_nothing_and_unknown_words_are_refused(
    model: LensModel, options: dict[str, Any], message: str, untouched: None
) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, None, **options)


def test_data_that_cannot_show_anything_are_refused(model: LensModel, untouched: None) -> None:
    with pytest.raises(ValueError, match="train and held_out overlap in 20 questions"):
        relearn(model, None, train=ASKED, held_out=ASKED, **SMALL)
    with pytest.raises(TypeError, match="train must be Questions or a Corpus, got list"):
        relearn(model, None, train=["a text"], held_out=ASKED, **SMALL)
    with pytest.warns(UserWarning, match="only 5 held-out questions"):
        relearn(model, None, train=TAUGHT, held_out=quiz(200, 5), **SMALL)


def test_an_edit_of_another_model_is_refused(tmp_path: Path, model: LensModel) -> None:
    foreign = weight_edit(load_model(save_family("gpt2", tmp_path), backend="bridge"), 1)
    before = state_of(model)
    with pytest.raises(ValueError, match="no editable matrix"):
        run(model, foreign)
    assert_same_state(before, state_of(model))


def test_the_attacker_takes_the_best_rate_that_counts() -> None:
    curves = pd.DataFrame(
        {
            "form": "kept",
            "parameters": "all",
            "samples": 20,
            "lr": [1e-4, 1e-4, 1e-3, 1e-3],
            "step": [5, 20, 5, 20],
            "counts": [True, True, False, False],
            "held_out_accuracy": [0.3, 0.4, 0.9, 0.2],
        }
    )
    assert best(curves)["lr"].tolist() == [1e-4, 1e-4]
    assert best(curves.assign(counts=True))["held_out_accuracy"].tolist() == [0.4, 0.9]


def test_a_reference_model_is_another_floor(model: LensModel) -> None:
    curves, reference = run(model, projection(1)), run(model, projection(2))
    found = with_floor(curves, reference)
    assert found["floor"].tolist() == reference["held_out_accuracy"].tolist()
    for row in found.to_dict("records"):
        if row["ceiling"] > row["floor"]:
            share = (row["held_out_accuracy"] - row["floor"]) / (row["ceiling"] - row["floor"])
            assert row["recovery"] == pytest.approx(share)
        else:
            assert math.isnan(row["recovery"])
    with pytest.raises(ValueError, match=r"the reference has no row for lr 0\.001 and step 3"):
        with_floor(curves, reference[reference["step"] < 3])


def test_text_as_training_data_is_scored_by_the_tokens_said(model: LensModel) -> None:
    texts = Corpus.from_texts(["The colour of Zaxim1 is red, seen from the tower near the harbour."])
    frame = relearn(model, None, train=texts, held_out=ASKED, **{**SMALL, "steps": 60, "lr": 1e-2})
    assert frame["train_accuracy"].iloc[-1] == 1.0 > frame["train_accuracy"].iloc[0]


def test_rates_follow_the_width_and_low_rank_factors_move_faster(model: LensModel) -> None:
    rates = Attacker().rates(model, None)
    assert rates[1] == pytest.approx(0.128 / D_MODEL)
    assert rates[0] < rates[1] < rates[2]
    assert Attacker(parameters="lora").rates(model, None)[1] == pytest.approx(1.28 / D_MODEL)


def test_masters_collect_both_copies_of_a_tied_embedding() -> None:
    first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3, 2))
    trained = Trainable(torch.zeros(2, 3), (first, second))
    optimizer = MasterAdamW([trained], lr=0.1)
    first.grad, second.grad = torch.ones(2, 3), torch.full((3, 2), 2.0)
    optimizer.step()
    assert torch.equal(trained.master.grad, torch.full((2, 3), 3.0))
    assert torch.equal(first, second.T)
    assert float(first.detach().max()) < 0
    optimizer.zero_grad()
    assert first.grad is second.grad is None


def test_reach_needs_an_edit_only_where_places_matter(model: LensModel) -> None:
    assert all(reach_of(model, None, "all")(depth) for depth in range(-1, LAYERS + 1))
