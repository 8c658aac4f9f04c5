"""Real checkpoints that lie beside the repository on some machines; skipped where they do not."""

import re
from pathlib import Path
from typing import Any

import pytest

from mrp_lens import metrics
from mrp_lens.corpus import Corpus
from mrp_lens.generation import continuations
from mrp_lens.methods import RMU, AdaptiveRMU
from mrp_lens.model import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*longer than 128 tokens")  # one pair is
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def real(name: str, backend: str) -> Any:
    if not (DATA / name).is_dir():
        pytest.skip(f"needs {name}")
    return load_model(DATA / name, backend=backend)


def test_a_llama_with_grouped_query_attention_writes_its_stories(backend: str) -> None:
    model = real("stories260K", backend)
    (story,) = continuations(model, ["Once upon a time, there was a little"], max_new_tokens=12)
    assert re.match(r"(girl|boy) named \w+", story)


def test_a_character_model_says_what_it_knows_by_heart(backend: str) -> None:
    model = real("slm4096", backend)
    known = metrics.answer_probability(model, Corpus((*halves()[0].documents, *halves()[1].documents)))
    assert known["probability"].iloc[0] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("method", [RMU(), AdaptiveRMU()], ids=lambda m: m.name)
def test_a_character_model_forgets_half_of_what_it_knows_by_heart(method: Any, backend: str) -> None:
    model = real("slm4096", backend)
    forget, retain = halves()
    before = metrics.answer_probability(model, retain)["probability"].iloc[0]
    with method.fit(model, forget, retain, seed=0, progress=False).edit.applied(model):
        assert metrics.answer_probability(model, forget)["probability"].iloc[0] < 0.1
        assert metrics.answer_probability(model, retain)["probability"].iloc[0] > before - 0.03


def halves() -> tuple[Corpus, Corpus]:
    """Every second of the 38 question/answer pairs that the character model was trained on."""
    pairs = re.findall(r"Q: (.*)\nA: (.*)", (DATA / "slm4096" / "corpus.txt").read_text(encoding="utf-8"))
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    forget, retain = (
        Corpus.from_rows(part, prompt="Q: {question}\nA:", completion=" {answer}", name=name)
        for part, name in ((rows[::2], "forget"), (rows[1::2], "retain"))
    )
    return forget, retain
