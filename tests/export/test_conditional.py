"""A projection behind gates leaves as a module or an adapter, which compute what a hook by hand on plain transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mrp_lens.edits import ConditionalProjectionEdit, Edit
from mrp_lens.edits.exported_hooks import HASH, hash_of
from mrp_lens.export import export_hf
from mrp_lens.export.model_card import model_card
from mrp_lens.hf import attach
from mrp_lens.models import load_model
from mrp_lens.models.hooks import hook_name
from tests.support.edits import behind_several, beside, conditional, directions_of, projection, weight_edit
from tests.support.export_edits import LLAMA, PLACES, TOKENS, assert_exact, exported, hooked, log_probabilities, write
from tests.support.families import NO_HOOKED, families_mostly_slow, save_family


def two_requests(*layers: int) -> ConditionalProjectionEdit:
    first = conditional(*layers, request="a", threshold=0.05, sharpness=9.0)
    edit = first + beside(first, request="b", hard=True) + projection(0, request="plain")
    assert isinstance(edit, ConditionalProjectionEdit)
    return edit


def with_several_directions(*layers: int) -> ConditionalProjectionEdit:
    """Beside a request whose gates have one, so that each finds its own rows among the values of both."""
    first = behind_several(*layers, request="a")
    edit = first + beside(first, request="b", hard=True) + behind_several(0, request="c", directions=1)
    assert isinstance(edit, ConditionalProjectionEdit)
    return edit


EDITS = {"one": two_requests, "several": with_several_directions}


def put_on_by_hand(hf_model: Any, family: str, edit: Edit) -> None:
    """At resid_post, and that alone; in float64."""
    assert isinstance(edit, ConditionalProjectionEdit)
    layers: Any = hf_model.get_submodule(PLACES.get(family, LLAMA)[0])

    def gated(hook: str) -> Any:
        def change(h: Tensor) -> Tensor:
            wide = h.double()
            left = wide.clone()
            for request in edit.requests:
                subspace, gate = edit.subspaces(request).get(hook), edit.gates(request).get(hook)
                if subspace is None:
                    continue
                q, share = subspace.basis.double(), torch.ones_like(wide[..., :1])
                if gate is not None:
                    norm, opened = wide.square().sum(-1, keepdim=True).sqrt(), []
                    for w, threshold, sharpness in directions_of(gate):
                        cosine = (wide * w).sum(-1, keepdim=True) / norm
                        soft = 1.0 / (1.0 + (-sharpness * (cosine - threshold)).exp())
                        opened.append((cosine > threshold).double() if gate.hard else soft)
                    share = torch.stack(opened).amax(dim=0)
                left = left - share * ((wide @ q.T) @ q)
            return left.to(h.dtype)

        return lambda m, a, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    for layer in range(len(layers)):
        if hook_name(layer) in edit.hook_names:
            layers[layer].register_forward_hook(gated(hook_name(layer)))


@pytest.fixture(scope="module", params=families_mostly_slow())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(family, tmp_path_factory.mktemp("base") / family)


@pytest.fixture(scope="module")
def lens(family: str, folder: Path, backend: str) -> Any:
    if backend == "hooked" and family in NO_HOOKED:
        pytest.skip("HookedTransformer does not load this family from a folder")
    return load_model(folder, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("directions", EDITS)
@pytest.mark.parametrize("form", ["module", "adapter"])
def test_each_form_computes_what_hooks_by_hand_do(
    form: str, directions: str, lens: Any, folder: Path, family: str, tmp_path: Path
) -> None:
    edit = EDITS[directions](1, 3)
    out = write(lens, edit, tmp_path / form, form)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder if form == "adapter" else out, trust_remote_code=form == "module"
    ).eval()
    if form == "adapter":
        attach(loaded, out)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    unedited = log_probabilities(plain)
    put_on_by_hand(plain, family, edit)
    wanted, got = log_probabilities(plain), log_probabilities(loaded)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(hooked(lens, edit), wanted, atol=1e-4, rtol=0)
    assert float((got - unedited).abs().max()) > 1e-2
    ungated = torch.stack([log_probabilities(plain), hooked(lens, conditional(1, 3, threshold=-9.0))])
    assert float((ungated[0] - ungated[1]).abs().max()) > 1e-2  # so gates that are always open would not pass


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_every_site_leaves_as_it_is_hooked(bridge: Any, tiny_folder: Path, tmp_path: Path, site: str) -> None:
    edit = conditional(1, 2, site=site)
    assert_exact(bridge, edit, write(bridge, edit, tmp_path / "module", "module"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    attach(plain, write(bridge, edit, tmp_path / "adapter", "adapter"))
    assert_exact(bridge, edit, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "directions"),
    [
        ("auto", "one"),
        ("adapter", "one"),
        ("auto", "several"),
    ],
)
def test_the_proof_in_a_fresh_process_holds(bridge: Any, tmp_path: Path, form: Any, directions: str) -> None:
    edit = EDITS[directions](1, 2) + weight_edit(bridge, 1)
    report = export_hf(bridge, edit, tmp_path / "out", form, progress=False)
    assert report.form == ("module" if form == "auto" else "adapter")
    assert report.max_logit_diff is not None
    assert report.max_logit_diff <= 1e-4


def test_folded_is_refused_with_the_reason(bridge: Any, tmp_path: Path) -> None:
    for edit in (conditional(1, site="mlp_out"), conditional(1, site="mlp_out") + weight_edit(bridge, 1)):
        with pytest.raises(
            ValueError, match=r"form='folded' is not possible: its gate looks at each state .*form='module'"
        ):
            export_hf(bridge, edit, tmp_path / "out", "folded", progress=False)
        assert not (tmp_path / "out").exists()


def test_a_module_writes_the_same_with_and_without_a_cache(bridge: Any, tmp_path: Path) -> None:
    edit = two_requests(1, 3)
    loaded = exported(write(bridge, edit, tmp_path / "out", "module"))
    loaded.generation_config.eos_token_id = None
    prompts = TOKENS[:, :6]
    texts = [
        loaded.generate(prompts, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    with edit.applied(bridge), torch.no_grad():
        greedy = prompts
        for _ in range(12):
            greedy = torch.cat([greedy, bridge(greedy)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(texts[0], greedy)


def test_its_tensors_stay_in_float32_through_half_precision(bridge: Any, tmp_path: Path) -> None:
    out = write(bridge, conditional(1), tmp_path / "out", "module")
    model: nn.Module = exported(out, dtype=torch.bfloat16)
    kept = {name: values.dtype for name, values in model.named_buffers() if ".edit." in name}
    assert kept == {"model.layers.1.edit.resid_post.0.values": torch.float32}
    assert {values.dtype for values in model.half().parameters()} == {torch.float16}
    assert all(values.dtype == torch.float32 for name, values in model.named_buffers() if ".edit." in name)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 2), ("rank", 0), ("threshold", None), ("sharpness", -1.0), ("hard", 1), ("more", 1.0)]
)
def test_gates_that_no_edit_has_do_not_load(bridge: Any, tmp_path: Path, name: str, value: Any) -> None:
    assert_does_not_load(write(bridge, conditional(1), tmp_path / "out", "module"), name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 0.1),
        ("threshold", [0.1, 0.2]),
        ("threshold", [0.1, 0.2, "0.3"]),
        ("threshold", [0.1, 0.2, float("inf")]),
        ("sharpness", 1.0),
        ("sharpness", [1.0, 0.0, 1.0]),
        ("sharpness", [1.0, 1.0]),
        ("sharpness", []),
    ],
)
def test_numbers_of_several_directions_that_no_edit_has_do_not_load(
    bridge: Any, tmp_path: Path, name: str, value: Any
) -> None:
    assert_does_not_load(write(bridge, behind_several(1), tmp_path / "out", "module"), name, value)


def test_a_gate_without_a_direction_does_not_load(bridge: Any, tmp_path: Path) -> None:
    out = write(bridge, behind_several(1), tmp_path / "out", "module")
    assert_does_not_load(out, "threshold", [], sharpness=[])


def assert_does_not_load(out: Path, name: str, value: Any, **more: Any) -> None:
    """Refused for its hash, and with a right one for what it says."""
    config = json.loads((out / "config.json").read_text("utf-8"))
    own = config["mrp_lens"]
    step = own["changes"][0]["steps"][0]
    entry = step["gates"][0]
    (entry if name == "rank" else entry["gate"])[name] = value
    if more:
        entry["gate"] |= more
        step["shape"][0] = entry["rank"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="hash does not match"):
        exported(out)
    own[HASH] = hash_of({key: value for key, value in own.items() if key != HASH})
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="none of an edit on"):
        exported(out)


def test_a_second_projection_beside_it_is_refused_on_a_plain_model(tiny_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with attach(plain, conditional(1)), pytest.raises(ValueError, match="another projection is on"):
        attach(plain, projection(1))
    with attach(plain, projection(1)), pytest.raises(ValueError, match="another projection is on"):
        attach(plain, conditional(1, seed=4))


def test_the_card_says_of_which_states_it_takes_what() -> None:
    card = model_card(two_requests(1), base="org/base", form="module")
    line = "| blocks.{}.hook_resid_post | a subspace of rank {} removed{} | {} |"
    above = " from states whose cosine with a fixed unit vector is above "
    assert line.format(0, 3, "", "plain") in card
    assert line.format(1, 3, f"{above}0.05, gradually (sharpness 9)", "a") in card
    assert line.format(1, 2, f"{above}0", "b") in card
    several = model_card(with_several_directions(1), base="org/base", form="module")
    fixed = " from states in the direction of one of 3 fixed unit vectors, gradually"
    assert line.format(1, 3, fixed, "a") in several
