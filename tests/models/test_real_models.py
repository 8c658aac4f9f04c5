"""Real checkpoints that lie beside the repository on some machines; skipped where they do not."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import export_hf
from mrp_lens.methods import RMU, AdaptiveRMU
from mrp_lens.models import load_model
from mrp_lens.models.generation import continuations
from mrp_lens.models.hooks import hook_name

pytestmark = pytest.mark.filterwarnings("ignore:.*longer than 128 tokens")  # one pair is
DATA = Path(__file__).parents[3] / "shared" / "data"


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
@pytest.mark.parametrize("name", ["stories260K", "slm4096", "tofu-mini/full"])
@pytest.mark.parametrize(("site", "form"), [("mlp_out", "folded"), ("resid_post", "module"), ("resid_post", "adapter")])
def test_real_checkpoints_leave_in_every_form(name: str, site: str, form: Any, backend: str, tmp_path: Path) -> None:
    """Proved by a reload in their own precision: two in float32, one in float16."""
    model = real(name, backend)
    layers, width = range(model.cfg.n_layers // 2, model.cfg.n_layers), model.cfg.d_model
    edit = ProjectionEdit({hook_name(layer, site): Subspace.random(4, width, seed=layer) for layer in layers})
    report = export_hf(model, edit, tmp_path / "out", form, progress=False)
    assert report.proof is not None
    assert report.proof.exact
    assert report.dtype == (torch.float16 if name == "tofu-mini/full" else torch.float32)


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
