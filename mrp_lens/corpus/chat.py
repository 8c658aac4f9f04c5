"""Prompts in the words of a tokenizer's chat template."""

from collections.abc import Sequence
from typing import Any


def in_chat(prompt: str, completions: Sequence[str], tokenizer: Any, system: str | None) -> tuple[str, tuple[str, ...]]:
    """The prompt as a user's turn, up to where the assistant's begins, and what may follow there.

    The single space that joins a completion to its prompt is dropped where the wrapped prompt ends in white space.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses a system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template; set tokenizer.chat_template, or write the turns into prompt= as the model expects them"
        )
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        wrapped = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses these messages: {error}; try without system=, as part of the prompt"
        ) from error
    spaced = wrapped[-1:].isspace()
    return wrapped, tuple(text.removeprefix(" ") if spaced else text for text in completions)
