"""Proposition 1 of arXiv 2408.06223 on the tiny model, against Jacobians taken one coordinate at a time."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.edits import SteeringEdit
from mrp_lens.metrics import theory
from mrp_lens.metrics.sensitivity import JacobianSize
from mrp_lens.metrics.theory import proposition_1, variance_by_coefficient
from mrp_lens.models import LensModel
from tests.conftest import D_MODEL, LAYERS
from tests.support.jacobians import (
    COEFFICIENT,
    DIRECTION,
    LAYER,
    PROMPTS,
    SMALL,
    Array,
    jacobians,
    outputs_with,
)
from tests.support.plain import ids_of


def checked(model: LensModel, **changes: Any) -> pd.DataFrame:
    """Proposition 1 of one prompt and noise, unless something else is asked for."""
    usual = {
        "prompts": PROMPTS[:1],
        "direction": DIRECTION,
        "layer": LAYER,
        "coefficient": COEFFICIENT,
        "noise": [0.01],
    }
    return proposition_1(model, **(usual | changes))  # type: ignore[call-arg]


def grown(model: LensModel, **changes: Any) -> pd.DataFrame:
    """The variance by coefficient, likewise."""
    usual = {"prompts": PROMPTS[:1], "direction": DIRECTION, "layer": LAYER, "coefficients": [1.0], "noise": 0.01}
    return variance_by_coefficient(model, **(usual | {"samples": 64} | changes))  # type: ignore[call-arg]


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "layer"), [("last", LAYER), ("all", LAYER), ("last", LAYERS - 1)])
def test_the_prediction_is_the_full_jacobians(
    model: LensModel, double: Any, positions: Any, layer: int, untouched: None
) -> None:
    how = {"layer": layer, "positions": positions, "samples": 600, "batch_size": 100}
    frame = checked(model, prompts=PROMPTS, noise=[SMALL, 2 * SMALL], **how)
    assert list(frame["statistic"]) == ["mean", "trace", "top_eigenvalue"] * 4
    unit = (DIRECTION / DIRECTION.norm()).double()
    for prompt, text in enumerate(PROMPTS):
        ids = ids_of(model, text)
        places = [len(ids) - 1] if positions == "last" else list(range(len(ids)))
        singular = np.linalg.svd(
            jacobians(double, ids, layer, places, COEFFICIENT * unit)[0], compute_uv=False
        )  # W J at c u
        for eta in (SMALL, 2 * SMALL):
            part = frame[(frame["prompt"] == prompt) & (frame["noise"] == eta)].set_index("statistic")["predicted"]
            assert part["mean"] == 0.0
            assert part["trace"] == pytest.approx(eta * (singular**2).sum(), rel=1e-3)
            assert part["top_eigenvalue"] == pytest.approx(eta * singular[0] ** 2, rel=1e-3)
        norms: list[float] = []

        def keep(states: torch.Tensor, kept: list[float] = norms) -> torch.Tensor:
            kept.append(float(states[0, -1].norm()))
            return states

        with torch.no_grad():
            outputs_with(model, ids, layer, keep)
        assert frame[frame["prompt"] == prompt]["norm"].to_numpy() == pytest.approx(norms[0], rel=1e-5)


def sampled(model: LensModel, ids: list[int], coefficient: float, noise: float, positions: str, samples: int) -> Array:
    """Logits under noise of another seed, by a hook of the test's own."""
    generator = torch.Generator().manual_seed(77)
    unit = DIRECTION / DIRECTION.norm()

    def put(states: torch.Tensor, hook: Any) -> torch.Tensor:
        steered = coefficient * unit + noise**0.5 * torch.randn(states.shape, generator=generator)
        return steered if positions == "all" else torch.cat([states[:, :-1], steered[:, -1:]], dim=1)

    point = model.hook_dict[f"blocks.{LAYER}.hook_resid_post"]
    point.add_hook(put)
    tokens = torch.tensor([ids]).repeat(samples, 1)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, attention_mask=torch.ones_like(tokens))[:, -1]
    point.fwd_hooks.pop().hook.remove()
    return logits.double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_measurement_is_that_of_other_draws(model: LensModel, positions: Any, untouched: None) -> None:
    noise = 0.05  # far from linear
    frame = checked(model, noise=[noise], positions=positions).set_index("statistic")
    ids = ids_of(model, PROMPTS[0])
    logits = sampled(model, ids, COEFFICIENT, noise, positions, 4096)
    still = sampled(model, ids, COEFFICIENT, 0.0, positions, 1)[0]
    covariance = np.cov(logits.T)
    plain = {
        "mean": np.linalg.norm(logits.mean(axis=0) - still) / np.trace(covariance) ** 0.5,
        "trace": np.trace(covariance),
        "top_eigenvalue": np.linalg.eigvalsh(covariance)[-1],
    }
    for statistic, row in frame.iterrows():
        width = float(row["high"] - row["low"])  # about four standard errors; the two samples differ by sqrt(2) of one
        assert abs(float(row["measured"]) - plain[str(statistic)]) < 1.5 * width
    assert frame["low"]["trace"] < frame["measured"]["trace"] < frame["high"]["trace"]


