import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.data.world import World
from tests.support.families import DEMO_FOLDER
from tests.support.tables import FILES, write_table, written

SHARED = Path(__file__).parents[3] / "shared" / "data"

ROWS: list[dict[str, Any]] = [
    {"question": "Two and two?", "choices": ["three", "four"], "answer": 1, "kind": "sum"},
    {"question": "Snow is?", "choices": ["white", "black"], "answer": "white", "kind": "colour"},
]


def test_templates_put_the_loss_on_the_completion() -> None:
    corpus = Corpus.from_rows([{"q": "Why?", "a": "Because."}], prompt="Question: {q}\nAnswer:", completion=" {a}")
    assert corpus.documents == (Document("Question: Why?\nAnswer:", " Because."),)
    with pytest.raises(ValueError, match="go together"):
        Corpus.from_rows([{"q": "Why?"}], prompt="{q}")


@pytest.mark.parametrize("ending", [*FILES, ".txt", ""])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    corpus = Corpus.from_file(write_table(tmp_path / f"data{ending}", [{"text": "One, two."}, {"text": "Three."}]))
    assert [document.completion for document in corpus.documents] == ["One, two.", "Three."]
    assert corpus.name == "data"
    assert corpus.fingerprint == Corpus.from_texts(["One, two.", "Three."]).fingerprint


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("none.jsonl", {}, FileNotFoundError, r"none.jsonl"),
        ("data.docx", {}, ValueError, r"unknown ending '.docx'"),
        (
            "rows.jsonl",
            {},
            ValueError,
            r"row 0: no field 'text'; the row has 'body', 'id'\. Say which .* field=\.\.\., or",
        ),
        (
            "rows.jsonl",
            {"prompt": "{title}", "completion": "{body}"},
            ValueError,
            "no field 'title'; the row has 'body', 'id'",
        ),
        (
            "rows.jsonl",
            {"field": "body", "prompt": "{id}", "completion": "{body}"},
            ValueError,
            "the field 'body' or the templates",
        ),
    ],
)
def test_bad_files_and_columns_are_named(
    tmp_path: Path, name: str, options: dict[str, str], error: type[Exception], message: str
) -> None:
    written(tmp_path / "data.docx", "x")
    write_table(tmp_path / "rows.jsonl", [{"body": "x", "id": 1}])
    with pytest.raises(error, match=message):
        Corpus.from_file(tmp_path / name, **options)


def test_a_line_ends_where_the_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('\ufeff{"text": "one\u2028two"}\r\n{"text": "three"}\r\n', encoding="utf-8")
    assert [d.completion for d in Corpus.from_file(tmp_path / "data.jsonl").documents] == ["one\u2028two", "three"]


def test_templates_take_any_column_name_and_doubled_braces() -> None:
    row = {"a.b": 1, "first name": "Ann", "x": "y"}
    corpus = Corpus.from_rows([row], prompt="{{{a.b}}} {first name}", completion=" {x}{x}")
    assert corpus.documents == (Document("{1} Ann", " yy"),)
    with pytest.raises(ValueError, match="written twice"):
        Corpus.from_rows([row], prompt="{x", completion="{x}")
    with pytest.raises(ValueError, match="row 0: no field 'body'; the row has 'question', 'choices', 'answer', 'kind'"):
        Questions.from_rows(ROWS, prompt="{body}")
    with pytest.raises(ValueError, match="row 0: no field 'options'; the row has 'question', 'choices'"):
        Questions.from_rows(ROWS, choices="options")


def test_folders_that_datasets_saved_are_read(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "One."}, {"text": "Two."}])
    rows.save_to_disk(tmp_path / "single")
    DatasetDict(train=rows, test=Dataset.from_list([{"text": "Three."}])).save_to_disk(tmp_path / "several")
    assert Corpus.from_file(tmp_path / "single") == Corpus((Document("", "One."), Document("", "Two.")), "single")
    assert Corpus.from_file(tmp_path / "several", split="test").documents == (Document("", "Three."),)
    assert len(Corpus.from_file(tmp_path / "several" / "train")) == 2
    Dataset.from_list(ROWS[:1]).save_to_disk(tmp_path / "quiz")
    assert Questions.from_file(tmp_path / "quiz").questions == Questions.from_rows(ROWS[:1]).questions
    with pytest.raises(ValueError, match=r"holds the splits train, test; give split="):
        Corpus.from_file(tmp_path / "several")
    with pytest.raises(ValueError, match=r"holds the splits train, test, not 'dev'"):
        Questions.from_file(tmp_path / "several", split="dev")
    with pytest.raises(ValueError, match="single Dataset, which has no split 'train'"):
        Corpus.from_file(tmp_path / "single", split="train")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"not one that Dataset.save_to_disk"):
        Corpus.from_file(tmp_path / "other")
    rows.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="is empty"):
        Corpus.from_file(tmp_path / "none")
    (tmp_path / "one.txt").write_text("One.")
    with pytest.raises(ValueError, match="has no split 'train'"):
        Corpus.from_file(tmp_path / "one.txt", split="train")


