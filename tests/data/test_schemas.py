import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from mrp_lens.data import KNOWN, Corpus, Document, Question, Questions, Schema
from tests.data.test_corpus import shared
from tests.support.tables import write_table

WMDP = [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}]
MMLU = [{**WMDP[0], "subject": "law"}, {**WMDP[0], "subject": "virology"}]
TOFU = [{"question": "Who?", "answer": "He."}]
PERTURBED = [{**TOFU[0], "paraphrased_answer": "Him.", "perturbed_answer": ["Her.", "Us.", "Me.", "You.", "It."]}]
OPTIONS = [{"question": "Who?", "option1": "X", "option2": "Y", "option3": "Z", "option4": "W", "answer": "Y"}]
SCIENCE = [
    {"image": None, "question": "What?", "choices": ["this", "that"], "answer": 1, "hint": "", "topic": "biology"},
    {"image": None, "question": "Why?", "choices": list("12345"), "answer": 0, "hint": "", "topic": "physics"},
]
WIKITEXT = ["", " = Robert Boulter = \n", " A line of some thirty letters . \n", " It was a long line . " * 3 + "\n"]
WIKITEXT += [" = " + "A long title of a chapter " * 3 + " = \n"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `datasets.load_dataset` was called with, and (under "rows") what it is to return."""
    record: dict[str, Any] = {"rows": []}

    def load(path: str, config: str | None = None, *, split: str) -> Dataset:
        record["call"] = (path, config, split)
        return Dataset.from_list(record["rows"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return record


def test_known_questions_of_the_hub_need_their_name_only(hub: dict[str, Any]) -> None:
    hub["rows"] = WMDP
    quiz = Questions.from_hub("cais/wmdp", config="wmdp-bio")
    assert hub["call"] == ("cais/wmdp", "wmdp-bio", "test")
    assert quiz == Questions((Question("Which?", (" a", " b", " c", " d"), 2),), "cais/wmdp:wmdp-bio")
    hub["rows"] = MMLU
    quiz = Questions.from_hub("cais/mmlu")
    assert hub["call"] == ("cais/mmlu", "all", "test")
    assert quiz.groups == ("law", "virology")
    hub["rows"] = SCIENCE
    quiz = Questions.from_hub("derek-thomas/ScienceQA")
    assert hub["call"] == ("derek-thomas/ScienceQA", None, "test")
    assert quiz.groups == ("biology", "physics")
    hub["rows"] = PERTURBED
    Questions.from_hub("locuslab/TOFU", config="forget10_perturbed")
    assert hub["call"] == ("locuslab/TOFU", "forget10_perturbed", "train")


def test_known_documents_of_the_hub_need_their_name_only(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": text} for text in WIKITEXT]
    for name in ("wikitext", "Salesforce/wikitext"):
        assert Corpus.from_hub(name) == Corpus((Document("", WIKITEXT[3]),), name)
        assert hub["call"] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    hub["rows"] = [{"text": "A paper."}]
    corpus = Corpus.from_hub("cais/wmdp-corpora", config="cyber-forget-corpus")
    assert hub["call"] == ("cais/wmdp-corpora", "cyber-forget-corpus", "train")
    assert corpus == Corpus((Document("", "A paper."),), "cais/wmdp-corpora:cyber-forget-corpus")
    hub["rows"] = TOFU
    corpus = Corpus.from_hub("locuslab/TOFU", config="retain90")
    assert hub["call"] == ("locuslab/TOFU", "retain90", "train")
    assert corpus.documents == (Document("Question: Who?\nAnswer:", " He."),)
    hub["rows"] = SCIENCE
    corpus = Corpus.from_hub("derek-thomas/ScienceQA")
    assert hub["call"] == ("derek-thomas/ScienceQA", None, "train")
    assert corpus.documents == (Document("What?", " that"), Document("Why?", " 1"))


def test_what_is_asked_for_overrides_the_schema(hub: dict[str, Any]) -> None:
    hub["rows"] = [{**MMLU[0], "other": "d", "kind": "x"}]
    quiz = Questions.from_hub(
        "cais/mmlu", config="law", split="dev", prompt="Q: {question}", answer="other", group="kind"
    )
    assert hub["call"] == ("cais/mmlu", "law", "dev")
    assert quiz.questions == (Question("Q: Which?", (" a", " b", " c", " d"), 3, "x"),)
    corpus = Corpus.from_hub("cais/mmlu", prompt="Q: {question} A:")
    assert corpus.documents == (Document("Q: Which? A:", " c"),)
    corpus = Corpus.from_hub("cais/mmlu", prompt="{kind}", completion=" {other}")
    assert corpus.documents == (Document("x", " d"),)
    assert Corpus.from_rows(TOFU, schema="locuslab/TOFU", prompt="{question}").documents == (Document("Who?", " He."),)
    assert Corpus.from_rows(TOFU, schema="locuslab/TOFU", field="answer").documents == (Document("", "He."),)
    short = Schema(path="mine", documents=KNOWN["wikitext"].documents, longer_than=10)
    assert len(Corpus.from_rows([{"text": text} for text in WIKITEXT], schema=short)) == 4
    assert Questions.from_rows(
        [{"text": "x", "o": ["p", "q"], "a": 1}], schema="wikitext", prompt="{text}", choices="o", answer="a"
    )


def test_other_data_sets_of_the_hub_are_read_by_their_columns(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": "Short."}]
    assert Corpus.from_hub("org/name") == Corpus((Document("", "Short."),), "org/name")
    assert hub["call"] == ("org/name", None, "train")
    hub["rows"] = WMDP
    assert len(Questions.from_hub("org/copy", schema="cais/wmdp", config="x")) == 1
    assert hub["call"] == ("org/copy", "x", "test")


@pytest.mark.parametrize("ending", [".jsonl", ""])
def test_local_copies_are_read_by_the_name_of_their_schema(tmp_path: Path, ending: str) -> None:
    def saved(rows: list[dict[str, Any]], name: str) -> Path:
        return write_table(tmp_path / f"{name}{ending}", rows)

    assert Questions.from_file(saved(WMDP, "wmdp"), schema="cais/wmdp").questions[0].answer == 2
    quiz = Questions.from_file(saved(PERTURBED, "perturbed"), schema="locuslab/TOFU")
    assert quiz.questions == (
        Question("Question: Who?\nAnswer:", (" Him.", " Her.", " Us.", " Me.", " You.", " It."), 0),
    )
    quiz = Questions.from_file(saved(OPTIONS, "options"), schema="locuslab/TOFU")
    assert quiz.questions == (Question("Question: Who?\nAnswer:", (" X", " Y", " Z", " W"), 1),)
    authors = [{"question": "Who?", "answer": "He.", "perturbed_answer": ["She.", "I."]}]
    assert Questions.from_rows(authors, schema="locuslab/TOFU").questions[0].choices == (" He.", " She.", " I.")
    corpus = Corpus.from_file(saved(TOFU, "forget10"), schema="locuslab/TOFU")
    assert corpus == Corpus((Document("Question: Who?\nAnswer:", " He."),), "forget10")
    science = Corpus.from_file(saved(SCIENCE, "science"), schema="derek-thomas/ScienceQA")
    assert [document.completion for document in science.documents] == [" that", " 1"]


def test_rows_with_a_picture_are_left_out_without_looking_at_it(tmp_path: Path) -> None:
    rows = [SCIENCE[0], {**SCIENCE[1], "image": {"bytes": b"no picture", "path": None}}]
    table = Dataset.from_list(rows)
    features = table.features.copy()
    features["image"] = datasets.Image()
    table.cast(features).save_to_disk(tmp_path / "science")
    quiz = Questions.from_file(tmp_path / "science", schema="derek-thomas/ScienceQA")
    assert [question.prompt for question in quiz.questions] == ["What?"]
    assert quiz.groups == ("biology",)


def test_questions_with_several_right_choices_are_left_out_and_counted() -> None:
    double = {**WMDP[0], "choices": ["a", "c", "c", "d"]}
    with pytest.warns(UserWarning, match="left out 2 of 3 questions in which several choices equal the right answer"):
        quiz = Questions.from_rows([double, *WMDP, double], schema="cais/wmdp")
    assert len(quiz) == 1
    with pytest.raises(ValueError, match="row 1: several choices are 'c'"):
        Questions.from_rows([*WMDP, double])


def test_schemas_say_what_is_wrong(hub: dict[str, Any]) -> None:
    for read in (Corpus.from_rows, Questions.from_rows):
        with pytest.raises(
            ValueError, match=r"unknown schema 'wmdp'; did you mean cais/wmdp\? known are .*cais/wmdp, .*wikitext"
        ):
            read([], schema="wmdp")
    with pytest.raises(ValueError, match="Salesforce/wikitext holds texts, no questions"):
        Questions.from_hub("wikitext")
    with pytest.raises(
        ValueError, match="cais/wmdp has several configurations; give config= one of wmdp-bio, wmdp-cyber"
    ):
        Questions.from_hub("cais/wmdp")
    assert "call" in hub  # the first of them; the second asked for nothing
    assert hub["call"][0] != "cais/wmdp"
    with pytest.raises(ValueError, match="row 0: no field 'paraphrased_answer'; the row has 'question', 'answer'"):
        Questions.from_rows(TOFU, schema="locuslab/TOFU")


def test_every_known_data_set_names_the_columns_that_it_reads() -> None:
    for name, schema in KNOWN.items():
        assert schema.documents is not None or schema.questions, name
        assert schema.path.count("/") == 1


def test_tofu_and_wikitext_are_read_by_their_schema() -> None:
    corpus = Corpus.from_file(shared("tofu/forget.jsonl"), schema="locuslab/TOFU")
    assert len(corpus) == 400
    assert corpus.documents[1].completion == " Hsiao Yun-Hwa is part of the LGBTQ+ community."
    for name, count in (("real_authors", 100), ("world_facts", 117)):
        rows = [json.loads(line) for line in shared(f"tofu/{name}.jsonl").read_text().splitlines()]
        quiz = Questions.from_file(shared(f"tofu/{name}.jsonl"), schema="locuslab/TOFU")
        assert len(quiz) == count
        assert [q.choices[q.answer].strip() for q in quiz.questions] == [row["answer"].strip() for row in rows]
    lines = Corpus.from_file(shared("wikitext2.test.raw.txt"), schema="wikitext")
    assert len(lines) > 1000
    assert all(len(d.completion) > 50 and not d.completion.startswith(" = ") for d in lines.documents)
