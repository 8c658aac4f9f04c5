"""`mrp-lens chat`: a model beside the same model with an edit on, in the terminal or on a page."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from mrp_lens.cli.command import Command, ModelOptions
from mrp_lens.cli.console import Column, console, show_examples, show_table, three_digits
from mrp_lens.edits import load_edit
from mrp_lens.models.hooks import layer_of, site_of
from mrp_lens.runs.chat import MEASURES, Answer, Chat, Switches, hook_to_show
from mrp_lens.runs.chat_page import gradio, serve
from mrp_lens.utils.frames import rows_of

BAR = 20  # characters
WORDS = """/edit on|off    apply the edit, or not
/strength X     how much of it: 0 is the unedited model, 1 the edit
/directions     the single directions that its projection removes, numbered
/only N         remove direction N alone
/without N      remove all directions but N
/all            remove all directions again
/tokens [LAYER] what the edit did to each token of the last answer
/quit           stop
Anything else is a question. Each is answered by itself, without those before it."""


@dataclass(frozen=True, kw_only=True)
class ChatWithEdit(Command):
    """Ask a model, and the same model with an edit on, side by side, in the terminal or on a page.

    The edit can be switched, weakened and taken apart, and what it does to each token is shown.

    With --prompt it answers and ends. Without, it asks for questions until /quit; /help lists what else it takes. Questions
    may also be piped in, one a line. With --web the same is a page in a browser, served to this machine alone.

    Examples:

        mrp-lens chat --edit runs/demo/mrp/edit --prompt "The colour of"

        mrp-lens chat --model ./my-checkpoint --edit runs/mine/edit --strength 0.5 --tokens --prompt "Who wrote it?"

        mrp-lens chat --model ./my-checkpoint --edit runs/mine/edit --chat-template --web

    Attributes:
        edit: Folder of an edit, such as `runs/demo/mrp/edit`.
        prompt: What both go on from; may be given several times.
        tokens: Show after each answer what the edit does to each token.
        apply: Start with the edit on; --no-apply: with it off.
        strength: How much of the edit is on: 0 is the unedited model, 1 the edit; beyond 1 where it adds to states or writes
            weights.
        only: Remove this direction of the projection alone, by its number (from 0); `/directions` lists them.
        without: Remove all directions but this one.
        max_new_tokens: Of an answer, at most.
        temperature: Of the sampling; 0: greedy.
        seed: Of the sampling.
        question_prompt: Template of a question, such as `Question: {question}\\nAnswer:`. Default: as it is typed.
        chat_template: Make each question a turn of the tokenizer's chat template.
        system: `--chat-template`: a system message before it.
        web: Serve a page in place of the terminal. Needs `pip install 'mrp_lens[chat]'`.
        port: `--web`: where. Default: the first free one from 7860 on.
    """

    word: ClassVar[str] = "chat"

    loading: ModelOptions
    edit: Path
    prompt: tuple[str, ...] = ()
    tokens: bool = False
    apply: bool = True
    strength: float = 1.0
    only: int | None = None
    without: int | None = None
    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    question_prompt: str | None = None
    chat_template: bool = False
    system: str | None = None
    web: bool = False
    port: int | None = None

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        return {"loading": ModelOptions}

    @override
    def execute(self) -> list[Answer]:
        if self.web:
            if self.prompt or self.tokens:
                raise ValueError(
                    "--prompt and --tokens are for the terminal; leave out --web, or type the question there"
                )
            gradio()  # a missing one should not wait for the model
        edit, loading = load_edit(self.edit), self.loading.of_edit(self.edit)
        template = self.question_prompt
        chat = Chat(
            loading.load(),
            edit,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            question_prompt=None if template is None else template.replace("\\n", "\n"),
            chat_template=self.chat_template,
            system=self.system,
        )
        switches = Switches(self.apply, self.strength, self.only, self.without)
        chat.chosen(switches)  # a strength that the edit cannot have should not wait for a question
        if self.web:
            page, address = serve(chat, title=f"{loading.name} with {self.edit}", switches=switches, port=self.port)
            console.print(f"Open {address} in a browser; Ctrl-C stops it.")
            page.block_thread()
            return []
        terminal = Terminal(chat, switches, tokens=self.tokens)
        for question in self.prompt:
            terminal.ask(question)
        if not self.prompt:
            terminal.run(lines(), strict=not sys.stdin.isatty())
        return terminal.answers


class Terminal:
    """Questions and words of command, and what they print.

    Args:
        chat: what answers.
        switches: how much of the edit is on at first.
        tokens: show the tokens after each answer.
    """

    def __init__(self, chat: Chat, switches: Switches, *, tokens: bool) -> None:
        self.chat, self.switches, self.tokens = chat, switches, tokens
        self.answers: list[Answer] = []

    def run(self, typed: Iterator[str], *, strict: bool) -> None:
        """Do what each line says, up to /quit or the end.

        Args:
            typed: lines.
            strict: end with an error at a line that makes no sense; otherwise it is printed, and the next one is read.
        """
        for line in typed:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.do(line)
            except (ValueError, FloatingPointError) as error:
                if strict:
                    raise
                console.print(str(error))

    def do(self, line: str) -> None:
        """One line.

        Raises:
            ValueError: a word of command that there is not, or with a value that makes no sense.
        """
        word, _, value = line.strip().partition(" ")
        value = value.strip()
        if not word:
            return
        if not word.startswith("/"):
            self.ask(line)
        elif word == "/help":
            console.print(WORDS)
        elif word == "/tokens":
            self.show_tokens(None if not value else int(number(word, value, whole=True)))
        elif word == "/directions":
            self.show_directions()
        else:
            switches = self.switched(word, value)
            self.chat.chosen(switches)
            self.switches = switches
            console.print(f"Now: {said(switches)}")

    def switched(self, word: str, value: str) -> Switches:
        """The switches after such a word."""
        if word == "/edit":
            if value not in ("on", "off"):
                raise ValueError(f"/edit takes on or off, got {value!r}")
            return replace(self.switches, on=value == "on")
        if word == "/strength":
            return replace(self.switches, strength=number(word, value))
        if word == "/all":
            return replace(self.switches, only=None, without=None)
        if word in ("/only", "/without"):
            chosen = int(number(word, value, whole=True))
            only, without = (chosen if word == name else None for name in ("/only", "/without"))
            return replace(self.switches, only=only, without=without)
        raise ValueError(f"no word {word!r}; /help lists those there are")

    def ask(self, question: str) -> None:
        """Print what both say."""
        answer = self.chat.ask(question, self.switches)
        self.answers.append(answer)
        row = {"question": question, "unedited": answer.before}
        show_examples([row | {said(self.switches): answer.after} if self.switches.on else row])
        if self.tokens and self.switches.on:
            self.show_tokens(None)

    def show_tokens(self, layer: int | None) -> None:
        """Print what the edit did to each token of the last answer: at the first of its hooks in a layer, or where it did most."""
        frame = self.answers[-1].tokens if self.answers else None
        if frame is None:
            raise ValueError("there is no answer with the edit on yet; ask something, with /edit on")
        hooks = [str(hook) for hook in dict.fromkeys(frame["hook"]) if layer is None or layer_of(hook) == layer]
        if not hooks:
            raise ValueError(f"no layer {layer}; there are 0 to {int(frame['layer'].max())}")
        hook = hook_to_show(frame if layer is None else frame[frame["layer"] == layer])
        rows = rows_of(frame[frame["hook"] == hook])
        largest = max(float(row["displacement"]) for row in rows)
        columns: list[Column] = [
            ("token", lambda row: repr(str(row["token"]))),
            ("part", lambda row: str(row["part"])),
            *((name, three_digits(measure)) for measure, (name, _) in MEASURES.items()),
            ("", lambda row: bar(row["displacement"] / largest if largest > 0.0 else 0.0)),
        ]
        caption = "\n".join(f"{name}: {meaning}" for name, meaning in MEASURES.values())
        show_table(f"Tokens at layer {layer_of(hook)}, {site_of(hook)}", columns, rows, caption=caption)

    def show_directions(self) -> None:
        """Print the directions, numbered."""
        columns: list[Column] = [
            ("number", lambda row: str(row["number"])),
            ("request", lambda row: str(row["request"])),
            ("hook", lambda row: str(row["hook"])),
            ("row", lambda row: str(row["row"])),
        ]
        rows = [{"number": number} | each._asdict() for number, each in enumerate(self.chat.directions)]
        show_table("What the projection removes" if rows else "The edit projects nothing", columns, rows)


def lines() -> Iterator[str]:
    """What is typed, or piped in."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    console.print("Ask something; /help lists what else there is, /quit stops.")
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def said(switches: Switches) -> str:
    """How much of the edit is on, in words."""
    if not switches.on:
        return "edit off"
    parts = [
        f"strength {switches.strength:g}" if switches.strength != 1.0 else "",
        f"only direction {switches.only}" if switches.only is not None else "",
        f"without direction {switches.without}" if switches.without is not None else "",
    ]
    return ", ".join(["with the edit", *filter(None, parts)])


def number(word: str, value: str, *, whole: bool = False) -> float:
    """The number behind a word.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(value) if whole else float(value)
    except ValueError as error:
        raise ValueError(f"{word} takes a {'whole ' * whole}number, got {value!r}") from error


def bar(share: float) -> str:
    """A bar of so much of its length, which begins at the left."""
    return ("█" * round(BAR * share)).ljust(BAR)