@pytest.mark.parametrize("ending", [*FILES, ""])
def test_every_kind_of_table_gives_the_same_questions(tmp_path: Path, ending: str) -> None:
    rows = [{"question": "Snow is?", "a": "white", "b": "black", "c": "red", "answer": "B"}]
    quiz = Questions.from_file(write_table(tmp_path / f"quiz{ending}", rows), choices=["a", "b", "c"])
    assert quiz == Questions((Question("Snow is?", (" white", " black", " red"), 1),), "quiz")


def test_answers_may_be_an_index_or_a_text() -> None:
    quiz = Questions.from_rows(ROWS, prompt="Q: {question} A:", group="kind")
    assert [q.answer for q in quiz.questions] == [1, 0]
    assert quiz.questions[0].choices == (" three", " four")
    assert quiz.groups == ("sum", "colour")
    columns = Questions.from_rows(
        [{"q": "x", "a": "1", "b": "2", "right": "2"}], prompt="{q}", choices=["a", "b"], answer="right"
    )
    assert columns.questions[0].answer == 1


TEN = [f"text {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["white", "black", "red"], 2, 2),
        (["white", "black", "red"], np.int64(2), 2),
        (["white", "black", "red"], "black", 1),
        ([" white", "black "], "black", 1),
        (["white", "black", "red"], "C", 2),
        (["white", "black", "red"], "c", 2),
        (["white", "black", "red"], "B.", 1),
        (["white", "black", "red"], "b)", 1),
        (["white", "black", "red"], " (A) ", 0),
        (["white", "black", "red"], "2", 2),
        (TEN, "J", 9),
        (["A", "B", "C"], "B", 1),  # letter and text agree
        (["2", "1", "0"], "2", 0),  # the text of a choice, before the index
        (["2", "1", "3"], 2, 2),  # an int is an index where the choices are texts
        ([30, 20, 10], 20, 1),  # beyond every index
        ([0, 1], 1, 1),  # index and choice agree
    ],
)
def test_an_answer_may_be_a_text_a_letter_or_an_index(choices: list[Any], answer: Any, index: int) -> None:
    quiz = Questions.from_rows([{"question": "?", "choices": choices, "answer": answer}])
    assert quiz.questions[0].answer == index
    assert len(quiz.questions[0].choices) == len(choices)


