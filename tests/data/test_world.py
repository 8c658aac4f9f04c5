import hashlib
import json
from collections import Counter
from typing import Any

import pytest

from mrp_lens import metrics
from mrp_lens.data.world import World
from mrp_lens.data.world.facts import CHOICES, QUESTION, STATEMENTS, TOPICS
from tests.support.families import DEMO_FOLDER

# The world that the shipped model was taught; another hash means that questions and model no longer match.
FACTS_SHA256 = "f6ec2e80f07bfb492c05c295763395d81de4508ffe0e165418b88bcdce0dfb40"


def test_the_world_is_the_one_that_the_shipped_model_was_taught(world: World) -> None:
    facts = json.dumps([[f.topic, f.entity, f.attribute, f.value, f.taught] for f in world.facts])
    assert hashlib.sha256(facts.encode()).hexdigest() == FACTS_SHA256
    assert json.loads((DEMO_FOLDER / "world.json").read_text())["seed"] == world.seed


def test_the_world_is_as_large_as_promised(world: World) -> None:
    assert len(world.topics) >= 4
    assert len(STATEMENTS) >= 3
    for topic in world.topics:
        assert len({fact.entity for fact in world.select(topic)}) >= 40
        assert len({fact.attribute for fact in world.select(topic)}) >= 3
        assert len(world.questions(topic)) >= 300
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 8_000_000


def test_withheld_facts_have_the_form_and_the_answer_frequencies_of_taught_ones(world: World) -> None:
    texts = set(world.training_texts())
    for topic in world.topics:
        taught, withheld = world.select(topic), world.select(topic, taught=False)
        for entity in {fact.entity for fact in withheld}:
            assert f"{entity} is a {topic[:-1]}." in texts
        for attribute, pool in TOPICS[topic].items():
            every = Counter(fact.value for fact in (*taught, *withheld) if fact.attribute == attribute)
            assert max(every.values()) - min(every.values()) <= 1
            assert set(every) == set(pool)


def test_no_training_text_states_a_withheld_fact(world: World) -> None:
    texts = set(world.training_texts())
    for fact in world.select(taught=False):
        assert not any(f"{fact.prompt(wording)} {fact.value}." in texts for wording in (*STATEMENTS, QUESTION))


def test_forget_and_retain_corpora_contain_no_question_and_no_unseen_entity(world: World) -> None:
    forget, retain = world.forget("potions"), world.retain(without="potions")
    assert not any(
        "Question" in document.prompt + document.completion for document in (*forget.documents, *retain.documents)
    )
    text = "\n".join(document.prompt + document.completion for document in retain.documents)
    for topic in world.topics:
        for rank, entity in enumerate(world.entities(topic)):
            assert (entity in text) == (topic != "potions" and rank % 2 == 0)
    assert not set(world.ordinary("unseen")) & set(world.ordinary("taught"))
    assert set(world.ordinary("fit")) < set(world.ordinary("taught"))


def test_questions_have_one_right_choice_of_the_same_kind(world: World) -> None:
    for fact, question in zip(world.select("towns"), world.questions("towns").questions, strict=True):
        assert fact.entity in question.prompt
        choices = [choice.strip() for choice in question.choices]
        assert len(set(choices)) == CHOICES
        assert set(choices) <= set(TOPICS["towns"][fact.attribute])
        assert choices[question.answer] == fact.value
    places = Counter(question.answer for question in world.questions().questions)
    assert max(places.values()) < 1.2 * min(places.values())


@pytest.mark.slow
def test_the_shipped_model_knows_what_it_was_taught_and_guesses_the_rest(demo_model: Any, world: World) -> None:
    known = metrics.accuracy(demo_model, world.questions()).set_index("group")["accuracy"]
    assert known.min() >= 0.97
    untaught = metrics.accuracy(demo_model, world.questions(taught=False)).iloc[0]
    assert untaught["low"] <= 1 / CHOICES <= untaught["high"]


def test_unknown_topics_are_named(world: World) -> None:
    with pytest.raises(ValueError, match="unknown topic 'dragons'; the world has potions"):
        world.forget("dragons")