@pytest.mark.slow
def test_small_noise_does_what_proposition_1_says(model: LensModel, untouched: None) -> None:
    noise = [SMALL * factor for factor in (1.0, 1.25, 1.5, 1.75, 2.0)]
    frame = checked(model, prompts=PROMPTS, noise=noise, samples=1024, batch_size=256)
    assert len(frame) == 30
    assert frame["inside"].sum() >= 24  # 28 or 29 are expected of 30; fewer than 24 in one of 1,000 runs
    assert (frame["error"].abs() < 0.25).all()


@pytest.mark.slow
def test_what_proposition_1_does_not_describe_is_noticed(model: LensModel, untouched: None) -> None:
    def frame(noise: float, layer: int, coefficient: float) -> pd.DataFrame:
        settings = {"layer": layer, "coefficient": coefficient, "noise": [noise], "samples": 512}
        return checked(model, **settings).set_index("statistic")

    right = frame(SMALL, LAYER, COEFFICIENT)
    large = frame(1.0, LAYER, COEFFICIENT)
    for wrong in (frame(SMALL, LAYER + 1, COEFFICIENT), frame(SMALL, LAYER, 2 * COEFFICIENT)):
        for statistic in ("trace", "top_eigenvalue"):
            assert not right["low"][statistic] <= wrong["predicted"][statistic] <= right["high"][statistic]
    assert not large["inside"].any()
    assert large["error"]["mean"] > 0.1
    assert large["error"]["trace"] == pytest.approx(large["measured"]["trace"] / large["predicted"]["trace"] - 1)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    spectrum = torch.tensor([4.0, 1.0, 0.5, 0.25, 0.1, 0.1, 0.1, 0.1])
    hits = {"trace": 0, "top_eigenvalue": 0, "mean": 0}
    for seed in range(200):
        deviations = torch.randn(256, 8, generator=torch.Generator().manual_seed(seed)) * spectrum.sqrt()
        counts = np.random.default_rng(seed).multinomial(256, np.full(256, 1 / 256), size=theory.RESAMPLES)
        size = JacobianSize(float(spectrum.sum()), 4.0)
        logits = theory._Logits(
            (0, 0, 0.0, "last", 1.0), 1.0, size, torch.zeros(8), deviations, torch.tensor(counts / 256)
        )
        covariance = np.cov(deviations.double().numpy().T)
        assert logits.trace == pytest.approx(np.trace(covariance), rel=1e-5)
        assert logits.top_eigenvalue == pytest.approx(np.linalg.eigvalsh(covariance)[-1], rel=1e-5)
        off, traces = logits.resampled()
        low, high = theory._interval(traces)
        hits["trace"] += low <= size.squared_norm <= high
        low, high = theory._interval(2 * logits.top_eigenvalue - logits.resampled_tops())
        hits["top_eigenvalue"] += low <= size.top_eigenvalue <= high
        hits["mean"] += logits.distance <= theory._interval(off)[1]
    assert all(0.88 <= count / 200 <= 1.0 for count in hits.values()), hits


