import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import SteeringEdit
from mrp_lens.edits.subspace import random_units
from mrp_lens.metrics.activations import StateReader
from mrp_lens.metrics.alignment import alignment
from tests.conftest import D_MODEL, LAYERS
from tests.support.plain import ids_of, states_at
from tests.support.states import Subject

U = torch.linspace(-1.0, 2.0, D_MODEL)
TEXTS = {
    "forget": Corpus.from_texts(["The colour of Zaxim is red.", "The herb is", "Ask a scholar for it."], name="f"),
    "retain": Corpus.from_texts(["The old man walked slowly near the house.", "Rain"], name="r"),
}


def plain_states(model: Any, text: str, layer: int) -> torch.Tensor:
    """[tokens, d_model] of one text without BOS."""
    with torch.no_grad():
        (states,) = states_at(model, ids_of(model, text), [f"blocks.{layer}.hook_resid_post"]).values()
    return states[1:].float()


def check(model: Any, frame: pd.DataFrame, tolerance: float) -> None:
    assert list(zip(frame["group"], frame["layer"], strict=True)) == [
        (group, layer) for group in TEXTS for layer in range(LAYERS)
    ]
    null = random_units(1000, D_MODEL, "gaussian", torch.Generator().manual_seed(0))
    for row in frame.to_dict("records"):
        documents = [plain_states(model, d.completion, row["layer"]) for d in TEXTS[row["group"]].documents]
        states = torch.cat(documents)
        cosines = torch.nn.functional.cosine_similarity(states, U[None])
        norms = states.norm(dim=-1)
        assert (row["documents"], row["tokens"]) == (len(documents), len(states))
        assert row["cosine"] == pytest.approx(float(cosines.mean()), abs=tolerance)
        assert row["cosine_std"] == pytest.approx(float(cosines.std(correction=0)), abs=tolerance)
        assert row["norm"] == pytest.approx(float(norms.mean()), rel=10 * tolerance)
        assert row["norm_std"] == pytest.approx(float(norms.std(correction=0)), rel=100 * tolerance)
        of_null = torch.stack([torch.nn.functional.cosine_similarity(states, v[None]).mean() for v in null])
        assert row["null_mean"] == pytest.approx(float(of_null.mean()), abs=tolerance)
        assert row["null_std"] == pytest.approx(float(of_null.std()), abs=tolerance)
        assert row["null_low"] == pytest.approx(float(of_null.quantile(0.025)), abs=2 * tolerance)
        assert row["null_high"] == pytest.approx(float(of_null.quantile(0.975)), abs=2 * tolerance)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_alignment_equals_the_plain_calculation(subject: Subject, padding: Any) -> None:
    # bf16 keeps 8 bits: batching and padding alone move a state by about 1%
    exact = subject.relative < 1e-3
    frame = alignment(subject.model, TEXTS, 7.0 * U if exact else U.bfloat16().float(), batch_size=2, padding=padding)
    check(subject.model, frame, 1e-5 if exact else 2e-2)


def test_a_steered_model_is_aligned_and_has_norm_c(model: Any) -> None:
    with SteeringEdit.towards(U, layer=1, coefficient=9.0).applied(model):
        frame = alignment(model, TEXTS, U, layers=[0, 1]).set_index(["group", "layer"])
    for group in TEXTS:
        assert frame["cosine"][group, 1] == pytest.approx(1.0, abs=1e-5)
        assert frame["norm"][group, 1] == pytest.approx(9.0, rel=1e-5)
        assert abs(frame["cosine"][group, 0]) < 0.7


