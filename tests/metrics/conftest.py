"""A model in either precision, and its checkpoint in plain transformers."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mrp_lens.models import load_model
from tests.support.states import PRECISIONS, Subject, subject_in


@pytest.fixture(params=PRECISIONS)
def subject(request: pytest.FixtureRequest, model: Any, tiny_folder: Path, backend: str) -> Iterator[Subject]:
    """The tiny model in float32 and in bfloat16; fails unless it is left as it was."""
    yield from subject_in(request.param, model, tiny_folder, backend)


@pytest.fixture(scope="session")
def other(backend: str, tiny_folder: Path) -> Any:
    """A model of the same shape that knows other things: every parameter of the tiny one a little off."""
    changed = load_model(str(tiny_folder), backend=backend)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return changed


@pytest.fixture(scope="session")
def plain(tiny_folder: Path) -> Any:
    """The same checkpoint in plain transformers: prompt, choice -> mean log-probability, and how many tokens that is of."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    context = reference.config.max_position_embeddings
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)

    @cache
    def score(prompt: str, choice: str, bos: bool = True) -> tuple[float, int]:
        ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        # A token counts if the text up to its end is longer than the prompt.
        first = next(i for i in range(len(ids)) if len(tokenizer.decode(ids[: i + 1])) > len(prompt))
        count = len(ids) - first
        ids = ([tokenizer.bos_token_id] if bos else []) + ids[-(context - bos) :]
        with torch.no_grad():
            logs = reference(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(np.mean([logs[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))])), count

    return score
