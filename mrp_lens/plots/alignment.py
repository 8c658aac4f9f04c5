"""Do states point along the steering direction, and how long are they? Against the layer and the coefficient."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels, by_group
from mrp_lens.plots.frames import Frame, facets, known, layer_facets, tidy
from mrp_lens.plots.registry import register
from mrp_lens.plots.theme import Axis, Look, control_dash

METRIC = "mrp_lens.metrics.alignment"
COLUMNS = ("group", "layer", "cosine", "low", "high", "null_mean", "null_low", "null_high")
COSINE = Axis("mean cosine with u")


@register("alignment_by_layer")
def alignment_by_layer(frame: Frame) -> go.Figure:
    """Cosine of the states with the direction u at each layer, beside that of unrelated directions in grey.

    Args:
        frame: of `mrp_lens.metrics.alignment`: `group`, `layer`, `cosine`, `low`, `high`, `null_mean`, `null_low`,
            `null_high`. If it has them, `method` and `coefficient` make panels and `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    table = tidy(frame, COLUMNS, picture="alignment_by_layer", metric=METRIC)

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        _draw_null(panels, panel, group, rows, "layer")
        panels.series(panel, rows, "layer", "cosine", Look(group, colour), interval=("low", "high"))

    return by_group(
        layer_facets(table),
        draw,
        x=Axis("layer", "layer"),
        y=COSINE,
        title="Alignment of the states with the direction u",
        note="Bars: 95% over documents. Grey: unrelated directions drawn by the same law, their mean and 95% of them.",
        picture="alignment_by_layer",
    )


@register("alignment_by_coefficient")
def alignment_by_coefficient(frame: Frame) -> go.Figure:
    """Cosine of the states with the direction u against the steering coefficient, beside unrelated directions in grey.

    The x axis is the coefficient over the norm of the states, if there is a column `relative_coefficient`; rows without
    a coefficient, such as those of the unedited model, have no place on it and are left out.

    Args:
        frame: of `mrp_lens.metrics.alignment`, as for `alignment_by_layer`, with a column `coefficient` (or
            `relative_coefficient`) added. `method` and `layer` make panels, `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, no coefficient, or rows that nothing tells apart.
    """
    picture = "alignment_by_coefficient"
    relative = "relative_coefficient" in frame
    x = "relative_coefficient" if relative else "coefficient"
    table = known(tidy(frame, (*COLUMNS, x), picture=picture, metric=f"{METRIC}, a coefficient at a time"), x, picture)

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        _draw_null(panels, panel, group, rows, x)
        panels.series(panel, rows, x, "cosine", Look(group, colour), interval=("low", "high"))

    return by_group(
        facets(table, ["method", "layer"]),
        draw,
        x=Axis("coefficient c / norm of the states" if relative else "coefficient c (units of the stream)", "auto"),
        y=COSINE,
        title="Alignment with the direction u against the steering coefficient",
        note="Bars: 95% over documents. Grey: unrelated directions drawn by the same law, their mean and 95% of them.",
        picture=picture,
    )


@register("norms")
def norms(frame: Frame) -> go.Figure:
    """Length of the states at each layer, beside the steering coefficient c in grey, which is in the same units.

    Args:
        frame: of `mrp_lens.metrics.alignment`: `group`, `layer`, `norm`, `norm_std`. With `coefficient`, c is drawn;
            `method` and several coefficients make panels, `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    table = tidy(frame, ["group", "layer", "norm", "norm_std"], picture="norms", metric=METRIC)
    low = (table["norm"] - table["norm_std"]).clip(lower=0)  # no state is shorter
    table = table.assign(low=low, high=table["norm"] + table["norm_std"])

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        panels.series(panel, rows, "layer", "norm", Look(group, colour), interval=("low", "high"))
        if "coefficient" in rows and rows["coefficient"].nunique() == 1:
            panels.level(panel, float(rows["coefficient"].dropna().iloc[0]), name="coefficient c")
        elif "coefficient" in rows:
            panels.control(panel, rows, "layer", "coefficient", "coefficient c")

    return by_group(
        layer_facets(table),
        draw,
        x=Axis("layer", "layer"),
        y=Axis("norm of the states", "auto"),
        title="Norm of the states",
        note="Mean over tokens, in the units of the stream. Bars: one standard deviation over tokens.",
        picture="norms",
    )


def _draw_null(panels: Panels, panel: int, group: str, rows: pd.DataFrame, x: str) -> None:
    name = f"unrelated directions ({group})"
    mean = rows.groupby(x)[["null_low", "null_high"]].mean()
    panels.control(panel, rows, x, "null_mean", name, dash=control_dash(group))
    panels.band(panel, mean.index, mean["null_low"], mean["null_high"], name=name)