def test_the_null_is_that_of_the_law(model: Any) -> None:
    """States put onto u: an unrelated uniform direction has cosine sqrt(3)/2 with the all-ones one, a Gaussian one 0."""
    u = random_units(1, D_MODEL, "uniform", torch.Generator().manual_seed(9))[0]
    with SteeringEdit.towards(u, layer=1, coefficient=9.0).applied(model):
        uniform = alignment(model, TEXTS, u, layers=[1], law="uniform").iloc[0]
        gaussian = alignment(model, TEXTS, u, layers=[1], law="gaussian").iloc[0]
    assert uniform["null_mean"] == pytest.approx(3**0.5 / 2 * float(u.sum()) / D_MODEL**0.5, abs=0.01)
    assert gaussian["null_mean"] == pytest.approx(0.0, abs=0.02)
    assert gaussian["null_std"] == pytest.approx(D_MODEL**-0.5, rel=0.1)
    inferred = alignment(model, TEXTS, u, layers=[1])
    pd.testing.assert_frame_equal(inferred, alignment(model, TEXTS, u, layers=[1], law="uniform"))
    other = random_units(1, D_MODEL, "gaussian", torch.Generator().manual_seed(9))[0]
    inferred = alignment(model, TEXTS, other, layers=[1])
    pd.testing.assert_frame_equal(inferred, alignment(model, TEXTS, other, layers=[1], law="gaussian"))


def test_other_sites_and_a_single_corpus_can_be_read(model: Any) -> None:
    frame = alignment(model, TEXTS["forget"], U, layers=[2], site="mlp_out")
    assert list(frame["group"]) == ["f"]
    assert frame["norm"].iloc[0] != alignment(model, TEXTS["forget"], U, layers=[2])["norm"].iloc[0]


def test_an_unknown_site_is_refused(model: Any, untouched: None) -> None:
    with pytest.raises((ValueError, TypeError), match="site"):
        alignment(model, TEXTS, U, site="attn_scores")


def test_states_are_read_whatever_the_window(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and batches smaller than the corpus: every document once, its own states."""
    monkeypatch.setattr("mrp_lens.metrics.activations.WINDOW", 2)
    texts = [f"The colour of Zaxim{'i' * (n % 5)} is red." for n in range(11)]
    texts[3] = ""
    hook = "blocks.1.hook_resid_post"
    seen: dict[int, torch.Tensor] = {}
    for batch in StateReader(model, batch_size=2).read(Corpus.from_texts(texts), [hook]):
        for row in batch.rows.unique().tolist():
            assert row not in seen
            seen[row] = batch.states[hook][batch.rows == row]
    assert sorted(seen) == [n for n in range(11) if n != 3]
    for row, states in seen.items():
        torch.testing.assert_close(states, plain_states(model, texts[row], 1), atol=1e-5, rtol=1e-4)


def test_cut_documents_are_counted_once_over_all_windows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrp_lens.metrics.activations.WINDOW", 1)
    with pytest.warns(UserWarning, match="7 of 7 documents are longer than 4 tokens") as caught:
        alignment(model, Corpus.from_texts(["The old man walked slowly."] * 7), U, batch_size=2, max_length=4)
    assert len(caught) == 1


MEMORY = """
import sys, torch
from pathlib import Path
from mrp_lens.data import Corpus
from mrp_lens.metrics import alignment
from mrp_lens.models import load_model
from mrp_lens.data.world import World

torch.set_num_threads(1)
model = load_model("demo")
texts = World().training_texts()
texts = [" ".join(texts[(start + i) % len(texts)] for i in range(8)) for start in range(int(sys.argv[1]))]

def figure(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

alignment(model, Corpus.from_texts(texts[:4]), torch.ones(128), max_length=120)  # what is loaded on first use
Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
before = figure("VmRSS")
frame = alignment(model, Corpus.from_texts(texts), torch.ones(128), batch_size=64, max_length=120)
assert frame["documents"].iloc[0] == int(sys.argv[1])
print(figure("VmHWM") - before)
"""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of peak memory")
def test_memory_does_not_grow_with_the_number_of_documents() -> None:
    """Peak above the loaded model, in a process of its own whose allocator keeps nothing: 2,000 documents against 200."""

    def peak(documents: int) -> int:
        command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(documents)]
        environment = {**os.environ, **GIVE_BACK}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        return int(output.split()[-1])

    few, many = peak(200), peak(2000)
    assert many <= 1.1 * few, f"{few} kB for 200 documents, {many} kB for 2,000"
