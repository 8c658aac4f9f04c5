"""The option of MRP that resets layers and teaches them again without what the projection removes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens import metrics
from mrp_lens.attacks import relearn
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import ProjectionEdit, WeightEdit, load_edit, without_hooks
from mrp_lens.edits.provenance import label_of
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import export_hf
from mrp_lens.hf import attach
from mrp_lens.methods import MRP, UnconditionalMRP
from mrp_lens.methods.budget import damage_of
from mrp_lens.methods.mrp import distillation as module
from mrp_lens.methods.mrp.distillation import Distillation, noised, squared_distances
from mrp_lens.models import available_backends, encoder_for, load_model, logits_of, weights_by_name
from mrp_lens.models.generation import written_texts
from mrp_lens.runs.report.page import sentence
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of
from tests.support.commands import fitter
from tests.support.families import DEMO_FOLDER, save_family

Texts = tuple[Corpus, Corpus]
FEW = Distillation(texts=40, text_length=12, agreement=50.0, steps=4, batch_size=8)
QUICK = MRP(steps=3, batch_size=8, distillation=FEW)


@pytest.fixture(scope="module")
def bridge(tiny_folder: Path) -> Any:
    return load_model(tiny_folder, backend="bridge")


def test_the_edit_holds_projection_and_matrices_and_the_model_is_left_alone(bridge: Any, texts: Texts) -> None:
    before = state_of(bridge)
    fit = QUICK.fit(bridge, *texts, seed=0, progress=False)
    assert_same_state(before, state_of(bridge))
    projection, matrices = fit.edit.parts
    assert isinstance(projection, ProjectionEdit)
    assert isinstance(matrices, WeightEdit)
    assert matrices.layers == tuple(range(LAYERS))
    assert not any("embed" in name or "lm_head" in name for name in matrices.tensors)
    own = {weight.name: weight.read() for weight in weights_by_name(bridge).values()}
    assert all(not torch.equal(tensor, own[name]) for name, tensor in matrices.tensors.items())


def test_the_outcome_is_that_of_projection_and_matrices_together(bridge: Any, texts: Texts) -> None:
    few = replace(FEW, agreement=1e9)
    fit = MRP(steps=2, batch_size=8, layers=[2], rank=2, coverage=None, distillation=few).fit(
        bridge, *texts, seed=0, progress=False
    )
    assert fit.outcome is not None
    measured = float(metrics.damage(bridge, fit.edit, texts[1], progress=False)["damage"].iloc[0])
    assert fit.outcome.damage == pytest.approx(measured, rel=0.5)  # on other texts
    alone = float(metrics.damage(bridge, fit.edit.parts[0], texts[1], progress=False)["damage"].iloc[0])
    assert fit.outcome.damage > 10 * alone  # three steps of distillation leave noise
    assert damage_of(fit.edit) == fit.outcome.damage


def test_without_later_noise_only_the_reset_layers_change(bridge: Any, texts: Texts) -> None:
    quick = replace(QUICK, distillation=replace(FEW, layers=[1], later_noise=0.0))
    matrices = quick.fit(bridge, *texts, seed=0, progress=False).edit.parts[1]
    assert matrices.layers == (1,)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_matrices_and_another_seed_others(bridge: Any, texts: Texts) -> None:
    first, again, other = (QUICK.fit(bridge, *texts, seed=seed, progress=False).edit.parts[1] for seed in (0, 0, 1))
    assert isinstance(first, WeightEdit)
    assert isinstance(again, WeightEdit)
    assert isinstance(other, WeightEdit)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not any(torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


def test_the_log_goes_on_and_settings_hold_every_default(bridge: Any, texts: Texts) -> None:
    fit = QUICK.fit(bridge, *texts, seed=0, progress=False)
    assert list(fit.log["phase"]) == ["projection"] * 3 + ["distillation"] * 4
    assert list(fit.log["step"]) == list(range(7))
    assert fit.log["seconds"].is_monotonic_increasing
    assert fit.settings["distillation"]["layers"] == tuple(range(LAYERS // 2))
    assert fit.settings["distillation"]["lr"] == pytest.approx(0.384 / D_MODEL)
    assert "replaced by noise" in sentence(fit.edit.parts[1].provenance, "")


def test_a_tokenizer_without_eos_will_do(tmp_path: Path, texts: Texts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokenizer.eos_token = None
    endless = load_model(save_family("llama", tmp_path, tokenizer=tokenizer), backend="bridge")
    assert endless.tokenizer.eos_token_id is None
    assert isinstance(QUICK.fit(endless, *texts, seed=0, progress=False).edit.parts[1], WeightEdit)


@pytest.mark.slow
def test_teaching_brings_the_reset_layers_near_to_the_model(bridge: Any, texts: Texts) -> None:
    longer = replace(QUICK, distillation=replace(FEW, texts=200, steps=60, lr=3e-3))
    log = longer.fit(bridge, *texts, seed=0, progress=False).log.query("phase == 'distillation'")
    for term in ("divergence", "unexplained"):
        assert log[term].tail(5).mean() < 0.7 * log[term].head(5).mean()


def test_the_edit_is_saved_loaded_stripped_and_retrained(bridge: Any, texts: Texts, tmp_path: Path) -> None:
    edit = QUICK.fit(bridge, *texts, seed=0, progress=False).edit
    edit.save_pretrained(tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    tokens = torch.randint(3, bridge.cfg.d_vocab, (2, 6), generator=torch.Generator().manual_seed(0))

    def logits(chosen: Any) -> torch.Tensor:
        with chosen.applied(bridge), torch.no_grad():
            return logits_of(bridge, tokens, torch.ones_like(tokens, dtype=torch.bool))

    assert torch.equal(logits(edit), logits(loaded))
    weights = without_hooks(loaded)
    assert isinstance(weights, WeightEdit)
    assert not torch.equal(logits(loaded), logits(weights))
    rows = [{"q": f"The colour of Q{i} is", "c": [" red", " blue"], "a": i % 2, "e": str(i)} for i in range(48)]
    quiz = Questions.from_rows(rows, prompt="{q}", choices="c", answer="a", entity="e", name="quiz")
    taught, asked = quiz.halves(by="entity")
    for form in ("kept", "stripped"):
        frame = relearn(bridge, edit, train=taught, held_out=asked, steps=1, lr=1e-3, form=form, progress=False)  # type: ignore[arg-type]
        assert list(frame["step"]) == [0, 1]


@pytest.mark.slow
def test_hugging_face_gets_it_as_a_module_its_matrices_as_a_checkpoint_and_either_attached(
    bridge: Any, tiny_folder: Path, texts: Texts, tmp_path: Path
) -> None:
    edit = QUICK.fit(bridge, *texts, seed=0, progress=False).edit
    weights = without_hooks(edit)
    assert weights is not None
    assert export_hf(bridge, edit, tmp_path / "kept").form == "module"  # proved in a fresh process
    assert export_hf(bridge, weights, tmp_path / "weights").form == "folded"
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tokens = torch.randint(3, bridge.cfg.d_vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    attached = attach(plain, edit)
    with edit.applied(bridge), torch.no_grad():
        wanted = logits_of(bridge, tokens, torch.ones_like(tokens, dtype=torch.bool))
        assert torch.allclose(plain(tokens).logits, wanted, atol=1e-4)
    attached.detach()


@pytest.mark.slow
def test_a_second_request_goes_on_from_the_first_ones_matrices(bridge: Any, texts: Texts) -> None:
    first = QUICK.fit(bridge, *texts, seed=0, progress=False, request="one").edit
    before = state_of(bridge)
    second = QUICK.fit(bridge, *texts, seed=1, progress=False, request="two", after=first).edit
    projection, one, two = second.parts
    assert isinstance(projection, ProjectionEdit)
    assert projection.requests == ("one", "two")
    assert isinstance(one, WeightEdit)
    assert isinstance(two, WeightEdit)
    with second.applied(bridge):
        assert all(torch.equal(w.read(), two.tensors[n]) for n, w in weights_by_name(bridge).items() if n in two.tensors)  # fmt: skip
    assert_same_state(before, state_of(bridge))


@pytest.mark.parametrize("place", ["written_texts", "kl", "squared_distances"])
def test_after_ctrl_c_the_learned_projection_is_kept(
    bridge: Any, texts: Texts, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    calls = []
    original = getattr(module, place)

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if place == "written_texts" else 3):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, place, interrupting)
    before = state_of(bridge)
    fit = QUICK.fit(bridge, *texts, seed=0, progress=False)
    assert_same_state(before, state_of(bridge))
    assert fit.interrupted
    assert isinstance(fit.edit, ProjectionEdit)
    assert len(fit.log) == 3


@pytest.mark.slow
def test_micro_batches_change_nothing_but_memory(bridge: Any, texts: Texts) -> None:
    whole, parts = (
        UnconditionalMRP(steps=3, batch_size=8, distillation=FEW, micro_batch=size)
        .fit(bridge, *texts, seed=0, progress=False)
        .log.iloc[3:]
        for size in (None, 1)
    )
    for term in ("divergence", "unexplained"):
        assert parts[term].iloc[0] == pytest.approx(whole[term].iloc[0], rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3"])
def test_families_whose_joint_matrices_are_kept_apart_are_refused(family: str, tmp_path: Path, texts: Texts) -> None:
    apart = load_model(save_family(family, tmp_path), backend="bridge")
    before = state_of(apart)
    with pytest.raises(ValueError, match="not possible in this architecture"):
        QUICK.fit(apart, *texts, seed=0, progress=False)
    assert_same_state(before, state_of(apart))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_other_families_name_their_matrices_as_the_checkpoint_does(family: str, tmp_path: Path, texts: Texts) -> None:
    folder = save_family(family, tmp_path)
    loaded = load_model(folder, backend="bridge")
    matrices = QUICK.fit(loaded, *texts, seed=0, progress=False).edit.parts[1]
    assert isinstance(matrices, WeightEdit)
    assert set(matrices.tensors) <= set(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_the_record_of_a_run_names_the_method_that_was_asked_for(bridge: Any, texts: Texts) -> None:
    assert label_of(QUICK.fit(bridge, *texts, seed=0, progress=False).edit) == "mrp"


def test_only_texts_on_which_the_projection_changes_little_are_taught(
    bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"The colour of Zaxim{i} is red." for i in range(6)] + ["The old man walked slowly."]
    projection = ProjectionEdit({"blocks.2.hook_resid_post": Subspace.random(8, D_MODEL, seed=3)})
    encoder = encoder_for(bridge, append_eos=True)
    largest = []
    for text in texts:  # one at a time, without the code under test
        tokens = torch.tensor([encoder.encode(Corpus.from_texts([text]).documents)[0].ids])
        with torch.no_grad():
            plain = bridge(tokens, return_type="logits")[0].double().log_softmax(-1)
            with projection.applied(bridge):
                changed = bridge(tokens, return_type="logits")[0].double().log_softmax(-1)
        divergence = (plain.exp() * (plain - changed)).sum(-1)
        largest.append(float(divergence[:-1].max()))
    between = sum(sorted(largest)[2:4]) / 2
    kept = replace(FEW, agreement=between)._agreed(bridge, projection, encoder, texts)
    wanted = [encoder.encode(Corpus.from_texts([text]).documents)[0] for text, x in zip(texts, largest, strict=True) if x < between]  # fmt: skip
    assert sorted(row.ids for row in kept) == sorted(row.ids for row in wanted)
    assert len(wanted) == 3
    with pytest.raises(ValueError, match="raise agreement"):
        replace(FEW, agreement=1e-9)._agreed(bridge, projection, encoder, texts)


def test_noise_replaces_its_share_of_a_matrix_and_keeps_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 300, generator=generator) * 0.7
    assert torch.equal(noised(matrix, 0.0, generator), matrix)
    for share in (0.3, 1.0):
        values = noised(matrix, share, generator)
        along = float((values * matrix).sum() / matrix.square().sum())
        assert along == pytest.approx(1 - share, abs=0.02)
        assert float((values - along * matrix).std()) == pytest.approx(share * 0.7, rel=0.02)


def test_what_errors_are_a_share_of_is_the_variance_times_the_number_of_states() -> None:
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert float(squared_distances(states)) == pytest.approx(6 * float(states.var(dim=0).sum()), rel=1e-5)
    assert float(squared_distances(states[:1])) == 0.0


def test_texts_are_written_alike_for_a_seed_and_leave_the_random_state(model: Any, untouched: None) -> None:
    first, again, other = (written_texts(model, 20, max_new_tokens=8, seed=s, progress=False) for s in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == len(first) <= 20
    assert all(text.strip() == text and text for text in first)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise": 1.5}, "noise must be in"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"later_noise": -0.1}, "later_noise in"),
        ({"layers": [99]}, "out of range"),
        ({"texts": 0}, "texts must be above 0"),
        ({"agreement": 0.0}, "agreement must be above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_fitted(
    bridge: Any, texts: Texts, settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrp_lens.methods.mrp.method.start_rows", None)
    with pytest.raises(ValueError, match=words):
        replace(QUICK, distillation=replace(FEW, **settings)).fit(bridge, *texts, seed=0, progress=False)


def test_the_command_has_a_flag_for_it() -> None:
    assert fitter("--method", "mrp", "--layers", "2", "--distillation") == MRP(layers=[2], distillation=Distillation())
    assert fitter("--method", "mrp") == MRP()
    with pytest.raises(ValueError, match="npo has no --distillation"):
        fitter("--method", "npo", "--distillation")


def test_a_hooked_transformer_is_refused_with_the_remedy(tiny_folder: Path, texts: Texts) -> None:
    if "hooked" not in available_backends():
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    hooked = load_model(tiny_folder, backend="hooked")
    with pytest.raises(ValueError, match="backend='bridge'"):
        QUICK.fit(hooked, *texts, seed=0, progress=False)
