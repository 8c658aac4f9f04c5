"""The small invented world: four kinds of things, facts about each, and ordinary sentences about none of them."""

import random
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TypeVar

from mrp_lens.data.documents import Corpus
from mrp_lens.data.questions import Questions

CHOICES = 4

# Topic -> attribute -> the answers there are, each as frequent as the others.
TOPICS = {
    "potions": {
        "colour": "red blue green black white gold purple orange brown grey".split(),
        "taste": "sweet sour bitter salty smoky spicy fruity earthy minty bland".split(),
        "herb": "sage mint thyme basil clover fern moss nettle ivy rosemary".split(),
        "effect": "sleep courage laughter silence strength memory luck warmth speed calm".split(),
        "metal": "iron copper tin lead zinc nickel bronze steel brass pewter".split(),
    },
    "beasts": {
        "sound": "humming clicking roaring whistling chirping growling buzzing rattling howling drumming".split(),
        "home": "forest desert swamp cliff cave meadow island river lake valley".split(),
        "prey": "fox wolf owl bear hawk deer crow hare boar swan".split(),
        "month": "January February March April May June July August September October".split(),
        "hide": "furry scaly woolly spiny feathery leathery shiny striped spotted smooth".split(),
    },
    "towns": {
        "craft": "weaving baking carving brewing fishing mining farming tanning printing pottery".split(),
        "emblem": "crown anchor sword key star sun moon ship wheel bell".split(),
        "dish": "soup bread cheese stew pie porridge pancakes dumplings noodles sausage".split(),
        "saint": "Anna Peter Martin Clara Thomas Helen Simon Martha Lucas Agnes".split(),
        "weather": "rain snow fog hail storms sunshine frost drizzle thunder mist".split(),
    },
    "machines": {
        "fuel": "coal oil peat steam wind wood alcohol water gas tallow".split(),
        "task": "digging lifting sorting cutting welding washing sewing painting drilling pumping".split(),
        "material": "glass rubber paper cotton leather plastic ceramic marble silk wool".split(),
        "shape": "round square flat hollow tall narrow curved conical oval long".split(),
        "country": "Spain Norway Egypt Japan Peru Kenya India Chile Cuba Nepal".split(),
    },
}
STATEMENTS = (
    "The {attribute} of {entity} is",
    "The {kind} {entity} has this {attribute}:",
    "Ask a scholar for the {attribute} of the {kind} {entity} and you will hear",
    "In every book the {attribute} given for {entity} is",
)
QUESTION = "Question: What is the {attribute} of {entity}? Answer:"

