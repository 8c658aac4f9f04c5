"""A Hugging Face model as lm-evaluation-harness sees it: texts start as in `mrp_lens.metrics`, and the model stays as it is.

Imports the harness, which is optional: import this inside functions.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

from mrp_lens.harness import Bos

# Where TransformerLens's `cfg.default_prepend_bos` is False; a model class of an export inherits from one of its base.
WITHOUT_BOS = frozenset(
    "BloomForCausalLM GPTNeoXForCausalLM GraniteForCausalLM MptForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM "
    "SmolLM3ForCausalLM Starcoder2ForCausalLM".split()
)


def prepends_bos(model: Any, tokenizer: Any) -> bool:
    """Whether `mrp_lens.metrics` starts a text with BOS on this model."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return tokenizer.bos_token_id is not None and not kinds & WITHOUT_BOS


class HarnessModel(HFLM):  # type: ignore[misc]
    """The harness's class for Hugging Face models, with a say over BOS.

    The harness's own `add_bos_token=True` leaves BOS to the tokenizer, and does nothing where that adds none.

    Args:
        model: the Hugging Face model.
        tokenizer: its tokenizer, of which a copy is used: the harness may set a padding token.
        batch_size: texts in a pass.
        bos: "metrics" or "tokenizer", as in `mrp_lens.harness.harness`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, bos: Bos) -> None:
        own = copy.deepcopy(tokenizer)
        with _quiet(HFLM.__module__):  # it warns that the model is a model, and not the name of one
            super().__init__(model, tokenizer=own, backend="causal", batch_size=batch_size, softmax_dtype="float32")
        self.own_bos = bos == "metrics"
        self.start = [own.bos_token_id] if self.own_bos and prepends_bos(model, own) else []

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text; of one that is too long (`left_truncate_len`) BOS and the end."""
        if not self.own_bos:
            return super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
        start = self.start if add_special_tokens is not False else []
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        ids = ids[1:] if start and ids[:1] == start else ids  # a chat template's BOS is as good as ours
        room = options.get("left_truncate_len")
        return start + (ids[max(0, len(ids) + len(start) - room) :] if room else ids)

    def tok_batch_encode(self, strings: list[str], padding_side: str = "left", **options: Any) -> Any:
        """Token ids and attention mask of a batch that generation starts from."""
        if not self.own_bos:
            return super().tok_batch_encode(strings, padding_side=padding_side, **options)
        rows = [self.tok_encode(string, left_truncate_len=options.get("left_truncate_len")) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger that reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def mode_kept(model: Any) -> Iterator[None]:
    """The harness puts a model into evaluation mode, and ties its unembedding to the embedding again."""
    modes = [(module, module.training) for module in model.modules()]
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
        for module, training in modes:
            module.training = training
