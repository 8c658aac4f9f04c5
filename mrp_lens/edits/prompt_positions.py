"""`generate` on a model that is steered at positions: they count in the prompt, whether there is a cache or not."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from mrp_lens.edits.exported_hooks import Prompt
from mrp_lens.models.attachments import anchor_of

COUNT = "_mrp_lens_prompts"
METHODS = ("generate", "hf_generate", "generate_stream")


@dataclass(eq=False)
class CountedPrompts:
    """Stands for one edit that needs the prompt's length; the last one to go brings the model's own methods back."""

    model: Any

    def present(self) -> bool:
        """Whether the methods are still replaced."""
        return COUNT in vars(self.model)

    def remove(self) -> bool:
        """Take it off; False if somebody else had done so before."""
        if not self.present():
            return False
        vars(self.model)[COUNT] -= 1
        if vars(self.model)[COUNT] == 0:
            for name in (COUNT, *METHODS):
                vars(self.model).pop(name, None)
        return True


def count_in_prompts(model: Any) -> list[CountedPrompts]:
    """Make the model's `generate` say what its prompt is: its first pass, however the others are run. On a TransformerBridge
    that of the Hugging Face model inside does, too."""
    models = {id(one): one for one in (model, anchor_of(model))}.values()
    for one in models:
        if not vars(one).get(COUNT):
            for name in METHODS:
                method = getattr(type(one), name, None)
                if method is not None:
                    vars(one)[name] = MethodType(_with_prompt(method), one)  # a copy's is bound to the copy
        vars(one)[COUNT] = vars(one).get(COUNT, 0) + 1
    return [CountedPrompts(one) for one in models]


def _with_prompt(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        with Prompt(kwargs):
            return method(model, *args, **kwargs)

    @functools.wraps(method)
    def stream(model: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        prompt, items, end = Prompt(kwargs), method(model, *args, **kwargs), object()
        while True:
            with prompt:  # not across the yield, where the caller may run other passes
                item = next(items, end)
            if item is end:
                return
            yield item

    return stream if inspect.isgeneratorfunction(inspect.unwrap(method)) else generate
