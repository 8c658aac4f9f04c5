"""How well the forget set can be told from the retain set, at each layer."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import facets, figure_of
from mrp_lens.plots.theme import OTHERS, UNIT, Axis, Look

UNITS = {"document": "a document as a whole", "token": "one token's state"}


@figure_of("mrp_lens.metrics.separability", "layer unit auc low high null")
def separability(frame: pd.DataFrame) -> go.Figure:
    """How often a linear detector ranks the forget set above the retain set, at each layer, by a token and by a document.

    Args:
        frame: of `mrp_lens.metrics.separability`: `layer`, `unit`, `auc`, `low`, `high`, `null`. A panel for each `method`, if it
            has that column; `seed` makes faint points around a mean.
    """
    panels = Panels(
        facets(frame, ["method"]),
        x=Axis("layer", "layer"),
        y=Axis("AUC", limits=UNIT),
        title="Can the forget set be told from the retain set?",
        bars="Bars: 95%, bootstrap over documents.",
        note="By a linear detector, on documents that it has not seen. {bars} 0.5: not at all.",
    )
    for panel, part in panels:
        for place, (unit, name) in enumerate(UNITS.items()):
            rows = part[part["unit"] == unit]
            if len(rows):
                panels.series(panel, rows, "layer", "auc", Look(name, OTHERS[place]), interval=("low", "high"))
        panels.control(panel, part[part["unit"] == "token"], "layer", "null", "random sides")
    return panels.figure()
