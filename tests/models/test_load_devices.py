"""Models whose layers are spread by a device map: the same model, the same edits, each layer's rows on its own device."""

from functools import partial
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import ConditionalProjectionEdit, Edit, Gate, ProjectionEdit, SteeringEdit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import MRP, RMU, GradientDifference
from mrp_lens.methods.mrp.gates import LearnedGate
from mrp_lens.methods.mrp.learned import LearnedRows
from mrp_lens.models import device_at, device_of, devices_of, load_model
from mrp_lens.models.devices import Spread
from tests.support.edits import logits
from tests.support.families import DEPTH, WIDTH

HOOK = "blocks.2.hook_resid_post"
EACH = [
    "model.embed_tokens",
    *(f"model.layers.{n}" for n in range(DEPTH)),
    "model.norm",
    "model.rotary_emb",
    "lm_head",
]
LAYERWISE = dict.fromkeys(EACH, "cpu")
MAPS = {"whole": {"": "cpu"}, "layerwise": LAYERWISE, "named": "auto"}
FITTERS: dict[str, Any] = {
    "mrp": MRP(layers=[1, 2], rank=2, steps=3, batch_size=4),
    "rmu": RMU(layer=2, steps=3, batch_size=4),
    "gradient-difference": GradientDifference(layers=[1, 2], steps=3, batch_size=4),
}


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Any:
    return load_model(tiny_folder, backend="bridge")


@pytest.fixture(scope="module")
def moving(tiny_folder: Path) -> Any:
    """The model with accelerate's hooks, which move what enters each layer to its device; on a CPU they are left out
    otherwise."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "dispatch_model", partial(accelerate.dispatch_model, force_hooks=True))
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        loaded = load_model(hf_model, tokenizer=tokenizer, device_map=LAYERWISE)
    assert any(hasattr(module, "_hf_hook") for module in loaded.original_model.modules())  # type: ignore[attr-defined]
    return loaded


@pytest.mark.parametrize("name", MAPS)
def test_a_map_gives_the_same_model(name: str, plain: Any, tiny_folder: Path) -> None:
    if name == "named" and torch.cuda.is_available():
        pytest.skip("where there is a GPU, 'auto' puts the model there")
    spread: Any = load_model(tiny_folder, device_map=MAPS[name])
    assert spread.cfg.device == "cpu"
    assert devices_of(spread) == {device_of(spread)} == {device_at(spread, 3)} == {torch.device("cpu")}
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(logits(spread, tokens), logits(plain, tokens))


@pytest.mark.parametrize("name", FITTERS)
def test_fits_on_a_model_with_hooks_that_move_states_are_the_same(
    name: str, plain: Any, moving: Any, texts: tuple[Corpus, Corpus]
) -> None:
    fits = [FITTERS[name].fit(model, *texts, progress=False) for model in (plain, moving)]
    assert fingerprint(fits[0].edit) == fingerprint(fits[1].edit)
    tokens = torch.arange(3, 12)[None]
    with fits[0].edit.applied(plain), fits[1].edit.applied(moving):
        assert torch.equal(logits(plain, tokens), logits(moving, tokens))


def hand_made() -> dict[str, Edit]:
    rows = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(0))).Q.T
    gate = Gate(rows[0].clone(), 0.1, 8.0)
    return {
        "projection": ProjectionEdit({HOOK: Subspace(rows)}, request="a"),
        "conditional": ConditionalProjectionEdit({HOOK: Subspace(rows)}, {HOOK: gate}, request="a"),
        "steering": SteeringEdit(HOOK, rows[0].clone(), 4.0, mode="add"),
    }


@pytest.mark.parametrize("name", ["projection", "conditional", "steering"])
def test_what_an_edit_does_is_done_where_the_states_are(name: str, plain: Any) -> None:
    """The device "meta" stands for a second GPU: torch refuses to compute with tensors on it and others on the CPU."""
    states = torch.zeros(2, 3, WIDTH, device="meta")
    with hand_made()[name].applied(plain):
        point = plain.hook_dict[HOOK]
        changed = point.fwd_hooks[-1].user_hook(states, hook=point)
    assert changed.device.type == "meta"
    assert changed.shape == states.shape


def test_rows_and_gates_under_training_follow_the_states() -> None:
    rows = torch.randn(2, WIDTH, requires_grad=True)
    gate = LearnedGate(torch.randn(1, WIDTH, requires_grad=True), torch.zeros(1, requires_grad=True), torch.ones(1))
    ((_, hook),) = LearnedRows({HOOK: rows}, {}, {}, {HOOK: gate}).hooks()
    changed = hook(torch.zeros(2, 3, WIDTH, device="meta"), None)
    assert changed is not None
    assert changed.device.type == "meta"
    assert changed.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto", "backend": "hooked"}, "HookedTransformer has all of its layers on one device"),
        ({"device_map": "auto", "device": "cpu"}, "two answers to one question"),
        ({"device_map": "everywhere"}, "unknown device_map 'everywhere'; give one of auto, balanced"),
        ({"device_map": {}}, "a name or a dict of modules"),
        ({"device_map": {"": "disk"}}, "has no weights to edit"),
        ({"device_map": {"": "nowhere"}}, "unknown device 'nowhere'"),
        ({"device_map": {"": 99}}, "there is no device 'cuda:99' here"),
        ({"max_memory": {0: "1GiB"}}, "give device_map='auto' too"),
        ({"device_map": {"": "cpu"}, "max_memory": {0: "1GiB"}}, "is for a map by name"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(options: dict[str, Any], message: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tiny_folder, **options)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model.embed_tokens": "cpu"}, r"device_map leaves out model\.layers\.0\..*: this model has model, lm_head"),
        ({"": "cpu", "transformer.h.0": "cpu"}, r"device_map names 'transformer\.h\.0', which it has not"),
    ],
)
def test_a_map_of_other_modules_is_refused(device_map: dict[str, str], message: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tiny_folder, device_map=device_map)


def test_processes_of_one_fit_have_whole_models(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="each of the 2 processes"):
        load_model(tiny_folder, device_map="auto")


def test_a_model_of_which_a_part_was_offloaded_is_refused(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    spread = Spread.checked("auto", None, device=None, backend="bridge")
    assert spread is not None
    spread.check(hf_model)
    hf_model.model.layers[3].mlp.to("meta")
    with pytest.raises(ValueError, match=r"the model does not fit: .* more were offloaded"):
        spread.check(hf_model)
