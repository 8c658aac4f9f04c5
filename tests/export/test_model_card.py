"""The model card: what it states of the edit, how it says to load it, and that Hugging Face can read it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from mrp_lens.edits import Edit, SteeringEdit, WeightEdit
from tests.support.edits import projection
from tests.support.export_cards import FORMS, card_of, corpora, section, tables


def test_hugging_face_reads_the_front_matter(fits: dict[str, Edit]) -> None:
    base = {"license": "apache-2.0", "language": ["en", "no"], "datasets": ["org/data"], "tags": ["theirs"], "x": 1}
    data = ModelCard(card_of(fits["stack"], base_front_matter=base)).data.to_dict()
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "language": ["en", "no"],
        "datasets": ["org/data"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "mrp_lens", "mrp", "rmu"],
    }
    adapter = ModelCard(card_of(fits["mrp"], "adapter")).data.to_dict()
    assert adapter["base_model_relation"] == "adapter"
    assert adapter["library_name"] == "mrp_lens"
    assert not adapter.keys() & {"license", "language", "datasets"}


@pytest.mark.parametrize("base", ["demo", "/home/author/models/org-base", "C:\\models\\org-base", "./org-base"])
def test_a_base_model_that_is_not_on_the_hub_is_not_linked(fits: dict[str, Edit], base: str) -> None:
    card = card_of(fits["mrp"], base=base)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "demo" in card or "org-base" in card
    assert "author" not in card
    assert "C:" not in card


def test_a_local_folder_whose_path_looks_like_a_hub_name_is_not_linked(
    fits: dict[str, Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in ModelCard(card_of(fits["mrp"])).data.to_dict()


def test_gpt2_is_linked_by_its_whole_name(fits: dict[str, Edit]) -> None:
    assert ModelCard(card_of(fits["mrp"], base="gpt2")).data.to_dict()["base_model"] == "openai-community/gpt2"


def test_the_card_says_what_was_done_to_which_model_with_which_data(fits: dict[str, Edit]) -> None:
    card = card_of(fits["both"])
    edit = section(card, "The edit")
    assert "4 layers, width 32" in edit
    places, *rest = tables(edit)
    assert places[1:] == [
        ["blocks.1.hook_resid_post", "a subspace of rank 2 removed", "bandits\\|quince"],
        ["blocks.2.hook_resid_post", "a subspace of rank 3 removed", "bandits\\|quince, lakes"],
    ]
    settings, data, later_settings, later_data = ({row[0]: row[1:] for row in table[1:]} for table in rest)
    forget, retain = corpora()
    assert settings["layers"] == ["1, 2"]
    assert settings["rank"] == ["2"]
    assert later_settings["rank"] == ["1"]
    assert data["forget"] == ["bandits\\|quince", "8", forget.fingerprint]
    assert data["retain"] == ["walks", "8", retain.fingerprint]
    assert later_data["forget"][0] == "lakes"


def test_matrices_and_steering_are_named_by_place(fits: dict[str, Edit]) -> None:
    rmu = fits["rmu"]
    assert isinstance(rmu, WeightEdit)
    rows = tables(section(card_of(rmu, "folded"), "The edit"))[0][1:]
    assert [row[0] for row in rows] == list(rmu.tensors)
    steering = SteeringEdit.towards(torch.ones(8), layer=3, coefficient=2.5, mode="add")
    assert tables(section(card_of(steering), "The edit"))[0][1] == [
        "blocks.3.hook_resid_post",
        "states moved by 2.5 times a fixed unit vector",
        "",
    ]


def test_an_edit_without_record_is_said_to_be_built_by_hand(fits: dict[str, Edit]) -> None:
    card = card_of(projection(1, request="mine"), "folded")
    assert "built by hand" in card
    assert "request mine came about is not recorded" in card
    assert ModelCard(card).data.to_dict()["tags"] == ["unlearning", "mrp_lens"]
    joined = card_of(fits["mrp"] + projection(3, request="mine"))
    assert "request mine came about is not recorded" in joined
    assert "learned by mrp" in joined
    assert "not recorded" not in card_of(fits["mrp"])


def test_a_fit_that_was_ended_early_says_so(fits: dict[str, Edit]) -> None:
    edit = projection(1)
    edit.provenance = {"requests": {"edit": {"method": "mrp", "settings": {"steps": 150}, "steps_done": 80, "seed": 1}}}
    assert "Seed 1, 80 updates: ended early, before the 150" in card_of(edit)
    assert "ended early" not in card_of(fits["mrp"])


def test_each_form_is_loaded_in_its_own_way(fits: dict[str, Edit]) -> None:
    folded, module, adapter = (section(card_of(fits["mrp"], form, repo_id="me/out"), "How to load") for form in FORMS)
    assert 'from_pretrained("me/out")' in folded
    assert "trust_remote_code" not in folded
    assert 'from_pretrained("me/out", trust_remote_code=True)' in module
    assert "fails, by design" in module
    assert 'from_pretrained("org/base")' in adapter
    assert 'mrp_lens.hf.attach(model, "me/out")' in adapter
    local = section(card_of(fits["mrp"], "adapter"), "How to load")
    assert 'mrp_lens.hf.attach(model, "path/to/this/folder")' in local
    for text in (folded, module, adapter, local):
        compile(text.split("```")[1].removeprefix("python\n"), "card", "exec")


def test_checks_are_listed_as_given(fits: dict[str, Edit]) -> None:
    checked = section(card_of(fits["mrp"], checks=["off by 1.2e-06 at most", "50 tokens alike"]), "How it was checked")
    assert checked.strip().split("\n") == ["- off by 1.2e-06 at most", "- 50 tokens alike"]


def test_names_cannot_break_out_of_their_table() -> None:
    request = "a | b\n\n# <script>heading"
    card = card_of(projection(1, request=request))
    assert tables(section(card, "The edit"))[0][1][2] == "a \\| b # &lt;script>heading"
    assert "\n# <script>" not in card


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown form 'zip'; choose one of folded, module, adapter"):
        card_of(projection(1), "zip")
    with pytest.raises(ValueError, match="base is empty"):
        card_of(projection(1), base="")


def test_each_form_says_what_it_does_not_protect_against(fits: dict[str, Edit]) -> None:
    folded, module, adapter = (
        section(card_of(fits["mrp"], form), "What it does not protect against") for form in FORMS
    )
    assert "ordinary checkpoint, and it can be retrained" in folded
    assert "has\n  the unedited model back" in module
    assert "without\n  `attach`" in adapter
    assert "the model without them back" in section(card_of(fits["stack"]), "What it does not protect against")


def test_the_code_that_loads_a_folded_model_runs(fits: dict[str, Edit], tiny_folder: Path) -> None:
    code = section(card_of(fits["mrp"], "folded"), "How to load").split("```")[1].removeprefix("python\n")
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tiny_folder)), found)
    assert found["model"].config.num_hidden_layers == 4
    assert found["tokenizer"]("x")["input_ids"]
