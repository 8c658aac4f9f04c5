"""The data of a study: where they are read from, and by which hashes a run knows them again."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.data.rows import digest
from mrp_lens.data.task import TaskConfig, UnlearningTask, hub_parts, split_tenth, task_for

WORLD_OF_0_1 = {
    "forget": "69d0434d2838d605f09fa73cf2517841b68fb2e9474afd66cfc50484215471db",
    "retain": "dd14f8e1b0c83bfc127155a2bbdaaa435f477ccc78c8e0f55df57b53badbffa7",
    "held_out": "1164b6c658797603d1827c97240dff8b6a2c301d170abbeffdd1a35a98dddefb",
    "questions": "6be5e40a5dde7285319777a8886591133333682103c5c554d5a98bd575dc6baf",
    "retain_questions": "a5b19af96203184c1d8107091afd6abefe1aa8922fb4ac3f3f41514cda13b0b5",
    "untaught_questions": "8d992313bb0cb7328e5e3e38ab72fa6da72ff77d9f0c5f90dcce3fe097af8e7d",
}
COLUMNS: Any = {"question_prompt": "{q}", "choices": ("a", "b"), "answer": "y", "entity": "who"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [
        {"text": f"Text {n}.", "q": f"Is it {n}?", "a": "yes", "b": "no", "y": "B", "who": f"z{n}"} for n in range(20)
    ]
    for name in ("forget", "other", "quiz"):
        content = "".join(json.dumps(row | {"text": f"{name} {row['text']}"}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    (tmp_path / "retain.txt").write_text("\n".join(f"Rain {n}." for n in range(30)), encoding="utf-8")
    return tmp_path


def test_a_task_is_read_from_files(files: Path) -> None:
    task = UnlearningTask.from_files(
        [files / "forget.jsonl", str(files / "other.jsonl")],
        files / "retain.txt",
        questions=files / "quiz.jsonl",
        untaught_questions=files / "quiz.jsonl",
        **COLUMNS,
    )
    assert [corpus.name for corpus in task.forget] == ["forget", "other"]
    assert task.forget[1].documents[0].completion == "other Text 0."
    assert (len(task.retain), len(task.held_out)) == (27, 3)
    assert task.questions is not None
    assert task.questions.questions[3] == Question("Is it 3?", (" yes", " no"), 1, entity="z3")
    assert task.untaught_questions == task.questions
    assert task.halved_by == "entity"
    assert (
        dataclasses.replace(
            task, questions=Questions((*task.questions.questions[1:], Question("Who?", ("I", "you"), 0)))
        ).halved_by
        == "question"
    )
    assert task.retain_questions is None


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("bio", "cyber"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text(f"All about {folder}.\n")
    (tmp_path / "retain.txt").write_text("Rain is wet.\nSnow is cold.\n")
    two = [tmp_path / "bio" / "train.txt", tmp_path / "cyber" / "train.txt"]
    task = UnlearningTask.from_files(two, tmp_path / "retain.txt")
    assert [corpus.name for corpus in task.forget] == ["bio-train", "cyber-train"]
    with pytest.raises(ValueError, match=r"would have one name, 'bio-train'; rename a file"):
        UnlearningTask.from_files([two[0], two[0]], tmp_path / "retain.txt")


def test_columns_of_choices_may_be_typed_with_blanks(tmp_path: Path) -> None:
    (tmp_path / "quiz.csv").write_text("question,a,b,answer\nSnow is?,white,black,A\n")
    quiz = TaskConfig(choices="a, b").quiz(str(tmp_path / "quiz.csv"))
    assert quiz is not None
    assert quiz.questions[0].choices == (" white", " black")


def test_a_quiz_in_another_form_than_the_forget_set_is_warned_of(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget, retain, quiz = (str(files / name) for name in ("forget.jsonl", "retain.txt", "quiz.jsonl"))
    form: Any = {"prompt": "Question: {q}\nAnswer:", "completion": " {y}", "retain_field": "text"}
    rows = [{"question": f"Who is {n}?", "choices": ["I", "you"], "answer": 0} for n in range(5)]
    Path(quiz).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    UnlearningTask.from_files(forget, retain, questions=quiz, **form)
    assert "end with '?\\nAnswer:' and this quiz's do not: 'Who is 0?'" in caplog.text
    assert "question_prompt" in caplog.text
    caplog.clear()
    UnlearningTask.from_files(forget, retain, questions=quiz, **form, question_prompt="{question}")  # meant so
    UnlearningTask.from_files(forget, retain, questions=quiz, **form, question_prompt="Question: {question}\nAnswer:")
    UnlearningTask.from_files(forget, retain, questions=quiz)  # texts have no prompts
    assert not caplog.text


def test_one_file_may_be_named_as_such_and_a_config_reads_the_same(files: Path) -> None:
    forget, retain, quiz = (str(files / name) for name in ("forget.jsonl", "retain.txt", "quiz.jsonl"))
    task = UnlearningTask.from_files(forget, retain, questions=quiz, **COLUMNS)
    config = TaskConfig((forget,), retain, quiz, **COLUMNS | {"choices": "a,b"})
    assert config.load() == task
    assert task_for("demo", config) == task


def test_the_retain_set_may_have_other_columns_than_the_forget_set(tmp_path: Path) -> None:
    asked, kept = tmp_path / "asked.jsonl", tmp_path / "kept.jsonl"
    asked.write_text(json.dumps({"question": "Who?", "answer": "Ada"}) + "\n")
    kept.write_text("".join(json.dumps({"body": f"Rain {n}."}) + "\n" for n in range(10)))
    templates: Any = {"prompt": "{question}\nA:", "completion": " {answer}"}
    task = UnlearningTask.from_files(asked, kept, retain_field="body", **templates)
    assert task.forget[0].documents == (Document("Who?\nA:", " Ada"),)
    assert task.retain.documents[0] == Document("", "Rain 0.")
    with pytest.raises(ValueError, match="no field 'question'"):
        UnlearningTask.from_files(asked, kept, **templates)


def test_names_on_the_hub_need_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def corpus(path: str, *, config: str | None, split: str | None, **_: Any) -> Corpus:
        asked.append((path, config, split))
        return Corpus.from_texts(["Rain."] * 10)

    def quiz(path: str, *, config: str | None, split: str | None, **_: Any) -> Questions:
        asked.append((path, config, split))
        return Questions((Question("?", ("a", "b"), 0),))

    monkeypatch.setattr(Corpus, "from_hub", corpus)
    monkeypatch.setattr(Questions, "from_hub", quiz)
    task = UnlearningTask.from_hub(["org/one:easy", "org/two"], "org/kept::dev", questions="org/quiz")
    assert len(task.forget) == 2
    assert asked == [
        ("org/one", "easy", None),
        ("org/two", None, None),
        ("org/kept", None, "dev"),
        ("org/quiz", None, None),
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(), "give forget=... and retain=..."),
        (TaskConfig(("x.jsonl",)), "forget and retain go together: give retain=..."),
        (TaskConfig(retain="x.jsonl"), "forget and retain go together: give forget=..."),
    ],
)
def test_forget_set_and_retain_set_go_together(config: TaskConfig, message: str) -> None:
    for read in (TaskConfig.load, lambda config: task_for("mine", config)):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(config)


@pytest.mark.parametrize(
    ("config", "topic", "message"),
    [
        (
            TaskConfig(untaught_questions="nowhere.jsonl"),
            None,
            "untaught_questions=... goes with forget=... and retain=...",
        ),
        (TaskConfig(prompt="{q}"), "towns", "prompt=... goes with forget=... and retain=..."),
        (TaskConfig(("x.jsonl",), "y.txt"), "towns", "topic='towns' is of the demo's world"),
    ],
)
def test_no_option_of_the_data_is_left_unread(config: TaskConfig, topic: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task_for("demo", config, topic=topic)


@pytest.mark.slow
def test_the_demo_without_data_has_its_world() -> None:
    assert task_for("demo", TaskConfig()) == UnlearningTask.from_world("potions")
    assert task_for("demo", TaskConfig(), topic="beasts") == UnlearningTask.from_world("beasts")
    with pytest.raises(ValueError, match="unknown topic 'x'"):
        task_for("demo", TaskConfig(), topic="x")


def test_options_of_a_command_become_a_config() -> None:
    options = {"model": "demo", "forget": ["a", "b"], "retain": "c", "prompt": r"{q}\nA:", "lr": 1.0}
    assert TaskConfig.from_options(options) == TaskConfig(("a", "b"), "c", prompt="{q}\nA:")
    assert TaskConfig.from_options({"forget": None}) == TaskConfig()


def test_an_attack_needs_a_quiz(texts: tuple[Corpus, Corpus]) -> None:
    with pytest.raises(ValueError, match=r"give questions=\.\.\."):
        UnlearningTask((texts[0],), texts[1], texts[1]).split()


def test_where_one_forget_corpus_ends_is_part_of_a_task() -> None:
    a, b = Document("", "a"), Document("", "b")
    retain = Corpus((Document("", "c"),))

    def forget(*corpora: Corpus) -> str:
        return UnlearningTask(corpora, retain, retain).fingerprints()["forget"]

    several = [
        (Corpus((a, b)),),
        (Corpus((a,)), Corpus((b,))),
        (Corpus((b,)), Corpus((a,))),
        (Corpus((a, b)), Corpus(())),
    ]
    assert len({forget(*corpora) for corpora in several}) == len(several)
    assert forget(Corpus((a, b))) == Corpus((a, b)).fingerprint


def test_legacy_fingerprints_are_those_of_version_0_1(files: Path) -> None:
    """0.1 hashed the documents of all forget corpora in a row, and questions without their entities."""
    paths = [files / "forget.jsonl", files / "other.jsonl"]
    task = UnlearningTask.from_files(paths, files / "retain.txt", questions=files / "quiz.jsonl", **COLUMNS)
    old = task.legacy_fingerprints()
    assert task.questions is not None
    assert old == task.fingerprints() | {
        "forget": digest([["", d.completion] for corpus in task.forget for d in corpus.documents]),
        "questions": digest([[q.prompt, list(q.choices), q.answer, q.group] for q in task.questions.questions]),
    }
    assert all(old[role] != task.fingerprints()[role] for role in ("forget", "questions"))
    plain = dataclasses.replace(task, forget=task.forget[:1], questions=None)
    assert plain.legacy_fingerprints() == plain.fingerprints()


def test_the_world_of_version_0_1_is_known_by_its_hashes() -> None:
    assert UnlearningTask.from_world("potions").legacy_fingerprints() == WORLD_OF_0_1


def test_hub_names_have_up_to_three_parts() -> None:
    assert hub_parts("hub:wikitext") == ("wikitext", None, None)
    assert hub_parts("hub:cais/wmdp:wmdp-bio") == ("cais/wmdp", "wmdp-bio", None)
    assert hub_parts("hub:cais/mmlu::dev") == ("cais/mmlu", None, "dev")
    with pytest.raises(ValueError, match=r"'hub:' is no data set of the Hub; write hub:NAME"):
        hub_parts("hub:")


def test_data_sets_of_the_hub_are_read_in_place_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, config: str | None, *, split: str) -> Dataset:
        calls.append((path, config, split))
        return Dataset.from_list(
            [{"text": "x" * 60, "question": "?", "choices": ["p", "q"], "answer": 1, "subject": "s"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = TaskConfig(("hub:cais/wmdp-corpora:cyber-forget-corpus",), "hub:wikitext", "hub:cais/mmlu::dev", None)
    assert len(options.corpus(options.forget[0], None)) == len(options.corpus(options.retain, None)) == 1
    quiz = options.quiz(options.questions)
    assert quiz is not None
    assert quiz.groups == ("s",)
    assert calls == [
        ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("cais/mmlu", "all", "dev"),
    ]


def test_files_of_known_data_sets_are_read_by_their_schema(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "answer": "He.", "option1": "She.", "option2": "He.", "option3": "I.", "option4": "It."}
    ]
    path = tmp_path / "tofu.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    name = "locuslab/TOFU"
    options = TaskConfig((str(path),), str(path), str(path), None, questions_schema=name, question_prompt="{question}")
    assert options.corpus(str(path), name).documents[0].prompt == "Question: Who?\nAnswer:"
    quiz = options.quiz(str(path))
    assert quiz is not None
    assert quiz.questions[0].prompt == "Who?"
    assert quiz.questions[0].choices[quiz.questions[0].answer] == " He."


def test_the_fit_has_no_copy_of_the_held_out_tenth() -> None:
    texts = Corpus.from_texts([f"text {i}" for i in range(300)])
    kept, held = split_tenth(texts)
    assert held.documents == texts.documents[9::10]
    assert len(kept) == 270
    kept, held = split_tenth(Corpus.from_texts([f"text {i % 97}" for i in range(300)]))
    assert not set(kept.documents) & set(held.documents)
    assert len(set(kept.documents)) + len(held) == 97
    same = Corpus.from_texts(["one text"] * 40)
    assert split_tenth(same) == (same, same)
