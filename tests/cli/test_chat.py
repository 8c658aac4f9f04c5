"""`mrp-lens chat`: the answers that it prints, its words of command, pipes, and what it refuses."""

import io
import sys
from pathlib import Path

import pytest

import mrp_lens as ml
from mrp_lens.cli.app import run
from mrp_lens.runs.chat import Answer, Chat, Switches
from tests.support.commands import Result, completed, invoke
from tests.support.edits import conditional, projection

PROMPT = "The colour of Zaxim is"
EDIT = conditional(1, 2, rank=20)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def chat_words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    EDIT.save_pretrained(tmp_path / "edit")
    return ["chat", "--model", str(tiny_folder), "--edit", str(tmp_path / "edit"), "--max-new-tokens", "5"]


def answers(tiny_folder: Path, *switches: Switches) -> list[tuple[str, str]]:
    chat = Chat(ml.load_model(str(tiny_folder)), EDIT, max_new_tokens=5)
    found = [chat.ask(PROMPT, each) for each in switches]
    return [(answer.before, answer.after) for answer in found]


def piped(monkeypatch: pytest.MonkeyPatch, words: list[str], *lines: str) -> Result:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return invoke(*words)


def test_a_prompt_is_answered_with_and_without_the_edit(chat_words: list[str], tiny_folder: Path) -> None:
    ((before, after), (_, half)) = answers(tiny_folder, Switches(), Switches(strength=0.5))
    said = completed(*chat_words, "--prompt", PROMPT).said
    for part in (PROMPT, "unedited", "with the edit", before, after):
        assert part in said
    said = completed(*chat_words, "--prompt", PROMPT, "--prompt", "Another, one", "--strength", "0.5", "--tokens").said
    for part in (half, "with the edit, strength 0.5", "Another, one", "own step", "displacement", "gate", "' Z'"):
        assert part in said


def test_questions_and_words_may_be_piped_in(
    chat_words: list[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = piped(
        monkeypatch,
        chat_words,
        *(
            PROMPT,
            "",
            "/tokens 3",
            "/tokens",
            "/strength 0",
            PROMPT,
            "/only 2",
            "/without 2",
            "/all",
            "/edit off",
            PROMPT,
        ),
        *("/directions", " /help", "/edit on", "/quit ", "/nonsense"),
    )
    assert result.exit_code == 0, result.exception
    for part in (
        "Tokens at layer 3, resid_post",
        "Now: with the edit, strength 0",
        "strength 0, only direction 2",
        "strength 0, without direction 2",
        "Now: edit off",
        "blocks.2.hook_resid_post",
        "/strength X",
    ):
        assert part in result.said, part
    before, after = answers(tiny_folder, Switches())[0]
    assert before in result.said
    assert after in result.said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nonsense", "no word '/nonsense'; /help lists"),
        ("/edit", "/edit takes on or off, got ''"),
        ("/strength x", "/strength takes a number, got 'x'"),
        ("/strength 2", "strength must be a number from 0 to 1"),
        ("/only 0.5", "/only takes a whole number, got '0.5'"),
        ("/only 40", "no direction 40; this edit has 0 to 39"),
        ("/tokens", "there is no answer with the edit on yet"),
    ],
)
def test_a_wrong_line_ends_a_pipe_and_not_a_talk(
    chat_words: list[str], monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    result = piped(monkeypatch, chat_words, line, PROMPT)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    typed = iter([line, "/strength 0.5"])

    def ask(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = completed(*chat_words).said
    assert message in said
    assert "Now: with the edit, strength 0.5" in said


def test_what_a_model_writes_is_no_markup(chat_words: list[str]) -> None:
    assert "[/b] [red]x" in completed(*chat_words, "--prompt", "[/b] [red]x", "--tokens").said


def test_a_question_may_stand_in_a_template(chat_words: list[str]) -> None:
    (answer,) = completed_answers(chat_words, "--question-prompt", "Q: {question}\\nA:", "--prompt", "Why?")
    assert answer.prompt == "Q: Why?\nA:"


def completed_answers(words: list[str], *extra: str) -> list[Answer]:
    found: list[Answer] = run([*words, *extra])
    return found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--strength", "2"], "strength must be a number from 0 to 1"),
        (["--only", "1", "--without", "2"], "not both"),
        (["--system", "Be brief."], "a system message is part of a chat template"),
        (["--chat-template"], "this tokenizer has no chat template"),
        (["--question-prompt", "Q:"], "must say where the question stands"),
        (["--web", "--prompt", "x"], "--prompt and --tokens are for the terminal"),
        (["--temperature", "-1", "--prompt", "x"], "temperature must be a number from 0"),
    ],
)
def test_bad_options_are_refused(chat_words: list[str], extra: list[str], message: str) -> None:
    result = invoke(*chat_words, *extra)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_an_edit_of_another_model_is_refused(chat_words: list[str], tmp_path: Path) -> None:
    projection(9).save_pretrained(tmp_path / "other")
    result = invoke(*chat_words, "--edit", str(tmp_path / "other"), "--prompt", PROMPT)
    assert isinstance(result.exception, ValueError)
    assert "this model has no hook" in str(result.exception)


def test_without_gradio_the_page_names_its_extra_before_a_model_is_loaded(
    chat_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("mrp_lens.cli.command.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    result = invoke(*chat_words, "--web")
    assert isinstance(result.exception, ImportError)
    assert "pip install 'mrp_lens[chat]'" in str(result.exception)