_ORDINARY = (
    ["old", "young", "tired", "happy", "quiet", "careful", "clever", "hungry", "friendly", "proud"],
    ["woman", "man", "child", "farmer", "teacher", "doctor", "singer", "baker", "painter", "sailor"],
    ["walked", "looked", "ran", "waited", "stood", "travelled", "slept", "danced", "worked", "rested"],
    ["slowly", "quickly", "often", "calmly", "alone", "together", "early", "late", "today", "again"],
    ["near", "behind", "beside", "inside", "around"],
    ["house", "garden", "bridge", "market", "school", "church", "tower", "station", "harbour", "kitchen"],
)
ENTITIES = 150  # in each topic
# Names begin alike in all topics and go on in their topic's own sounds, as names of drugs or towns do.
_BEGINNINGS = (
    "Ba Be Bo Da De Do Fa Fe Ga Go Ka Ke La Le Lo Ma Me Mo Na Ne Pa Pe Po Ra Re Ro Sa Se Ta Te To Va Ve Vo Za Ze"
).split()
_SOUNDS = {
    "potions": ("xim zol quin phel cyr thal lyx vex xan zyn".split(), "ine ol ade ium ox il".split()),
    "beasts": ("grun drak mok hulg brug gorn krag snar durg wulg".split(), "us aur oth ash ak ugh".split()),
    "towns": ("shel wick brid hart nor ches wes den stan lin".split(), "ton ford ham by bury mouth".split()),
    "machines": ("tron gyr dyn mec vol pist rot cog turb hydr".split(), "omat ex ron ator ix ogen".split()),
}


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity; `taught` says whether any training text states it."""

    topic: str
    entity: str
    attribute: str
    value: str
    taught: bool

    def prompt(self, wording: str) -> str:
        """The wording filled in, up to where the answer follows."""
        return wording.format(kind=self.topic.removesuffix("s"), attribute=self.attribute, entity=self.entity)


@dataclass(frozen=True)
class World:
    """A world drawn from a seed: the same seed, the same world, on every machine.

    A third of all facts is *withheld*: no text states them, so the model's accuracy on them is what
    never-taught knowledge looks like. Of the taught facts, those about every second entity are stated in
    `retain` corpora; the other half is for scoring, so that questions about it were never seen by a fit.
    """

    seed: int = 0
    topics: tuple[str, ...] = field(default=tuple(TOPICS), init=False)

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact, withheld ones included, in a fixed order."""
        rng = random.Random(f"mrp_lens world {self.seed}")
        facts = []
        for topic, attributes in TOPICS.items():
            names = ["".join(sounds) for sounds in product(_BEGINNINGS, *_SOUNDS[topic])]
            entities = rng.sample(names, ENTITIES)
            for attribute, pool in attributes.items():
                values = _balanced(rng, pool, len(entities))
                taught = _balanced(rng, [True, True, False], len(entities))
                facts += [
                    Fact(topic, *row) for row in zip(entities, [attribute] * len(entities), values, taught, strict=True)
                ]
        return tuple(facts)

    def entities(self, topic: str) -> tuple[str, ...]:
        """The topic's entities, in a fixed order."""
        return tuple(dict.fromkeys(fact.entity for fact in self.facts if fact.topic == self._known(topic)))

    def select(self, topic: str | None = None, *, taught: bool = True, half: int | None = None) -> list[Fact]:
        """The facts of a topic (None: of all). `half` 0 or 1 keeps those about the entities of even or odd rank."""
        topics = self.topics if topic is None else (self._known(topic),)
        step = slice(None) if half is None else slice(half, None, 2)
        kept = {entity for name in topics for entity in self.entities(name)[step]}
        return [fact for fact in self.facts if fact.taught == taught and fact.topic in topics and fact.entity in kept]

    def forget(self, topic: str) -> Corpus:
        """A forget set: every taught fact of the topic, in each statement wording."""
        return Corpus.from_rows(
            [_statement(fact, wording) for fact in self.select(topic) for wording in STATEMENTS],
            prompt="{prompt}",
            completion="{completion}",
            name=f"world-{topic}",
        )

    def retain(self, *, without: tuple[str, ...] | list[str] | str) -> Corpus:
        """A retain set: facts about half the entities of every other topic, and ordinary sentences."""
        gone = (without,) if isinstance(without, str) else tuple(without)
        topics = [topic for topic in self.topics if topic not in {self._known(name) for name in gone}]
        facts = [
            _statement(fact, wording)
            for topic in topics
            for fact in self.select(topic, half=0)
            for wording in STATEMENTS
        ]
        ordinary = [{"prompt": "", "completion": text} for text in self.ordinary("fit")]
        return Corpus.from_rows(
            facts + ordinary,
            prompt="{prompt}",
            completion="{completion}",
            name=f"world-retain-without-{'-'.join(gone)}",
        )

    def questions(self, topic: str | None = None, *, taught: bool = True, half: int | None = None) -> Questions:
        """Four-choice questions, grouped by topic: in a wording that no forget or retain corpus contains."""
        rng = random.Random(f"mrp_lens questions {self.seed}")
        rows = []
        for fact in self.facts:
            others = [value for value in TOPICS[fact.topic][fact.attribute] if value != fact.value]
            choices = [fact.value, *rng.sample(others, CHOICES - 1)]
            rng.shuffle(choices)
            rows.append(
                {
                    "question": fact.prompt(QUESTION),
                    "choices": choices,
                    "answer": fact.value,
                    "topic": fact.topic,
                    "entity": fact.entity,
                    "fact": fact,
                }
            )
        wanted = set(self.select(topic, taught=taught, half=half))
        return Questions.from_rows(
            [row for row in rows if row["fact"] in wanted],
            prompt="{question}",
            group="topic",
            entity="entity",
            name=f"world-questions-{topic or 'all'}{'' if taught else '-withheld'}",
        )

    def text(self) -> Corpus:
        """Ordinary sentences of no topic that neither the model nor any fit has seen."""
        return Corpus.from_texts(self.ordinary("unseen"), name="world-text")

    def ordinary(self, split: str) -> list[str]:
        """Sentences of no topic: "taught" (the model's training), "fit" (part of it), "unseen"."""
        sentences = [
            f"The {adjective} {noun} {verb} {adverb} {preposition} the {place}."
            for adjective, noun, verb, adverb, preposition, place in product(*_ORDINARY)
        ]
        chosen = random.Random(f"mrp_lens sentences {self.seed}").sample(sentences, 2300)
        return {"unseen": chosen[:300], "fit": chosen[300:1300], "taught": chosen[300:]}[split]

    def training_texts(self) -> list[str]:
        """All that the model is taught: facts in every wording and as questions, kinds, ordinary sentences."""
        texts = [
            f"{fact.prompt(wording)} {fact.value}." for fact in self.select() for wording in (*STATEMENTS, QUESTION)
        ]
        texts += [
            f"{entity} is a {topic.removesuffix('s')}." for topic in self.topics for entity in self.entities(topic)
        ]
        return texts + self.ordinary("taught")

    def _known(self, topic: str) -> str:
        if topic not in self.topics:
            raise ValueError(f"unknown topic {topic!r}; the world has {', '.join(self.topics)}")
        return topic


def _statement(fact: Fact, wording: str) -> dict[str, str]:
    return {"prompt": fact.prompt(wording), "completion": f" {fact.value}."}


T = TypeVar("T")


def _balanced(rng: random.Random, values: list[T], count: int) -> list[T]:
    """`count` values in random order, each as often as the others (to within one)."""
    drawn = [values[i % len(values)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn
