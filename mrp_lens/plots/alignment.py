"""Do states point along the steering direction, and how long are they? Against the layer and the coefficient."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import Frame, Parts, facets, figure_of, known, layer_facets
from mrp_lens.plots.theme import Axis, Look, control_dash

METRIC = "mrp_lens.metrics.alignment"
COLUMNS = "group layer cosine low high null_mean null_low null_high"


@figure_of(METRIC, COLUMNS)
def alignment_by_layer(frame: pd.DataFrame) -> go.Figure:
    """Cosine of the states with the direction u at each layer, beside that of unrelated directions in grey.

    Args:
        frame: of `mrp_lens.metrics.alignment`: `group`, `layer`, `cosine`, `low`, `high`, `null_mean`, `null_low`,
            `null_high`. If it has them, `method` and `coefficient` make panels and `seed` faint points around a mean.
    """
    title = "Alignment of the states with the direction u"
    return _cosines(layer_facets(frame), "layer", Axis("layer", "layer"), title)


def _columns(frame: Frame) -> str:
    return f"{COLUMNS} {'relative_coefficient' if 'relative_coefficient' in frame else 'coefficient'}"


@figure_of(f"{METRIC}, a coefficient at a time", _columns)
def alignment_by_coefficient(frame: pd.DataFrame) -> go.Figure:
    """Cosine of the states with the direction u against the steering coefficient, beside unrelated directions in grey.

    The x axis is the coefficient over the norm of the states, if there is a column `relative_coefficient`; rows without
    a coefficient, such as those of the unedited model, have no place on it and are left out.

    Args:
        frame: of `mrp_lens.metrics.alignment`, as for `alignment_by_layer`, with a column `coefficient` (or
            `relative_coefficient`) added. `method` and `layer` make panels, `seed` faint points around a mean.
    """
    relative = "relative_coefficient" in frame
    x = "relative_coefficient" if relative else "coefficient"
    axis = Axis("coefficient c / norm of the states" if relative else "coefficient c (units of the stream)", "auto")
    title = "Alignment with the direction u against the steering coefficient"
    return _cosines(facets(known(frame, x), ["method", "layer"]), x, axis, title)


def _cosines(parts: Parts, x: str, axis: Axis, title: str) -> go.Figure:
    panels = Panels(
        parts,
        x=axis,
        y=Axis("mean cosine with u"),
        title=title,
        bars="Bars: 95% over documents.",
        note="{bars} Grey: unrelated directions drawn by the same law, their mean and 95% of them.",
    )
    for panel, group, rows, colour in panels.by_group():
        unrelated = f"unrelated directions ({group})"
        panels.control(panel, rows, x, "null_mean", unrelated, dash=control_dash(group))
        panels.band(panel, rows, x, "null_low", "null_high", name=unrelated)
        panels.series(panel, rows, x, "cosine", Look(group, colour), interval=("low", "high"))
    return panels.figure()


@figure_of(METRIC, "group layer norm norm_std")
def norms(frame: pd.DataFrame) -> go.Figure:
    """Length of the states at each layer, beside the steering coefficient c in grey, which is in the same units.

    Args:
        frame: of `mrp_lens.metrics.alignment`: `group`, `layer`, `norm`, `norm_std`. With `coefficient`, c is drawn;
            `method` and several coefficients make panels, `seed` faint points around a mean.
    """
    low = (frame["norm"] - frame["norm_std"]).clip(lower=0)  # no state is shorter
    panels = Panels(
        layer_facets(frame.assign(low=low, high=frame["norm"] + frame["norm_std"])),
        x=Axis("layer", "layer"),
        y=Axis("norm of the states", "auto"),
        title="Norm of the states",
        bars="Bars: one standard deviation over tokens.",
        note="Mean over tokens, in the units of the stream. {bars}",
    )
    for panel, group, rows, colour in panels.by_group():
        panels.series(panel, rows, "layer", "norm", Look(group, colour), interval=("low", "high"))
        if "coefficient" in rows and rows["coefficient"].nunique() == 1:
            panels.level(panel, float(rows["coefficient"].dropna().iloc[0]), name="coefficient c")
        elif "coefficient" in rows:
            panels.control(panel, rows, "layer", "coefficient", "coefficient c")
    return panels.figure()
