"""The chat without any page: both answers, the switches, the question as it is read, and what it refuses."""

from dataclasses import replace

import pytest
import torch

import mrp_lens as ml
from mrp_lens.edits import Edit, SteeringEdit
from mrp_lens.metrics import token_effects
from mrp_lens.models import LensModel
from mrp_lens.models.generation import continued
from mrp_lens.runs.chat import Chat, Switches, hook_to_show, measures_of
from tests.conftest import D_MODEL
from tests.support.edits import conditional, projection, weight_edit

PROMPT = "The colour of Zaxim is"
NEW = 6
OFF, NONE = Switches(on=False), Switches(strength=0.0)


def edit_of(kind: str, model: LensModel) -> Edit:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=20.0, mode="add")
    strong = projection(1, 2, rank=24)
    return {"projection": strong, "weight": weight_edit(model, 1, scale=-9.0), "both": strong + steering}[kind]


def written(model: LensModel, **how: float) -> str:
    return ml.continuations(model, [PROMPT], max_new_tokens=NEW, **how)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["projection", "weight", "both"])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 3}])
def test_answers_are_those_without_and_with_the_edit_applied(
    model: LensModel, kind: str, how: dict[str, float], untouched: None
) -> None:
    edit = edit_of(kind, model)
    chat = Chat(model, edit, max_new_tokens=NEW, **how)  # type: ignore[arg-type]
    before = written(model, **how)
    with edit.applied(model):
        after = written(model, **how)
        (ids,) = continued(model, [PROMPT], max_new_tokens=NEW, **how)  # type: ignore[arg-type]
    assert before != after or how  # of sampling so few tokens may be the same
    answer = chat.ask(PROMPT)
    assert (answer.prompt, answer.before, answer.after) == (PROMPT, before, after)
    assert answer.tokens is not None
    expected = token_effects(model, edit, (*ids.prompt, *ids.ids), prompt=len(ids.prompt))
    assert answer.tokens.equals(expected)
    assert set(answer.tokens["part"]) == {"prompt", "answer"}
    assert chat.ask(PROMPT, NONE).after == before
    assert chat.ask(PROMPT, Switches(strength=1.0)).after == after
    off = chat.ask(PROMPT, OFF)
    assert (off.before, off.after, off.tokens) == (before, before, None)


def test_the_unedited_answer_is_written_once_for_a_question(
    model: LensModel, monkeypatch: pytest.MonkeyPatch, untouched: None
) -> None:
    asked: list[str] = []

    def counting(model: LensModel, prompts: list[str], **how: object) -> object:
        asked.extend(prompts)
        return continued(model, prompts, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("mrp_lens.runs.chat.continued", counting)
    chat = Chat(model, projection(1), max_new_tokens=2)
    for switches in (None, Switches(strength=0.5), OFF):
        chat.ask(PROMPT, switches)
    assert len(asked) == 3  # once before, twice after
    chat.ask("Another", OFF)
    chat.max_new_tokens = 3
    chat.ask("Another", OFF)
    assert len(asked) == 5


def test_an_edit_that_is_put_on_in_between_is_seen_in_both_answers(model: LensModel, untouched: None) -> None:
    chat = Chat(model, projection(1), max_new_tokens=NEW)
    before = chat.ask(PROMPT, OFF).before
    with edit_of("weight", model).applied(model):
        assert chat.ask(PROMPT, OFF).before == written(model) != before
    assert chat.ask(PROMPT, OFF).before == before


def test_single_directions(model: LensModel, untouched: None) -> None:
    edit = projection(1, 2, rank=2)
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0, mode="add")
    chat = Chat(model, edit + steering)
    assert chat.directions == edit.directions
    alone, without = chat.chosen(Switches(only=3)), chat.chosen(Switches(without=3))
    assert alone is not None
    assert without is not None
    assert alone == edit.with_directions([edit.directions[3]]) + steering
    assert without == edit.with_directions(edit.directions[:3]) + steering
    assert Chat(model, steering).directions == ()


def test_the_question_is_read_as_asked(model: LensModel, monkeypatch: pytest.MonkeyPatch, untouched: None) -> None:
    edit = projection(1)
    assert Chat(model, edit).read("Why?") == "Why?"
    assert Chat(model, edit, question_prompt="Q: {question}\nA:").read("Why?") == "Q: Why?\nA:"
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    chat = Chat(model, edit, chat_template=True, system="Be brief.", question_prompt="{question}!")
    assert chat.read("Why") == "system: Be brief.\nuser: Why!\nassistant:"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"question_prompt": "Q: {text}"}, "must say where the question stands"),
        ({"question_prompt": "Q: {question} {text}"}, "text"),
        ({"chat_template": True}, "has no chat template"),
        ({"system": "Be brief."}, "a system message is part of a chat template"),
    ],
)
def test_a_question_that_cannot_be_read_is_refused_at_the_start(
    model: LensModel, given: dict[str, object], message: str, untouched: None
) -> None:
    with pytest.raises(ValueError, match=message):
        Chat(model, projection(1), **given)  # type: ignore[arg-type]


def test_bad_switches_and_edits_are_refused(model: LensModel, untouched: None) -> None:
    chat = Chat(model, projection(1, rank=2))
    for switches, message in (
        (Switches(strength=1.5), "strength must be a number from 0 to 1"),
        (Switches(only=2), "no direction 2; this edit has 0 to 1"),
        (Switches(without=-1), "no direction -1"),
        (Switches(only=0, without=1), "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.ask(PROMPT, switches)
        with pytest.raises(ValueError, match=message):  # before it is put on
            chat.chosen(replace(switches, on=False))
    with pytest.raises(ValueError, match="has no directions"):
        Chat(model, weight_edit(model, 1)).ask(PROMPT, Switches(only=0))
    with pytest.raises(TypeError, match="edit must be an Edit"):
        Chat(model, "edit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this model has no hook"):
        Chat(model, projection(9))
    with pytest.raises(ValueError, match="temperature must be a number from 0"):
        Chat(model, projection(1), temperature=-1.0).ask(PROMPT)


def test_what_is_shown_first_is_where_most_happens(model: LensModel, untouched: None) -> None:
    gated = Chat(model, conditional(1, 2), max_new_tokens=2).ask(PROMPT).tokens
    assert gated is not None
    assert measures_of(gated) == ["share", "own_displacement", "displacement"]
    means = gated.groupby("hook")["own_displacement"].mean()
    assert hook_to_show(gated) == means.idxmax()
    written_over = Chat(model, weight_edit(model, 1), max_new_tokens=2).ask(PROMPT).tokens
    assert written_over is not None
    assert measures_of(written_over) == ["displacement"]
    assert hook_to_show(written_over) == written_over.groupby("hook")["displacement"].mean().idxmax()
