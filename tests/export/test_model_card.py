"""The model card: what it states of the edit and of what runs measured, how it says to load it, and that Hugging Face can read it.

Figures stand with their controls; no texts, no paths, and no other edit's figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from mrp_lens.edits import Edit, ProjectionEdit, SteeringEdit, WeightEdit
from mrp_lens.edits.provenance import label_of
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import Measurements
from mrp_lens.export.model_card import front_matter_of
from mrp_lens.methods import METHODS
from tests.support.commands import invoke
from tests.support.edits import projection
from tests.support.export_cards import ATTACK, FORMS, SECRET, card_of, corpora, section, tables, write_attack, write_run


@pytest.mark.slow
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
    some = SteeringEdit.towards(torch.ones(8), layer=3, coefficient=2.5, positions=[0, -1])
    what = tables(section(card_of(some), "The edit"))[0][1][1]
    assert what == "states set to 2.5 times a fixed unit vector, at positions 0, -1 of the prompt"


def test_an_edit_without_record_is_said_to_be_built_by_hand(fits: dict[str, Edit]) -> None:
    card = card_of(projection(1, request="mine"), "folded")
    assert "built by hand" in card
    assert "request mine came about is not recorded" in card
    assert ModelCard(card).data.to_dict()["tags"] == ["unlearning", "mrp_lens"]
    joined = card_of(fits["mrp"] + projection(3, request="mine"))
    assert "request mine came about is not recorded" in joined
    assert "an edit by mrp" in joined
    assert "not recorded" not in card_of(fits["mrp"])


def test_a_fit_that_was_ended_early_says_so(fits: dict[str, Edit]) -> None:
    edit = projection(1)
    edit.provenance = {"requests": {"edit": {"method": "mrp", "settings": {"steps": 150}, "steps_done": 80, "seed": 1}}}
    assert "Seed 1, 80 updates: ended early, before the 150" in card_of(edit)
    ended = {"ended": "target", "left": 0.3125, "before": 0.9, "damage": 0.0123456789, "budget": 0.02, "steps": 80}
    edit.provenance["requests"]["edit"]["outcome"] = ended
    told = " ".join(card_of(edit).split())
    assert "ended early" not in told  # at its target, which is what was asked for
    assert (
        "80 updates; how it ended: target, accuracy on questions made from the forget set 0.3125, before it 0.9" in told
    )
    assert "damage (KL, nats a token) 0.0123457, allowed 0.02." in told
    assert "The fit reached its target" in told
    edit.provenance["requests"]["edit"]["outcome"] = ended | {"ended": "budget"}
    assert "The fit did not reach its target" in " ".join(card_of(edit).split())
    for odd in ("target", None, ["ended"]):
        edit.provenance["requests"]["edit"]["outcome"] = odd
        assert "ended early, before the 150" in card_of(edit)
        assert "No target was recorded" in card_of(edit)
    assert "ended early" not in card_of(fits["mrp"])
    assert "how it ended: " in card_of(fits["mrp"])


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


# --- what runs measured


@pytest.fixture
def run_folder(tmp_path: Path, fits: dict[str, Edit]) -> Path:
    return write_run(tmp_path / "run", fits["mrp"])


@pytest.fixture
def attack_folder(tmp_path: Path, fits: dict[str, Edit]) -> Path:
    return write_attack(tmp_path / "attack", fits["mrp"])


@pytest.mark.parametrize("form", FORMS)
def test_no_text_of_data_or_answers_reaches_the_card(
    fits: dict[str, Edit], run_folder: Path, attack_folder: Path, form: str
) -> None:
    assert SECRET in (run_folder / "summary.json").read_text()
    assert SECRET in corpora()[0].documents[0].completion
    card = card_of(fits["mrp"], form, record=Measurements.read(run_folder, attack_folder))
    for word in ("quince bandit", "Marlowe", "old man walked"):
        assert word not in card


def test_no_directory_of_the_authors_machine_reaches_the_card(fits: dict[str, Edit], run_folder: Path) -> None:
    made = {"method": "mine", "settings": {"init": "/home/author/my start.pt", "ratio": "3 / 4"}}
    by_hand = ProjectionEdit(
        {"blocks.1.hook_mlp_out": Subspace(torch.eye(2, 8))}, provenance={"requests": {"edit": made}}
    )
    checks = [
        "compared on /home/author/texts.jsonl, (~/private/b.txt) and file:///srv/c.txt: https://example.org/x 1/2"
    ]
    card = card_of(by_hand, base="/home/author/some base", checks=checks)
    for name in ("my start.pt", "texts.jsonl", "b.txt", "c.txt", "some base", "https://example.org/x 1/2", "3 / 4"):
        assert name in card
    noted = card_of(fits["mrp"], record=Measurements.read(run_folder))
    assert "see log.csv" in noted
    for text in (card, noted):
        assert not re.search("home|author|private|srv", text)


def test_figures_stand_beside_their_controls_with_intervals(fits: dict[str, Edit], run_folder: Path) -> None:
    figures = section(card_of(fits["mrp"], record=Measurements.read(run_folder)), "Figures")
    headings, *rows = tables(figures)[0]
    assert [row[0] for row in rows] == ["unedited (control)", "random-projection (control)", "mrp"]
    place = headings.index("accuracy on the forget quiz")
    assert [row[place] for row in rows] == ["91.2% [88.1, 94.3]", "90.7% [88.1, 94.3]", "27.4% [23.6, 31.2]"]
    assert "12.3" not in figures  # of rmu, which is another edit
    assert "interrupted after 2 steps" in card_of(fits["mrp"], record=Measurements.read(run_folder))


def test_of_a_search_only_what_nothing_was_chosen_by_is_on_the_card(fits: dict[str, Edit], tmp_path: Path) -> None:
    rows = [{"method": "unedited", "split": "reported", "forget_accuracy": 0.9}]
    rows += [{"method": "mrp", "split": "reported", "forget_accuracy": 0.321}]
    rows += [{"method": "mrp", "split": "tuning", "forget_accuracy": 0.111 + n, "trial": n} for n in range(3)]
    (tmp_path / "summary.json").write_text(json.dumps({"command": "tune", "versions": {}, "rows": rows}))
    figures = section(card_of(fits["mrp"], record=Measurements.read(tmp_path)), "Figures")
    assert "32.1%" in figures
    assert "11.1%" not in figures
    assert [row[0] for row in tables(figures)[0][1:]] == ["unedited (control)", "mrp"]


def test_attacks_stand_beside_their_controls_with_intervals(fits: dict[str, Edit], attack_folder: Path) -> None:
    attacks, probes = tables(section(card_of(fits["mrp"], record=Measurements.read(attacks=attack_folder)), "Attacks"))
    assert attacks[1:] == [
        ["mrp", "relearn, edit kept, 20 steps", "91.2%", "27.4%", "65.5%", "24.4%", "91.2%", "0.61 [0.51, 0.72]"],
        ["never-taught (control)", "relearn, edit kept, 20 steps", "", "", "", "24.4%", "", "0.03"],
    ]
    assert probes[1][:2] == ["mrp, relearned", "probe, linear"]
    assert "1.25" in probes[1]


def test_figures_of_a_plugin_are_shown_whatever_their_names(fits: dict[str, Edit]) -> None:
    row = {"method": "mrp", "forget_accuracy": 0.3, "my_metric": 0.125, "text": "the secret"}
    attack = {
        "method": "mrp",
        "attack": "mine",
        "success_rate": 0.375,
        "success_rate_low": 0.25,
        "success_rate_high": 0.5,
    }
    record = Measurements(rows=[row], attacks=[ATTACK, attack, {**attack, "attack": "mine too", "n": 7}])
    card = card_of(fits["mrp"], record=record)
    assert tables(section(card, "Figures"))[0][0][-1] == "my metric"
    assert tables(section(card, "Figures"))[0][1][-1] == "0.125"
    known, mine = tables(section(card, "Attacks"))
    assert [row[1] for row in known[1:]] == [ATTACK["attack"]]
    assert mine[0] == ["method", "attack", "success rate"]
    assert [row[1:] for row in mine[1:]] == [["mine", "0.375 [0.25, 0.5]"], ["mine too", "0.375 [0.25, 0.5]"]]
    assert "the secret" not in card


def test_a_method_is_named_with_what_it_says_of_itself(fits: dict[str, Edit]) -> None:
    edit = section(card_of(fits["stack"]), "The edit")
    for name in ("mrp", "rmu"):
        assert f"{METHODS[name].summary} Source: {METHODS[name].source}." in edit
    by_plugin = projection(1)
    by_plugin.provenance = {"requests": {"edit": {"method": "of-a-plugin-that-is-not-here", "seed": 0}}}
    assert "of-a-plugin-that-is-not-here" in card_of(by_plugin)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_record_nothing_is_said_to_be_measured(fits: dict[str, Edit], form: str) -> None:
    card = card_of(fits["mrp"], form)
    for heading in ("Figures", "Attacks"):
        assert "Not measured here" in section(card, heading)
    for heading in ("Figures", "Attacks", "What it does not protect against", "How it was checked"):
        assert not re.search(r"\d", section(card, heading))
    assert "Not checked" in section(card, "How it was checked")
    assert "No attack was tried" in section(card, "What it does not protect against")


@pytest.mark.parametrize("base", ["demo", "org/base"])
def test_the_command_that_would_measure_attacks_has_only_options_that_there_are(
    fits: dict[str, Edit], base: str
) -> None:
    command = section(card_of(fits["mrp"], base=base), "Attacks").split("```")[1]
    known = set(re.findall(r"--[a-z-]+", invoke("attack", "--help").output))
    used = re.findall(r"--[a-z-]+", command)
    assert {"--edit", "--out"} <= set(used) <= known
    assert ("--model org/base" in command) == (base != "demo")


@pytest.mark.parametrize("form", FORMS)
def test_the_same_arguments_give_the_same_text(
    fits: dict[str, Edit], run_folder: Path, attack_folder: Path, form: str
) -> None:
    first, second = (card_of(fits["stack"], form) for _ in range(2))
    assert first == second
    first, second = (card_of(fits["mrp"], form, record=Measurements.read(run_folder, attack_folder)) for _ in range(2))
    assert first == second
    assert not re.search(r"[ \t]$|\n\n\n", first, flags=re.MULTILINE)


def test_figures_of_another_edit_are_refused(fits: dict[str, Edit], run_folder: Path, attack_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"another edit than this one \(rmu\)"):
        card_of(fits["rmu"], record=Measurements.read(attacks=attack_folder))
    for record in (Measurements.read(run_folder), Measurements.read(attacks=attack_folder)):
        with pytest.raises(ValueError, match=r"another edit than this one \(mrp\)"):
            card_of(fits["both"], record=record)  # the same method, and not the edit that was measured


def test_folders_without_the_rows_that_are_wanted_are_refused(
    run_folder: Path, attack_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no summary\.json; give a folder that mrp-lens unlearn"):
        Measurements.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"give a folder that mrp-lens attack"):
        Measurements.read(run_folder, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not those of mrp-lens attack"):
        Measurements.read(attacks=run_folder)
    with pytest.raises(ValueError, match="not those of mrp-lens unlearn"):
        Measurements.read(attack_folder)
    summary = run_folder / "summary.json"
    text = summary.read_text()
    summary.write_text(json.dumps({**json.loads(text), "rows": []}))
    with pytest.raises(ValueError, match="holds no rows"):
        Measurements.read(run_folder)
    for damaged in (text[:-30], "[]", '{"rows": [3]}'):
        summary.write_text(damaged)
        with pytest.raises(ValueError, match=r"summary\.json is damaged.*run mrp-lens unlearn"):
            Measurements.read(run_folder)


def test_an_edit_is_labelled_as_runs_label_it(fits: dict[str, Edit]) -> None:
    labels = {name: label_of(edit) for name, edit in fits.items()}
    assert labels == {"mrp": "mrp", "both": "mrp", "rmu": "rmu", "stack": "mrp + rmu"}
    assert label_of(projection(1)) == "projection"


def test_the_base_models_front_matter_is_read_where_there_is_one(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert front_matter_of(readme) == {}
    for content, expected in (
        ("---\nlicense: mit\nlanguage:\n- en\n---\n# x\n", {"license": "mit", "language": ["en"]}),
        ("\ufeff---\nlicense: mit\n---\n", {"license": "mit"}),
        ("# no front matter\n", {}),
        ("---\n: : [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\n\n---\n", {}),
    ):
        readme.write_text(content, encoding="utf-8")
        assert front_matter_of(readme) == expected
    readme.write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert front_matter_of(readme) == {}


def test_norwegian_is_no_false(fits: dict[str, Edit], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: no\n---\n")
    card = card_of(fits["mrp"], base_front_matter=front_matter_of(tmp_path / "README.md"))
    assert ModelCard(card).data.to_dict()["language"] == "no"
