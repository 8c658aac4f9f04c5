"""What the theory of Adaptive RMU predicts, beside what the model does (arXiv 2408.06223)."""

from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import facets, figure_of, layer_facets, varying
from mrp_lens.plots.theme import GREY, INK, OTHERS, SYMBOLS, Axis, Look, control_dash

MEAN = "mean"
ERRORS = {True: Axis("distance (standard deviations)", "auto"), False: Axis("measured / predicted - 1")}


@figure_of("mrp_lens.metrics.noise_sensitivity", "group layer noise sensitivity low high input_ratio")
def noise_sensitivity(frame: pd.DataFrame) -> go.Figure:
    """How much the layers above change their output when noise is added at a layer, beside the noise itself in grey.

    Args:
        frame: of `mrp_lens.metrics.noise_sensitivity`: `group`, `layer`, `noise`, `sensitivity`, `low`, `high`,
            `input_ratio`. `method` and several values of `noise` make panels, `seed` faint points around a mean.
    """
    panels = Panels(
        layer_facets(frame, ["noise"]),
        x=Axis("layer", "layer"),
        y=Axis("relative squared change", "log"),
        title="Noise sensitivity of the layers above",
        bars="Bars: 95% over documents.",
        note="|g(h + noise) - g(h)|² / |g(h)|². {bars} Grey: |noise|² / |h|², what was put in.",
    )
    for panel, group, rows, colour in panels.by_group():
        panels.series(panel, rows, "layer", "sensitivity", Look(group, colour), interval=("low", "high"))
        panels.control(panel, rows, "layer", "input_ratio", f"noise put in ({group})", dash=control_dash(group))
    return panels.figure()


@figure_of("mrp_lens.metrics.predicted_coefficient", "group layer coefficient low high norm")
def predicted_coefficients(frame: pd.DataFrame) -> go.Figure:
    """The steering coefficient that Eq. 19 predicts at each layer, beside the norm of the states and u·h in grey.

    Args:
        frame: of `mrp_lens.metrics.predicted_coefficient`: `group`, `layer`, `coefficient`, `low`, `high`, `norm`, and
            `projection`, if it has that; a column `working_coefficient` adds what was found to work. `method` makes
            panels, `seed` faint points around a mean.
    """
    panels = Panels(
        layer_facets(frame, []),
        x=Axis("layer", "layer"),
        y=Axis("coefficient c (units of the stream)", "auto"),
        title="Steering coefficient predicted by Eq. 19",
        bars="Bars: 95% over documents.",
        note="{bars} Grey: mean norm of the states, and u·h, what c would be without the layers above.",
    )
    for panel, group, rows, colour in panels.by_group():
        panels.control(panel, rows, "layer", "norm", f"norm ({group})", dash=control_dash(group))
        if "projection" in rows:
            look = Look(f"u·h ({group})", GREY, control_dash(group), "circle-open")
            panels.means(panel, rows, "layer", "projection", look)
        panels.series(panel, rows, "layer", "coefficient", Look(group, colour), interval=("low", "high"))
        if "working_coefficient" in rows:
            look = Look("found to work", INK, symbol="x", mode="markers")
            panels.means(panel, rows, "layer", "working_coefficient", look)
    return panels.figure()


@figure_of("mrp_lens.metrics.proposition_1", "prompt noise statistic predicted error low high")
def theory_check(frame: pd.DataFrame) -> go.Figure:
    """How far the logits of noisy steered states are from Proposition 1, by the variance of the noise.

    Args:
        frame: of `mrp_lens.metrics.proposition_1`: `prompt`, `noise`, `statistic`, `predicted`, `error`, `low`, `high`.
            A panel for each statistic, and for `layer`, `coefficient` and `positions` where there are several; `seed`
            makes faint points around a mean. Of the mean, the grey band is what sampling alone gives.
    """
    predicted = frame["predicted"].where(frame["statistic"] != MEAN)
    frame = frame.assign(error_low=frame["low"] / predicted - 1, error_high=frame["high"] / predicted - 1)
    parts = facets(frame, ["method", *varying(frame, "layer", "coefficient", "positions"), "statistic"])
    looks = _looks(frame["prompt"])
    panels = Panels(
        [(label.replace("_", " "), part) for label, part in parts],
        x=Axis("variance of the noise", "log"),
        y=[ERRORS[part["statistic"].iloc[0] == MEAN] for _, part in parts],
        title="Logits of noisy steered states against Proposition 1",
        bars="Bars: 95%, bootstrap.",
        note="{bars} On the dashed line the proposition is exact; grey band: 95% of what sampling alone gives.",
    )
    for panel, part in panels:
        if part["statistic"].iloc[0] != MEAN:
            panels.level(panel, 0.0, name="exact")
        else:
            panels.band(panel, part, "noise", "low", "high", name="sampling alone")
        for prompt, look in looks.items():
            rows = part[part["prompt"] == prompt]
            panels.series(panel, rows, "noise", "error", look, interval=("error_low", "error_high"))
    return panels.figure()


@figure_of("mrp_lens.metrics.variance_by_coefficient", "prompt coefficient predicted measured low high norm")
def variance_by_coefficient(frame: pd.DataFrame) -> go.Figure:
    """Variance of the logits of noisy steered states against the coefficient: measured, and predicted (dashed).

    The paper argues that the variance grows with c, and does not measure it.

    Args:
        frame: of `mrp_lens.metrics.variance_by_coefficient`: `prompt`, `coefficient`, `predicted`, `measured`, `low`,
            `high`, `norm`. `layer`, `noise` and `positions` make panels where there are several; `seed` makes faint
            points around a mean.
    """
    panels = Panels(
        facets(frame, ["method", *varying(frame, "layer", "noise", "positions")]),
        x=Axis("coefficient c (units of the stream)", "log"),
        y=Axis("variance of the logits", "log"),
        title="Variance of the logits against the steering coefficient",
        bars="Bars: 95%.",
        note="Solid: measured. {bars} Dashed: predicted. Grey: mean norm of the states.",
    )
    for panel, part in panels:
        for prompt, look in _looks(frame["prompt"]).items():
            rows = part[part["prompt"] == prompt]
            panels.series(panel, rows, "coefficient", "measured", look, interval=("low", "high"))
            dashed = replace(look, dash="dash", mode="lines")
            panels.means(panel, rows, "coefficient", "predicted", dashed, legend=False)
        panels.level(panel, float(part["norm"].mean()), name="norm of the states", along="y", dash="dot")
    return panels.figure()


def _looks(prompts: pd.Series) -> dict[Any, Look]:
    """How each prompt is drawn: prompts are neither forget nor retain."""
    return {
        prompt: Look(
            prompt if isinstance(prompt, str) else f"prompt {prompt:g}",
            OTHERS[number % len(OTHERS)],
            symbol=SYMBOLS[number % len(SYMBOLS)],
        )
        for number, prompt in enumerate(prompts.unique())
    }
