from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.models import LensModel
from mrp_lens.training.losses import kl
from tests.support.edits import all_kinds, projection, weight_edit
from tests.support.plain import ids_of, plain_logits

CORPUS = Corpus.from_rows(
    [{"p": "The old", "c": " man walked slowly."}, {"p": "", "c": "The sage."}, {"p": "A", "c": " house."}],
    prompt="{p}",
    completion="{c}",
    name="three",
)


def slow(model: LensModel, prompt: str, completion: str) -> list[np.ndarray[Any, Any]]:
    """Probabilities before each token of the completion, one token at a time."""
    ids, start = ids_of(model, prompt + completion), len(ids_of(model, prompt))
    return [torch.tensor(plain_logits(model, ids[:at])).double().softmax(-1).numpy() for at in range(start, len(ids))]


def test_damage_is_the_divergence_a_token_of_plain_predictions(model: LensModel, untouched: None) -> None:
    for edit in all_kinds(model, 2)[::2]:
        before = [slow(model, d.prompt, d.completion) for d in CORPUS.documents]
        with edit.applied(model):
            after = [slow(model, d.prompt, d.completion) for d in CORPUS.documents]
        of_documents = [
            [float(np.sum(p * np.log(p / q))) for p, q in zip(*pair, strict=True)]
            for pair in zip(before, after, strict=True)
        ]
        flat = [value for document in of_documents for value in document]
        row = metrics.damage(model, edit, CORPUS, batch_size=2, progress=False).iloc[0]
        assert row["damage"] == pytest.approx(np.mean(flat), rel=1e-3)
        assert (row["documents"], row["tokens"]) == (3, len(flat))
        assert row["low"] <= row["damage"] <= row["high"]
        entropies = [float(-np.sum(p * np.log(p))) for document in before for p in document]
        assert row["uniform"] == pytest.approx(np.log(model.cfg.d_vocab) - np.mean(entropies), rel=1e-4)
        assert metrics.value(metrics.damage(model, edit, CORPUS, progress=False)) == pytest.approx(
            row["damage"], rel=1e-3
        )


def test_an_edit_that_changes_nothing_does_no_damage(model: LensModel, untouched: None) -> None:
    assert metrics.value(metrics.damage(model, weight_edit(model, 1, scale=1.0), CORPUS)) == 0.0


def test_what_is_ruled_out_before_counts_nothing_and_what_is_ruled_out_after_is_infinite() -> None:
    before = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert float(kl(before, torch.tensor([[0.25, 0.25, 0.5]]).log())) == pytest.approx(np.log(2))
    assert float(kl(before, before)) == 0.0
    assert float(kl(before, torch.tensor([[1.0, 0.0, 0.0]]).log())) == np.inf


def test_an_infinite_damage_and_empty_texts_are_refused(
    model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = projection(1)
    with pytest.raises(ValueError, match="no documents in 'none'"):
        metrics.damage(model, edit, Corpus((), "none"))
    with pytest.raises(ValueError, match="'blank' holds no token to predict"):
        metrics.damage(model, edit, Corpus.from_texts([""], name="blank"))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        metrics.damage(model, edit, CORPUS, batch_size=0)
    monkeypatch.setattr(
        import_module("mrp_lens.metrics.damage"), "kl", lambda before, after: before.sum(-1) * torch.inf
    )
    with pytest.raises(ValueError, match="the damage on 'three' is infinite"):
        metrics.damage(model, edit, CORPUS)
