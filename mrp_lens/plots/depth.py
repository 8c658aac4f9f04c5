"""How deep unlearning went: where along the layers the answer comes back."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import facets, figure_of
from mrp_lens.plots.theme import FORGET, Axis, Look


@figure_of("mrp_lens.metrics.depth", "into layer log_probability low high unedited never_saw random depth")
def depth(frame: pd.DataFrame) -> go.Figure:
    """At which layer the forgotten answers come back when its states are exchanged with those of the model that knows.

    Args:
        frame: of `mrp_lens.metrics.depth`: `into`, `layer`, `log_probability`, `low`, `high`, `unedited`, `never_saw`,
            `random`, `depth`, and `edited`, if it has that. A panel for each `method` and `into`, which tells its depth; `seed` makes faint points
            around a mean.
    """
    parts = [
        (f"{method}{', ' if method else ''}depth {rows['depth'].mean():.2f}: into the {into} model", rows)
        for method, of_method in facets(frame, ["method"])
        for into, rows in facets(of_method, ["into"])
    ]
    panels = Panels(
        parts,
        x=Axis("layer whose states are put in", "layer"),
        y=Axis("log p of the answer (nats a token)"),
        title="Where the answer comes back",
        note="States of the unedited model at one layer put into the edited one, or the reverse. Depth: 0 as unedited, 1 as never taught.",
        columns=min(2, len(parts)),
    )
    for panel, rows in panels:
        panels.control(panel, rows, "layer", "unedited", "unedited model", dash="solid")
        if "edited" in rows:
            panels.control(panel, rows, "layer", "edited", "edited model", dash="dashdot")
        panels.control(panel, rows, "layer", "never_saw", "never taught", dash="dash")
        panels.control(panel, rows, "layer", "random", "random tokens' states", dash="dot")
        panels.series(
            panel, rows, "layer", "log_probability", Look("forget set, edited", FORGET), interval=("low", "high")
        )
    return panels.figure()