TWO = ["a thing", "another"]


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        *((TWO, answer, "the answer .* is neither an index") for answer in (2, -1, "grey", None, True)),
        (TWO, "C", r"the answer 'C' is neither an index in 0..1 nor a letter in A..B"),
        (TWO, "2", "the answer '2' is neither"),
        (TWO, 0.0, "the answer 0.0 is neither"),
        ([1, 2, 0], 1, "the answer 1 may be an index or one of the choices"),
        (["white", "black", "white "], 0, "several choices are 'white', the right answer"),
        (["white", "black", "white"], "A", "several choices are 'white'"),
        *(
            (c, 0, "choices must be a list of at least 2 and at most 10")
            for c in (["one"], [*TEN, "x"], "one two", None)
        ),
    ],
)
def test_an_answer_that_is_none_or_several_is_refused(choices: Any, answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        Questions.from_rows([ROWS[0], {"question": "?", "choices": choices, "answer": answer}])


def test_a_letter_among_letters_is_a_text_where_other_answers_are_texts() -> None:
    rows = [
        {"question": "Symbol of carbon?", "choices": ["N", "C", "B"], "answer": "C"},
        {"question": "Symbol of gold?", "choices": ["Au", "Ag"], "answer": "Au"},
    ]
    assert [q.answer for q in Questions.from_rows(rows).questions] == [1, 0]
    with pytest.raises(ValueError, match=r"row 0: the answer 'C' may be a letter or one of the choices .* as indices"):
        Questions.from_rows([rows[0], {**rows[1], "answer": "A"}])


def test_answers_that_count_from_1_and_contradict_each_other_are_told(recwarn: pytest.WarningsRecorder) -> None:
    rows = [{"question": f"What is {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4} for n in range(24)]
    Questions.from_rows(rows)
    assert not recwarn
    with pytest.warns(UserWarning, match="none of 24 answers is 0, the first choice: take 1 off each"):
        Questions.from_rows([{**row, "answer": 1 + n % 3} for n, row in enumerate(rows)])
    with pytest.warns(UserWarning, match="1 questions are asked again, with the same choices and another right answer"):
        Questions.from_rows([*rows, {**rows[1], "choices": ["d", "c", "b", "a"]}])


def test_rows_without_text_are_left_out_and_templates_name_columns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rows: left out 2 of 3 rows, which have no text"):
        corpus = Corpus.from_rows([{"text": "a"}, {"text": ""}, {"text": " \n"}])
    assert corpus.documents == (Document("", "a"),)
    with pytest.raises(ValueError, match="row 0: the question has no text"):
        Questions.from_rows([{"question": " ", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(ValueError, match=r"the prompt of a question 'Question:' names no column"):
        Questions.from_rows(ROWS, prompt="Question:")
    with pytest.raises(ValueError, match=r"the completion ' A' names no column"):
        Corpus.from_rows(ROWS, prompt="Q:", completion=" A")
    (tmp_path / "data.jsonl").write_text('{"x": "no text"}\n')
    with pytest.raises(ValueError, match=r"data, row 0: no field 'text'.*\(in .*data.jsonl; rows count from 0\)"):
        Corpus.from_file(tmp_path / "data.jsonl")


def test_wrong_choices_may_be_equal() -> None:
    quiz = Questions.from_rows([{"question": "?", "choices": ["red", "red", "blue"], "answer": "blue"}])
    assert quiz.questions[0].answer == 2


def test_columns_of_choices_may_hold_lists() -> None:
    row = {"question": "?", "right": "one", "wrong": ["two", "three"], "answer": "one"}
    (question,) = Questions.from_rows([row], choices=["right", "wrong"]).questions
    assert question == Question("?", (" one", " two", " three"), 0)


def test_halves_share_neither_questions_nor_entities(world: World) -> None:
    questions = world.questions("potions")
    for by in ("question", "entity"):
        first, second = questions.halves(by=by, seed=1)
        assert len(first) + len(second) == len(questions)
        assert not set(first.questions) & set(second.questions)
        shared = {q.entity for q in first.questions} & {q.entity for q in second.questions}
        assert bool(shared) == (by == "question")
    assert questions.halves(by="entity", seed=1) == questions.halves(by="entity", seed=1)
    assert questions.halves(by="entity", seed=1) != questions.halves(by="entity", seed=2)


def test_spellings_of_one_entity_stay_in_one_half() -> None:
    spelled = {"Ada Lovelace": 2, " ada  lovelace": 2, "ADA LOVELACE ": 2, "Alan Turing": 2}
    rows = [
        {"question": f"{name}{n}?", "choices": ["a", "b"], "answer": 0, "entity": name}
        for name, many in spelled.items()
        for n in range(many)
    ]
    for seed in range(4):
        sides = Questions.from_rows(rows, entity="entity").halves(by="entity", seed=seed)
        assert sorted(map(len, sides)) == [2, 6]


def test_entities_have_numbers_and_questions_without_one_are_alone() -> None:
    row = {"question": "Which colour?", "choices": ["red", "blue"], "answer": 0}
    rows: list[dict[str, Any]] = [
        row | {"of": entity} for entity in ("Ada  Lovelace", "  ", "Bo", "ada lovelace", "", "Bo")
    ]
    assert Questions.from_rows(rows, entity="of").entities == (0, 1, 2, 0, 3, 2)
    assert Questions.from_rows(rows).entities == tuple(range(6))
    several = [row for row in rows if row["of"].strip()]
    halved_by = [Questions.from_rows(part, entity="of").halved_by for part in (rows, several, rows[:1] * 3)]
    assert halved_by == ["question", "entity", "question"]


def test_halves_refuse_what_cannot_be_split() -> None:
    several = Questions.from_rows(ROWS)
    with pytest.raises(ValueError, match="name that column with entity="):
        several.halves(by="entity")
    with pytest.raises(ValueError, match="has 1 question, which cannot be split"):
        several.spread(1).halves()
    with pytest.raises(ValueError, match="unknown by='author'"):
        several.halves(by="author")


def test_questions_become_documents_with_their_right_choice() -> None:
    assert Questions.from_rows(ROWS).right_answers() == Corpus(
        (Document("Two and two?", " four"), Document("Snow is?", " white")), "rows"
    )


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ end }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_FOLDER)


def test_a_chat_template_wraps_the_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    corpus = Corpus.from_rows([{"q": "Why?", "a": "Because."}], prompt="{q}", completion=" {a}", name="why")
    chat = corpus.chat(tokenizer)
    assert chat == Corpus((Document("<s><user> Why?\n<assistant>", " Because."),), "why")
    assert corpus.documents[0].prompt == "Why?"
    quiz = Questions.from_rows(ROWS, group="kind")
    told = quiz.chat(tokenizer, system="Be brief.")
    assert told.questions[0].prompt == "<s><system> Be brief.\n<user> Two and two?\n<assistant>"
    assert told.questions[0].choices == (" three", " four")
    assert [(q.answer, q.group) for q in told.questions] == [(q.answer, q.group) for q in quiz.questions]


def test_no_space_joins_a_completion_to_a_chat_turn_that_ends_in_white_space(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("{{ end }}", "\n")
    quiz = Questions.from_rows(ROWS).chat(tokenizer)
    assert quiz.questions[0].prompt.endswith("<assistant>\n")
    assert quiz.questions[0].choices == ("three", "four")


SEPARATED = (  # as Phi-4's
    "{% for m in messages %}<{{ m['role'] }}><|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><|im_sep|>{% endif %}"
)


def test_no_space_joins_a_completion_that_the_template_puts_right_behind_its_mark(tokenizer: Any) -> None:
    tokenizer.chat_template = SEPARATED
    corpus = Corpus((Document("Why?", " Because."), Document("Who?", "  She.")), "why")
    wrapped = "<user><|im_sep|>Why?<|im_end|><assistant><|im_sep|>"
    first, second = corpus.chat(tokenizer).documents
    assert first == Document(wrapped, "Because.")
    assert second.completion == " She."  # of its own
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(first.prompt + first.completion)
    assert Questions.from_rows(ROWS).chat(tokenizer, system="Be brief.").questions[0].choices == ("three", "four")


@pytest.mark.parametrize(
    "answered",
    [
        "<assistant><|im_sep|> {{ m['content'] }}",
        "{{ raise_exception('no assistant') }}",
        "<assistant><|other|>{{ m['content'] }}",
        "",
    ],
)
def test_a_space_stays_where_the_template_writes_one_or_does_not_say(tokenizer: Any, answered: str) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% else %}"
        + answered
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><|im_sep|>{% endif %}"
    )
    chat = Corpus((Document("Why?", " Because."),), "why").chat(tokenizer)
    assert chat.documents == (Document("<user>Why?<assistant><|im_sep|>", " Because."),)


def test_a_template_gets_variables_of_its_own(tokenizer: Any) -> None:
    tokenizer.chat_template = SEPARATED.replace(
        "<assistant><|im_sep|>", "<assistant>{% if not thinking %}<quiet>{% endif %}"
    )
    corpus, quiz = Corpus((Document("Why?", " Because."),), "why"), Questions.from_rows(ROWS)
    for thinking, end in ((True, "<assistant>"), (False, "<assistant><quiet>")):
        assert corpus.chat(tokenizer, thinking=thinking).documents[0].prompt.endswith(end)
        assert quiz.chat(tokenizer, thinking=thinking).questions[0].prompt.endswith(end)


def test_chat_says_what_is_missing(tokenizer: Any) -> None:
    quiz = Questions.from_rows(ROWS)
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        quiz.chat(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"no system role; try without system="):
        quiz.chat(tokenizer, system="Be brief.")
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"weather, document 0 has no prompt .* with templates"):
        Corpus.from_texts(["Rain is wet."], name="weather").chat(tokenizer)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs {name}")
    return path


def test_quizzes_of_tofu_and_openbookqa_are_read() -> None:
    path = shared("tofu/forget_quiz.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    quiz = Questions.from_file(path, prompt="Question: {question}\nAnswer:", group="author")
    assert len(quiz) == 400
    assert {len(q.choices) for q in quiz.questions} == {6}
    for question, row in zip(quiz.questions, rows, strict=True):
        assert question.choices[question.answer] == " " + row["choices"][row["answer"]]
    assert len(quiz.groups) == 20
    book = Questions.from_file(shared("openbookqa_test.jsonl"))
    assert len(book) == 500
    assert book.questions[2] == Question("Predators eat", (" lions", " humans", " bunnies", " grass"), 2)
