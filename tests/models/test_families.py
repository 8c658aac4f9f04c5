"""Every supported family on both classes: loading, fitting, applying, saving, padding, bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.data import Corpus, Question, Questions
from mrp_lens.data.tokenization import Encoder
from mrp_lens.edits import load_edit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import MRP, RMU, AdaptiveRMU
from mrp_lens.metrics import choice_scores
from mrp_lens.models import encoder_for, load_model, logits_at, logits_of, mlp_out_weight, weights_by_name
from mrp_lens.models.kept_states import KeptStates
from mrp_lens.training.losses import predictions
from tests.support.families import DEPTH, NO_HOOKED, families_mostly_slow, save_family
from tests.support.reference import difference, random_tokens

Texts = tuple[Corpus, Corpus]
METHODS: list[Any] = [MRP(steps=3, batch_size=8), RMU(steps=3, batch_size=8), AdaptiveRMU(steps=3, batch_size=8)]


@pytest.fixture(scope="module", params=families_mostly_slow())
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below a path that names another family."""
    return save_family(request.param, tmp_path_factory.mktemp("llama-7b") / request.param)


@pytest.fixture(scope="module")
def loaded(family_folder: Path, backend: str) -> Any:
    if backend == "hooked" and family_folder.name in NO_HOOKED:
        pytest.skip("HookedTransformer does not load this family from a folder")
    return load_model(family_folder, backend=backend)


def test_log_probabilities_are_hugging_faces_and_a_mutated_copy_is_noticed(
    loaded: Any, family_folder: Path, tmp_path: Path
) -> None:
    tokens = random_tokens(loaded.cfg.d_vocab, 20, rows=2)
    assert difference(loaded, family_folder, tokens) <= 1e-4
    hf_model = AutoModelForCausalLM.from_pretrained(family_folder)
    for name, parameter in hf_model.named_parameters():
        if parameter.ndim == 1 and "2" in name:  # one bias or norm weight of layer 2
            with torch.no_grad():
                parameter.add_(0.05)
            break
    else:
        raise AssertionError("no vector in layer 2")
    hf_model.save_pretrained(tmp_path)
    assert difference(loaded, tmp_path, tokens) > 1e-3


@pytest.mark.parametrize("layer", [2, DEPTH])
def test_a_pass_can_begin_at_a_layer(loaded: Any, layer: int) -> None:
    encoder = encoder_for(loaded)
    rows = encoder.encode(Corpus.from_texts(["the old man walked slowly", "a house", "the river near it"]).documents)
    kept = KeptStates(loaded, layer)
    kept.read(encoder, rows, passes=1.0)
    assert len(kept.states) == 3
    batch = encoder.collate([rows[2], rows[0]])
    with torch.no_grad():
        whole = predictions(loaded, batch)
        with kept.entered(batch):
            torch.testing.assert_close(predictions(loaded, batch), whole, rtol=1e-4, atol=1e-4)


def test_logits_at_some_positions_are_those_of_a_whole_pass(loaded: Any) -> None:
    tokens = random_tokens(loaded.cfg.d_vocab, 11, rows=2)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = False
    positions = mask & (torch.arange(11) > 4)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_at(loaded, tokens, mask, positions),
            logits_of(loaded, tokens, mask)[positions],
            atol=1e-5,
            rtol=1e-5,
        )


def test_choices_behind_one_prompt_have_the_scores_that_they_have_alone(loaded: Any) -> None:
    prompt, choices = "the old man walked slowly near the", [" river", " house and garden", " red house"]
    together = choice_scores(loaded, Questions((Question(prompt, tuple(choices), 0),)), progress=False)[0]
    alone = [
        choice_scores(loaded, Questions((Question(prompt, (each,), 0),)), progress=False)[0][0] for each in choices
    ]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_an_edit_is_fitted_applied_saved_and_loaded(method: Any, loaded: Any, texts: Texts, tmp_path: Path) -> None:
    fit = method.fit(loaded, *texts, seed=0, progress=False)
    encoder = encoder_for(loaded)
    rows = encoder.encode(texts[0].documents)
    right, left = encoder.collate(rows), encoder.collate(rows, side="left")
    with torch.no_grad():
        unedited = predictions(loaded, right)
        with fit.edit.applied(loaded):
            edited = predictions(loaded, right)
            torch.testing.assert_close(predictions(loaded, left), edited, atol=1e-4, rtol=0)
            loaded.generate(right.tokens[:2, :4], max_new_tokens=2, do_sample=False, verbose=False)
        assert float((edited - unedited).abs().max()) > 1e-4
        assert torch.equal(predictions(loaded, right), unedited)
        fit.edit.save_pretrained(tmp_path / "edit")
        with load_edit(tmp_path / "edit").applied(loaded):
            assert torch.equal(predictions(loaded, right), edited)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_left_and_right_padding_give_the_same_edit(
    method: Any, loaded: Any, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Encoder.collate
    edits = []
    for side in ("right", "left"):
        monkeypatch.setattr(Encoder, "collate", lambda self, rows, side=side: real(self, rows, side=side))
        edits.append(method.fit(loaded, *texts, seed=0, progress=False).edit.to_parts()[1])
    for name in edits[0]:
        a, b = (Subspace(t[name]).projector() if name.startswith("rows.") else t[name] for t in edits)
        gate = name.startswith("gate.")  # found by L-BFGS, which magnifies differences of rounding
        torch.testing.assert_close(a, b, atol=1e-3 if gate else 2e-4, rtol=2e-3 if gate else 1e-3)


@pytest.mark.slow
def test_bfloat16_keeps_float32_rows_and_masters(loaded: Any, family_folder: Path, backend: str, texts: Texts) -> None:
    half = load_model(family_folder, backend=backend, dtype=torch.bfloat16)
    for method in METHODS:
        fit = method.fit(half, *texts, seed=0, progress=False)
        assert all(tensor.dtype == torch.float32 for tensor in fit.edit.to_parts()[1].values())
        with fit.edit.applied(half):
            pass


def test_editable_weights_are_tensors_of_the_checkpoint(loaded: Any, family_folder: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(family_folder).state_dict()
    weights = weights_by_name(loaded)
    outputs = {mlp_out_weight(loaded, layer).name for layer in range(loaded.cfg.n_layers)}
    assert outputs <= set(weights) & set(state)
    for name in set(weights) & set(state):  # the Bridge keeps joint matrices of some families apart
        assert torch.equal(weights[name].read(), state[name])
