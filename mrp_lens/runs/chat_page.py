"""The chat as a page in a browser, served to this machine alone, which asks no other machine for anything."""

from collections.abc import Callable
from html import escape
from types import ModuleType
from typing import Any

import pandas as pd

from mrp_lens.edits import most_strength
from mrp_lens.edits.provenance import label_of
from mrp_lens.models.hooks import layer_of, site_of
from mrp_lens.plots.theme import GREY, INK, LIGHT_GREEN
from mrp_lens.runs.chat import MEASURES, Answer, Chat, Switches, hook_to_show, measures_of, said_of
from mrp_lens.utils.frames import rows_of

HOST = "127.0.0.1"
NARROW = 280  # pixels; controls that have less stand below one another
SLIDER_END = 2.0  # of the strength, where none is too large
ALL, ONLY, WITHOUT = "all directions", "only direction ...", "without direction ..."
FONTS = ("system-ui", "Helvetica", "Arial", "sans-serif")  # of the machine: none is fetched
CSS = f"""
.tokens {{ line-height: 2.1; overflow-wrap: anywhere; }}
.tokens span {{ color: {INK}; padding: .2em .15em; border-radius: .2em; white-space: pre-wrap; }}
.tokens .answer {{ border-bottom: 2px solid {GREY}; }}
"""