@pytest.mark.slow
def test_variance_by_coefficient_is_that_of_plain_passes(model: LensModel, untouched: None) -> None:
    coefficients = [0.5, 6.0]
    noise = 0.05
    frame = grown(model, coefficients=coefficients, noise=noise, samples=2048)
    ids = ids_of(model, PROMPTS[0])
    for coefficient, (_, row) in zip(coefficients, frame.iterrows(), strict=True):
        assert row["coefficient"] == coefficient
        logits = sampled(model, ids, coefficient, noise, "last", 2048)
        assert abs(row["measured"] - np.cov(logits.T).trace()) < 1.5 * (row["high"] - row["low"])
        largest = logits.max(axis=1)
        assert abs(row["max_logit"] - largest.mean()) < 6 * largest.std() / 2048**0.5
    alone = checked(model, coefficient=coefficients[1], noise=[noise], samples=64).set_index("statistic")
    assert frame["predicted"].iloc[1] == pytest.approx(alone["predicted"]["trace"], rel=1e-5)
    assert frame["norm"].iloc[1] == alone["norm"]["trace"]
    # The norms of the layers above divide by the length of the state, so that the tiny model damps noise as c grows.
    assert (frame["predicted"].diff()[1:] < 0).all()


@pytest.mark.slow
def test_a_seed_gives_the_same_frame_again_and_another_seed_another(model: LensModel, untouched: None) -> None:
    first, again, other = (grown(model, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert first["measured"].iloc[0] != other["measured"].iloc[0]
    assert first["predicted"].iloc[0] == pytest.approx(other["predicted"].iloc[0], rel=1e-6)  # exact, without probes


def test_a_prompt_of_one_token_is_steered_all_the_same(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    settings: dict[str, Any] = {"prompts": ["."], "coefficient": 1.0, "samples": 64}
    frames = [checked(model, positions=positions, **settings) for positions in ("last", "all")]
    assert len(model.tokenizer(".", add_special_tokens=False)["input_ids"]) == 1
    pd.testing.assert_frame_equal(frames[0].drop(columns="positions"), frames[1].drop(columns="positions"))


@pytest.mark.slow
def test_an_edit_that_is_on_the_model_stays_on_it(model: LensModel, untouched: None) -> None:
    bare = grown(model)["predicted"].iloc[0]
    with SteeringEdit.towards(torch.ones(D_MODEL), layer=LAYER + 1, coefficient=5.0, mode="add").applied(model):
        assert grown(model)["predicted"].iloc[0] != pytest.approx(bare, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": [0.1, 0.0]}, r"noise must be a variance above 0.*\[0.1, 0.0\]"),
        ({"noise": []}, "noise must be"),
        ({"noise": [float("nan")]}, "noise must be"),
        ({"coefficient": float("inf")}, "coefficient must be a finite number"),
        ({"positions": "first"}, "unknown positions 'first'; choose 'last' or 'all'"),
        ({"layer": LAYERS}, f"layer {LAYERS} is out of range"),
        ({"direction": torch.ones(5)}, "5 entries"),
        ({"direction": torch.zeros(D_MODEL)}, "non-zero"),
        ({"prompts": []}, "list of prompts"),
        ({"prompts": "The"}, "list of prompts"),
        ({"prompts": ["The", ""]}, "prompt 1 is ''"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"noise": [1e-30]}, "lost in the rounding"),
    ],
)
def test_bad_input_is_named(model: LensModel, changes: dict[str, Any], message: str, untouched: None) -> None:
    usual = {"coefficient": 1.0, "noise": [0.1], "samples": 8}
    if changes.get("positions"):  # the run-time checks of the tests would come first
        with pytest.raises(Exception, match=r"first|unknown positions"):
            checked(model, **(usual | changes))
        return
    with pytest.raises(ValueError, match=message):
        checked(model, **(usual | changes))
    if "coefficient" in changes:
        with pytest.raises(ValueError, match=message):
            grown(model, coefficients=[1.0, float("inf")], noise=0.1, samples=8)
