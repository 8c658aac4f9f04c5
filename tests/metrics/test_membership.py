"""Membership inference, against scores by hand."""

import zlib
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document
from mrp_lens.metrics.membership import _lowest, _scores, leakage
from mrp_lens.models import LensModel
from tests.support.edits import projection
from tests.support.plain import ids_of, plain_logits

MEMBERS = Corpus(
    tuple(Document("The colour of", f" Zaxim{number} is {'red and ' * (number % 3)}blue.") for number in range(5)), "m"
)
OTHERS = Corpus.from_texts(["The old man walked slowly.", "A house.", "The baker slept near the garden.", ""], name="o")
SHARE = 0.4


def slow(model: LensModel, document: Document) -> dict[str, float]:
    """Of each attack the score, one token at a time."""
    ids, start = ids_of(model, document.prompt + document.completion), len(ids_of(model, document.prompt))
    own, relative = [], []
    for at in range(start, len(ids)):
        logs = torch.tensor(plain_logits(model, ids[:at])).log_softmax(-1).numpy()
        weights = np.exp(logs)
        mean = float(np.sum(weights * logs))
        own.append(float(logs[ids[at]]))
        relative.append((own[-1] - mean) / np.sqrt(float(np.sum(weights * logs**2)) - mean**2))
    few = max(1, int(SHARE * len(own)))
    return {
        "loss": float(np.mean(own)),
        "zlib": float(np.mean(own)) / len(zlib.compress(document.completion.encode("utf-8"))),
        "min_k": float(np.mean(sorted(own)[:few])),
        "min_k++": float(np.mean(sorted(relative)[:few])),
    }


def auc(members: list[float], others: list[float]) -> float:
    return float(np.mean([(m > o) + (m == o) / 2 for m in members for o in others]))


def test_every_attack_equals_the_calculation_token_by_token(
    model: LensModel, other: LensModel, untouched: None
) -> None:
    edit = projection(1, 2)
    before = [
        [slow(model, document) for document in corpus.documents if document.completion] for corpus in (MEMBERS, OTHERS)
    ]
    with edit.applied(model):
        after = [[slow(model, d) for d in corpus.documents if d.completion] for corpus in (MEMBERS, OTHERS)]
        frame = metrics.membership(model, MEMBERS, OTHERS, share=SHARE, batch_size=2, progress=False)
    assert list(frame["attack"]) == ["loss", "zlib", "min_k", "min_k++"]
    assert "reference_auc" not in frame
    for row in frame.to_dict("records"):
        sides = [[score[row["attack"]] for score in side] for side in after]
        assert row["auc"] == pytest.approx(auc(*sides))
        assert (row["members"], row["non_members"], row["null"]) == (5, 3, 0.5)
        assert row["low"] <= row["auc"] <= row["high"]
    compared = metrics.membership(other, MEMBERS, OTHERS, share=SHARE, reference=model, progress=False)
    for row in compared.to_dict("records"):
        expected = auc(*([score[row["attack"]] for score in side] for side in before))
        assert row["reference_auc"] == pytest.approx(expected)
        assert row["privacy_leakage"] == pytest.approx(leakage(row["auc"], expected), nan_ok=True)


def test_leakage_is_muses() -> None:
    """(a - a_ref) / a_ref of a = 1 - AUC, by hand: what is known is below 0, what is pushed down above."""
    assert [leakage(auc, 0.5) for auc in (1.0, 0.5, 0.0)] == [-1.0, 0.0, 1.0]
    assert leakage(0.4, 0.2) == pytest.approx(-0.25)
    assert np.isnan(leakage(0.5, 1.0))


def test_shares_and_refusals(model: Any, untouched: None) -> None:
    assert _lowest(np.array([3.0, 1.0, 2.0]), 0.1) == 1.0
    assert _lowest(np.array([3.0, 1.0, 2.0]), 0.7) == 1.5
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            metrics.membership(model, MEMBERS, OTHERS, share=share)
    with pytest.raises(ValueError, match="no documents in 'none'"):
        metrics.membership(model, MEMBERS, Corpus((), "none"))
    one = Corpus.from_texts(["The old man walked slowly."])
    assert metrics.membership(model, MEMBERS, one, progress=False)[["low", "high"]].isna().all(axis=None)


def test_zlib_compresses_what_was_read_of_a_text_that_the_context_cuts(model: LensModel, untouched: None) -> None:
    long = " ".join(f"The old man walked slowly near house {number}." for number in range(40))
    corpus = Corpus((Document("", long), Document("", "A house."), Document("The colour of", " " + long)), "long")
    with pytest.warns(UserWarning, match="2 of 3 documents are longer than 64 tokens"):
        found = _scores(model, corpus, SHARE, 2, False)
    whole = [ids_of(model, document.prompt + document.completion)[:64] for document in corpus.documents]
    starts = [len(ids_of(model, document.prompt)) for document in corpus.documents]
    read = [model.tokenizer.decode(ids[start:]) for ids, start in zip(whole, starts, strict=True)]
    assert long.startswith(read[0].strip())
    assert 0 < len(read[0]) < len(long) / 4
    expected = found["loss"] / [len(zlib.compress(text.encode())) for text in (read[0], "A house.", read[2])]
    np.testing.assert_allclose(found["zlib"], expected, rtol=1e-12)


def test_a_token_that_cannot_follow_leaves_every_score_as_it_is(model: LensModel) -> None:
    """Its log-probability of minus infinity has no part in mean and spread over the vocabulary."""
    scores = []
    for least in (-1e4, -torch.inf):
        hook = model.unembed.register_forward_hook(lambda _, given, logits, least=least: _ruled_out(logits, least))
        with hook, torch.no_grad():
            scores.append(_scores(model, MEMBERS, SHARE, 8, False))
    for attack, own in scores[1].items():
        assert np.isfinite(own).all(), attack
        assert own == pytest.approx(scores[0][attack], rel=1e-5), attack


def _ruled_out(logits: torch.Tensor, least: float) -> torch.Tensor:
    changed = logits.clone()
    changed[..., 3] = least
    return changed