def gradio() -> ModuleType:
    """The package that makes the page.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ImportError(
            "the page needs gradio, which is not installed; install it with: pip install 'mrp_lens[chat]'. "
            "Without --web the chat is in the terminal"
        ) from error
    return gradio


def serve(chat: Chat, *, title: str, switches: Switches | None = None, port: int | None = None) -> tuple[Any, str]:
    """Serve the page in the background.

    Args:
        chat: what answers.
        title: above the page, such as the names of the model and of the edit's folder.
        switches: how much of the edit is on at first.
        port: where; None: the first free one from 7860 on.

    Returns:
        The server, with `.close()` and `.block_thread()`, and the address.

    Raises:
        ImportError: gradio is not installed.
        OSError: the port is taken.
    """
    page = chat_page(chat, title=title, switches=switches)
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=gradio().themes.Base(primary_hue="teal", font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
    return page, str(address)


def chat_page(chat: Chat, *, title: str, switches: Switches | None = None) -> Any:
    """The page as gradio's `Blocks`, not served yet; arguments and errors as of `serve`."""
    gr = gradio()
    first = Switches() if switches is None else switches
    most = most_strength(chat.edit)
    single = ALL if first.only is first.without is None else ONLY if first.only is not None else WITHOUT
    number = first.only if first.only is not None else first.without
    with gr.Blocks(title=f"mrp-lens chat: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"## {_plain(title)}\n{_plain(label_of(chat.edit))}: each question is answered by itself.")
        question = gr.Textbox(label="Question, or the start of a text", max_lines=6, elem_id="question")
        ask = gr.Button("Answer", variant="primary", elem_id="ask")
        with gr.Row():
            with gr.Column(min_width=NARROW):
                on = gr.Checkbox(first.on, label="Apply the edit", elem_id="on")
            with gr.Column(min_width=NARROW):
                strength = gr.Slider(
                    0.0,
                    min(most, max(SLIDER_END, first.strength)),
                    value=first.strength,
                    step=0.05,
                    label="Strength (0: unedited, 1: the edit)",
                    elem_id="strength",
                )
        with gr.Row(visible=len(chat.directions) > 1):
            kinds = [ALL, ONLY, WITHOUT]
            which = gr.Radio(kinds, value=single, label="Of the projection", min_width=NARROW, elem_id="which")
            choices = [(f"{place}: {_said(direction)}", place) for place, direction in enumerate(chat.directions)]
            direction = gr.Dropdown(
                choices,
                value=(number or 0) if choices else None,
                label="Direction",
                min_width=NARROW,
                elem_id="direction",
            )
        with gr.Row():
            before = gr.Textbox(label="Unedited", lines=4, interactive=False, elem_id="before")
            after = gr.Textbox(label="With the edit", lines=4, interactive=False, elem_id="after")
        with gr.Row():
            measure = gr.Radio([], label="Colour tokens by", min_width=NARROW, elem_id="measure", visible=False)
            hook = gr.Dropdown([], label="Where", min_width=NARROW, elem_id="hook", visible=False)
        tokens = gr.HTML(elem_id="tokens")
        answer = gr.State(None)

        def asked(
            text: str, on: bool, strength: float, which: str, direction: int, measure: str | None, hook: str | None
        ) -> tuple[Any, ...]:
            if not text.strip():
                return "", "", None, gr.update(visible=False), gr.update(visible=False), ""
            only, without = (direction if which == kind else None for kind in (ONLY, WITHOUT))
            found = _or_message(lambda: chat.ask(text, Switches(on, float(strength), only, without)))
            frame = found.tokens
            if frame is None:
                note = "<p>The edit is off: nothing is moved.</p>"
                return found.before, found.after, None, gr.update(visible=False), gr.update(visible=False), note
            measures, hooks = measures_of(frame), list(dict.fromkeys(frame["hook"]))
            by = measure if measure is not None and measure in measures else measures[0]
            at = hook if hook is not None and hook in hooks else hook_to_show(frame)
            names = [(MEASURES[each][0], each) for each in measures]
            places = [(f"layer {layer_of(name)}, {site_of(name)}", name) for name in hooks]
            return (
                found.before,
                found.after,
                found,
                gr.update(choices=names, value=by, visible=True),
                gr.update(choices=places, value=at, visible=True),
                tokens_html(frame, by, at),
            )

        def coloured(found: Answer | None, measure: str, hook: str) -> str:
            return "" if found is None or found.tokens is None else tokens_html(found.tokens, measure, hook)

        given, shown = [question, on, strength, which, direction], [before, after, answer, measure, hook, tokens]
        how = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        for event in (ask.click, question.submit, on.input, which.input, direction.input):
            event(asked, [*given, measure, hook], shown, **how)
        strength.change(asked, [*given, measure, hook], shown, trigger_mode="always_last", **how)
        for chosen in (measure.input, hook.input):
            chosen(coloured, [answer, measure, hook], tokens, api_visibility="private", show_progress="hidden")
    return page


def tokens_html(frame: pd.DataFrame, measure: str, hook: str) -> str:
    """The tokens of an answer, each the greener the larger the measure is at the hook; the answer's are underlined.

    Args:
        frame: of `metrics.token_effects`.
        measure: one of `MEASURES`.
        hook: at which.
    """
    at_hook = frame[frame["hook"] == hook]
    largest = 1.0 if measure == "share" else float(at_hook[measure].max())
    name, meaning = MEASURES[measure]
    if at_hook[measure].isna().all():
        return f"<p>There is no {name} here: the edit does nothing at this place itself. Choose another.</p>"
    spans = []
    for row in rows_of(at_hook):
        value = float(row[measure])
        depth = min(value / largest, 1.0) if largest > 0.0 else 0.0
        colour = ", ".join(str(round(255 + depth * (end - 255))) for end in LIGHT_GREEN)
        token = escape(str(row["token"])).replace("\n", "&#9166;\n") or "&#9647;"
        title = escape(f"{row['token']!r}, {said_of(row)}", quote=True)
        spans.append(f'<span class="{row["part"]}" style="background: rgb({colour})" title="{title}">{token}</span>')
    scale = (
        f"{name}: {meaning}. White: 0, green: {largest:.3g}. Underlined: the answer. Point at a token for its figures."
    )
    return f'<div class="tokens">{" ".join(spans)}</div><p><small>{scale}</small></p>'


def _or_message(work: Callable[[], Answer]) -> Answer:
    """The answer; what the user did wrong is shown on the page, and is no fault of the server."""
    try:
        return work()
    except (ValueError, FloatingPointError) as error:
        raise gradio().Error(str(error), print_exception=False) from error


def _said(direction: Any) -> str:
    return f"layer {layer_of(direction.hook)} {site_of(direction.hook)}, row {direction.row} ({direction.request})"


def _plain(text: str) -> str:
    """Text in which Markdown sees no marks."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+-.!|<>" else letter for letter in text)
