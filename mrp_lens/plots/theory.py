"""What the theory of Adaptive RMU predicts, beside what the model does (arXiv 2408.06223)."""

from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels, by_group
from mrp_lens.plots.frames import Frame, facets, layer_facets, tidy, varying
from mrp_lens.plots.registry import register
from mrp_lens.plots.theme import GREY, INK, OTHERS, SYMBOLS, Axis, Look, control_dash

MEAN = "mean"
ERRORS = {True: Axis("distance (standard deviations)", "auto"), False: Axis("measured / predicted - 1")}


@register("noise_sensitivity")
def noise_sensitivity(frame: Frame) -> go.Figure:
    """How much the layers above change their output when noise is added at a layer, beside the noise itself in grey.

    Args:
        frame: of `mrp_lens.metrics.noise_sensitivity`: `group`, `layer`, `noise`, `sensitivity`, `low`, `high`,
            `input_ratio`. `method` and several values of `noise` make panels, `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    picture = "noise_sensitivity"
    columns = ["group", "layer", "noise", "sensitivity", "low", "high", "input_ratio"]
    table = tidy(frame, columns, picture=picture, metric="mrp_lens.metrics.noise_sensitivity")

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        panels.series(panel, rows, "layer", "sensitivity", Look(group, colour), interval=("low", "high"))
        panels.control(panel, rows, "layer", "input_ratio", f"noise put in ({group})", dash=control_dash(group))

    return by_group(
        layer_facets(table, ["noise"]),
        draw,
        x=Axis("layer", "layer"),
        y=Axis("relative squared change", "log"),
        title="Noise sensitivity of the layers above",
        note="|g(h + noise) - g(h)|² / |g(h)|², bars: 95% over documents. Grey: |noise|² / |h|², what was put in.",
        picture=picture,
    )


@register("predicted_coefficients")
def predicted_coefficients(frame: Frame) -> go.Figure:
    """The steering coefficient that Eq. 19 predicts at each layer, beside the norm of the states and u·h in grey.

    Args:
        frame: of `mrp_lens.metrics.predicted_coefficient`: `group`, `layer`, `coefficient`, `low`, `high`, `norm`, and
            `projection`, if it has that; a column `working_coefficient` adds what was found to work. `method` makes
            panels, `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    columns = ["group", "layer", "coefficient", "low", "high", "norm"]
    metric = "mrp_lens.metrics.predicted_coefficient"
    table = tidy(frame, columns, picture="predicted_coefficients", metric=metric)

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        panels.control(panel, rows, "layer", "norm", f"norm ({group})", dash=control_dash(group))
        if "projection" in rows:
            alone = rows.groupby("layer")["projection"].mean()
            look = Look(f"u·h ({group})", GREY, control_dash(group), "circle-open")
            panels.points(panel, alone.index, alone, look)
        panels.series(panel, rows, "layer", "coefficient", Look(group, colour), interval=("low", "high"))
        if "working_coefficient" in rows:
            works = rows.groupby("layer")["working_coefficient"].mean()
            panels.points(panel, works.index, works, Look("found to work", INK, symbol="x", mode="markers"))

    return by_group(
        layer_facets(table, []),
        draw,
        x=Axis("layer", "layer"),
        y=Axis("coefficient c (units of the stream)", "auto"),
        title="Steering coefficient predicted by Eq. 19",
        note="Bars: 95% over documents. Grey: mean norm of the states, and u·h, what c would be without the layers above.",
        picture="predicted_coefficients",
    )


@register("theory_check")
def theory_check(frame: Frame) -> go.Figure:
    """How far the logits of noisy steered states are from Proposition 1, by the variance of the noise.

    Args:
        frame: of `mrp_lens.metrics.proposition_1`: `prompt`, `noise`, `statistic`, `predicted`, `error`, `low`, `high`.
            A panel for each statistic, and for `layer`, `coefficient` and `positions` where there are several; `seed`
            makes faint points around a mean. Of the mean, the grey band is what sampling alone gives.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    columns = ["prompt", "noise", "statistic", "predicted", "error", "low", "high"]
    table = tidy(frame, columns, picture="theory_check", metric="mrp_lens.metrics.proposition_1")
    predicted = table["predicted"].where(table["statistic"] != MEAN)
    table = table.assign(error_low=table["low"] / predicted - 1, error_high=table["high"] / predicted - 1)
    parts = facets(table, ["method", *varying(table, "layer", "coefficient", "positions"), "statistic"])
    looks = _looks(table["prompt"])
    panels = Panels(
        [label.replace("_", " ") for label, _ in parts],
        x=Axis("variance of the noise", "log"),
        y=[ERRORS[part["statistic"].iloc[0] == MEAN] for _, part in parts],
        title="Logits of noisy steered states against Proposition 1",
        note="Bars: 95%, bootstrap. On the dashed line the proposition is exact; grey band: 95% of what sampling alone gives.",
        picture="theory_check",
    )
    for panel, (_, part) in enumerate(parts):
        if part["statistic"].iloc[0] != MEAN:
            panels.level(panel, 0.0, name="exact")
        else:
            sampling = part.groupby("noise")[["low", "high"]].mean()
            panels.band(panel, sampling.index, sampling["low"], sampling["high"], name="sampling alone")
        for prompt, look in looks.items():
            rows = part[part["prompt"] == prompt]
            panels.series(panel, rows, "noise", "error", look, interval=("error_low", "error_high"))
    return panels.figure()


@register("variance_by_coefficient")
def variance_by_coefficient(frame: Frame) -> go.Figure:
    """Variance of the logits of noisy steered states against the coefficient: measured, and predicted (dashed).

    The paper argues that the variance grows with c, and does not measure it.

    Args:
        frame: of `mrp_lens.metrics.variance_by_coefficient`: `prompt`, `coefficient`, `predicted`, `measured`, `low`,
            `high`, `norm`. `layer`, `noise` and `positions` make panels where there are several; `seed` makes faint
            points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    columns = ["prompt", "coefficient", "predicted", "measured", "low", "high", "norm"]
    metric = "mrp_lens.metrics.variance_by_coefficient"
    table = tidy(frame, columns, picture="variance_by_coefficient", metric=metric)
    parts = facets(table, ["method", *varying(table, "layer", "noise", "positions")])
    looks = _looks(table["prompt"])
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("coefficient c (units of the stream)", "log"),
        y=Axis("variance of the logits", "log"),
        title="Variance of the logits against the steering coefficient",
        note="Solid: measured, bars: 95%. Dashed: predicted. Grey: mean norm of the states.",
        picture="variance_by_coefficient",
    )
    for panel, (_, part) in enumerate(parts):
        for prompt, look in looks.items():
            rows = part[part["prompt"] == prompt]
            panels.series(panel, rows, "coefficient", "measured", look, interval=("low", "high"))
            predicted = rows.groupby("coefficient")["predicted"].mean()
            panels.points(panel, predicted.index, predicted, replace(look, dash="dash", mode="lines"), legend=False)
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
