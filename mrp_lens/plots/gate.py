"""Where a conditional projection acts: how often its gates fire on either side, and at which tokens."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import facets, figure_of, single_rows
from mrp_lens.plots.theme import FORGET, GREY, INK, OTHERS, RETAIN, UNIT, Axis, Look, literal, room_for
from mrp_lens.utils.validation import check_whole

LINE_HEIGHT = 22  # pixels
SHARES = [[0.0, "#FFFFFF"], [1.0, OTHERS[0]]]  # colours of 0 and 1
RATES = {
    "recall": Look("forget tokens (recall)", FORGET),
    "retain_firing": Look("retain tokens", RETAIN),
    "precision": Look("precision", OTHERS[0], symbol="diamond"),
}


@figure_of("mrp_lens.metrics.gate", "request hook layer precision precision_null recall retain_firing")
def gate(frame: pd.DataFrame) -> go.Figure:
    """At what share of each side's tokens the gates fire at each layer, and how often rightly so, beside chance in grey.

    Args:
        frame: of `mrp_lens.metrics.gate`: `request`, `hook`, `layer`, `precision`, `precision_null`, `recall`,
            `retain_firing`. A panel for each `method`, request and, where it has several, site; `seed` makes faint points
            around a mean.
    """
    frame = frame.assign(site=frame["hook"].str.rsplit("hook_", n=1).str[-1])
    sites = ["site"] if frame["site"].nunique() > 1 else []
    panels = Panels(
        facets(frame, ["method", "request", *sites]),
        x=Axis("layer", "layer"),
        y=Axis("share", limits=UNIT),
        title="Where the gates fire",
        note="Share of each side's tokens at which a gate fires; precision: of the tokens at which it does, the forget set's.",
    )
    for panel, rows in panels:
        panels.means(panel, rows, "layer", "precision_null", Look("random gate (precision)", GREY, "dash"))
        for column, look in RATES.items():
            panels.series(panel, rows, "layer", column, look)
    return panels.figure()


@figure_of("mrp_lens.metrics.gate_tokens", "group document position token request hook share")
def gate_tokens(frame: pd.DataFrame, line: int = 16) -> go.Figure:
    """The tokens of some documents, each the greener the more of its state the gate lets the edit remove.

    Args:
        frame: of `mrp_lens.metrics.gate_tokens`: `group`, `document`, `position`, `token`, `request`, `hook`, `share`. A
            panel for each `method`, request and hook; over several values of `seed` the mean is drawn.
        line: tokens side by side at most; a longer document goes on below.
    """
    check_whole(line=line)
    line = min(line, int(frame["position"].max()) + 1)
    parts = facets(frame, ["method", "request", "hook"])
    texts = [_lines(part, line) for _, part in parts]
    labels = [[str(label) for label in text["label"].unique()] for text in texts]
    panels = Panels(
        parts,
        x=Axis("token of the line", "category", categories=[str(number) for number in range(line)]),
        y=[Axis("document", "category", categories=own, downwards=True) for own in labels],
        title="Tokens at which the gates open",
        note="White: the state is left alone. Green: its part in the subspace is removed. Hovering tells how much of it.",
        columns=1,
        height=max(LINE_HEIGHT * max(map(len, labels)), 4 * LINE_HEIGHT),
        left=room_for(label for own in labels for label in own),
    )
    for (panel, _), text, own in zip(panels, texts, labels, strict=True):
        panels.trace(panel, _tokens(text, own, line))
    return panels.figure()


def _lines(table: pd.DataFrame, line: int) -> pd.DataFrame:
    """The tokens in order, each with the label of its line and its place there."""
    keys = ["group", "document", "position"]
    single_rows(table, keys)
    text = table.groupby(keys, sort=False).agg(token=("token", "first"), share=("share", "mean")).reset_index()
    text["label"] = [
        f"{group} {document:g}" + (f", from {position // line * line:g}" if position >= line else "")
        for group, document, position in zip(text["group"], text["document"], text["position"], strict=True)
    ]
    return text.assign(column=text["position"] % line)


def _tokens(text: pd.DataFrame, labels: list[str], line: int) -> go.Heatmap:
    rows = {label: number for number, label in enumerate(labels)}
    shares: list[list[float | None]] = [[None] * line for _ in labels]
    tokens = [[""] * line for _ in labels]
    told: list[list[Any]] = [[""] * line for _ in labels]
    for label, column, position, token, share in zip(
        *(text[name] for name in ("label", "column", "position", "token", "share")), strict=True
    ):
        row, place = rows[label], int(column)
        shares[row][place] = None if pd.isna(share) else float(share)
        tokens[row][place] = literal(str(token).strip() or repr(str(token)))
        told[row][place] = literal(f"{token!r}, position {position:g}")
    return go.Heatmap(
        x=list(range(line)),
        y=list(range(len(labels))),
        z=shares,
        text=tokens,
        customdata=told,
        texttemplate="%{text}",
        textfont={"color": INK},
        hovertemplate="%{customdata}<br>%{z:.3f}<extra></extra>",
        hoverongaps=False,
        name="share removed, from 0 (white) to 1 (green)",
        colorscale=SHARES,
        zmin=0.0,
        zmax=1.0,
        showscale=False,
        xgap=1,
        ygap=1,
    )
