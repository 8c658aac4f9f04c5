"""What runs measured, on the model card: figures with their controls, no texts, no paths, and no other edit's figures."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from mrp_lens.edits import Edit, ProjectionEdit
from mrp_lens.edits.provenance import label_of
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import Measurements
from mrp_lens.export.model_card import front_matter_of
from mrp_lens.methods import METHODS
from tests.support.commands import invoke
from tests.support.edits import projection
from tests.support.export_cards import (
    ATTACK,
    FORMS,
    SECRET,
    card_of,
    corpora,
    section,
    tables,
    write_attack,
    write_run,
)


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
