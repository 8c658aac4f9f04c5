"""The findings of the study of selectivity: what its fits and their exchanges are called, its tables, and how to read them."""

from collections.abc import Mapping, Sequence

import pandas as pd

from analysis.common.tables import NONE, figure, markdown, mean_of
from mrp_lens.metrics.controls import RANDOM_PROJECTION, UNEDITED

PLAIN, GATED = "mrp-unconditional", "mrp"
UNBOUNDED = "mrp-unconditional-unbounded"
OPEN, EXCHANGED, UNBOUNDED_GATED = "mrp-open", f"{PLAIN}-gated", f"{UNBOUNDED}-gated"
RANDOM_GATED = "random-gated"
WITHOUT = "mrp-without-entities"
BARE, ASKED, WRITTEN = "mrp-coverage-none", "mrp-coverage-questions", "mrp-coverage-written"
COVERED = (BARE, ASKED, WRITTEN, WITHOUT)
FEWEST, NAMED = 3, 6  # a token is told where it occurs so often; so many at either end
WHAT = {
    UNEDITED: "nothing",
    PLAIN: "rows of the plain fit, every token",
    GATED: "rows and gates of the gated fit",
    OPEN: "rows of the gated fit, every token",
    EXCHANGED: "rows of the plain fit, gates of the gated fit",
    UNBOUNDED: "rows of the plain fit without a budget, every token",
    UNBOUNDED_GATED: "these, gates of the gated fit",
    RANDOM_PROJECTION: "random rows, every token",
    RANDOM_GATED: "random rows, gates of the gated fit",
    BARE: "the corpora alone",
    ASKED: "the corpora and question forms",
    WRITTEN: "the corpora and texts that the model writes",
    WITHOUT: "all, but no document that names some entities",
}
FIGURES = {
    "forget quiz": ("forget_accuracy", "forget"),
    "retain quiz": ("retain_accuracy", "retain"),
    "worst topic": ("worst_topic_accuracy", ""),
    "damage to text": ("damage", "damage"),
    "to retain answers": ("answer_damage", "answer_damage"),
    "text": ("text_perplexity_ratio", ""),
}
READING = """\
**1. What the rows take.** Share of the states' squared norm inside the removed subspace, before the edit (the columns named
after the texts) and with it on (`left`), and how far the states have moved over their norm (`moved`, with all that happened
below). `statements` are the short retain documents in the form of the forget set's; there is no such column where these are
all or none. A plain projection is selective where `forget` stands above `retain` and `statements`; at `random`, rank /
d_model, the rows are no better than a random subspace. Rows of the gated fit may take as much of either side: what it
leaves, `left` and `moved` tell.

**2. What comes back.** The same share, without the edit to with it, one layer above the projection and at the last layer.

**3. Where the gates fire.** On the corpora, on retain statements, and on the quizzes' prompts, a form that no fit saw, before any
answer. Selective gates have a recall near 1, `retain firing` near 0 and a precision far above `at random`; `share` is the
mean of g(h). `unseen entities` is the fit without them, asked about these alone. Below stand the tokens at which the gates
are open widest and least, the mean over layers.

**4. Where or what.** Directions make the difference where {open} (the gated fit's rows at every token) keeps the retain quiz
and {exchanged} (the plain fit's rows behind the gates) does not; tokens do where it is the other way round. A budget may hold
the plain fit back until it forgets little: {unbounded} is the same fit without one, all of its steps done. Random rows behind
the same gates tell how much of the forgetting is mere disturbance at the right tokens. Damage is KL(unedited || edited) in
nats a token, on text that no fit saw and on the right answers of the retain quiz; `text` is perplexity after over before.
{untaught}`ended` is how a fit with a budget ended: at its target, or what kept it from that.

**5. What coverage buys.** MRP with less to read; {gated} in the table above has all of it. Documents with a prompt are questions
already and get no question forms. `unseen entities` is the accuracy on the questions about entities that no forget document of
that fit names (without the edit: in brackets)."""


def finding(frames: Mapping[str, pd.DataFrame], tokens: pd.DataFrame, table: pd.DataFrame) -> str:
    """The tables, and how to read them."""
    whole, alone = table[table["layer"].isna()], table[table["layer"].notna()]
    pair = [name for name in WHAT if name not in COVERED]
    tables = {
        "1. What the rows take": energy_table(frames["removed_energy"]),
        "2. What comes back": propagation_table(frames["propagation"]),
        "3. Where the gates fire": f"{gate_table(frames['gate'])}\n\n{token_table(tokens)}",
        "4. Where or what": f"{score_table(whole, pair)}\n\nOne hook alone:\n\n{layer_table(alone)}",
        "5. What coverage buys": score_table(whole, [GATED, *COVERED]),
    }
    level = mean_of(table, "untaught_accuracy")
    untaught = "" if level == NONE else f"Facts that were never taught are answered {level}. "
    text = READING.format(open=OPEN, exchanged=EXCHANGED, unbounded=UNBOUNDED, gated=GATED, untaught=untaught)
    return "\n\n".join([*(f"## {title}\n\n{drawn}" for title, drawn in tables.items()), "## How to read this", text])


def energy_table(frame: pd.DataFrame) -> str:
    """A row a method and layer at which it projects."""
    keys = ["method", "layer"]
    frame = frame[frame["removed_rank"] > 0]
    before, after = (frame[frame["when"] == when] for when in ("before", "after"))
    groups = list(dict.fromkeys(frame["group"]))
    inside = _wide(before, keys, "removed_energy", groups)
    inside["random"] = before.groupby(keys, sort=False)["removed_energy_null"].mean()
    for column, heading in (("removed_energy", "left"), ("displacement", "moved")):
        moved = _wide(after, keys, column, groups)
        inside = inside.join(moved.add_suffix(f", {heading}"))
    return _drawn(inside)


def propagation_table(frame: pd.DataFrame) -> str:
    """A row a method and layer at which it projects and which has one above."""
    above = frame[frame["layer"] > frame["source"]]
    if above.empty:
        return "The projection stands at the last layer alone; nothing lies above it."
    means = above.groupby(["method", "source", "layer", "group"], sort=False)[["before", "after", "null"]].mean()
    rows = []
    for (method, source), part in means.groupby(["method", "source"], sort=False):
        row = {"method": method, "removed at": str(source)}
        layers = part.index.get_level_values("layer")
        for place, layer in (("next layer", layers.min()), ("last layer", layers.max())):
            for group, values in part.xs(layer, level="layer").droplevel(["method", "source"]).iterrows():
                row[f"{group}, {place}"] = f"{values['before']:.3f} to {values['after']:.3f}"
        rows.append(row | {"random": f"{part['null'].iloc[0]:.3f}"})
    return markdown(pd.DataFrame(rows).fillna(""))


def gate_table(frame: pd.DataFrame) -> str:
    """A row a kind of text and layer."""
    named = {
        "precision": "precision",
        "precision_null": "at random",
        "recall": "recall",
        "retain_firing": "retain firing",
        "forget_share": "forget share",
        "retain_share": "retain share",
    }
    frame = frame.rename(columns={"method": "texts"})
    return _drawn(frame.groupby(["texts", "layer"], sort=False)[list(named)].mean().rename(columns=named))


def token_table(tokens: pd.DataFrame) -> str:
    """A row a kind of text: the tokens at which the gates are open the widest, and the least."""
    rows = []
    for group, part in tokens[tokens["times"] >= FEWEST].groupby("group", sort=False):
        ordered = part.sort_values("share", ascending=False, kind="stable")
        ends = (ordered.head(NAMED), ordered.tail(NAMED).iloc[::-1])
        widest, least = (
            ", ".join(f"{_code(t)} {s:.2f}" for t, s in zip(end["token"], end["share"], strict=True)) for end in ends
        )
        rows.append({"texts": str(group), "widest": widest, "least": least})
    return markdown(pd.DataFrame(rows, columns=["texts", "widest", "least"]))


def score_table(table: pd.DataFrame, methods: Sequence[str]) -> str:
    """A row a method, of several seeds the mean with the lowest and the highest."""
    rows = []
    for name in methods:
        part = table[table["method"] == name]
        if part.empty:
            continue
        row = {"method": name, "what": WHAT[name]}
        row |= {heading: figure(part, column, stem) for heading, (column, stem) in FIGURES.items()}
        row["ended"] = ", ".join(str(ended) for ended in part.get("ended", pd.Series()).dropna().unique())
        if "unseen_accuracy" in part:
            unseen = mean_of(part, "unseen_accuracy")
            row["unseen entities"] = f"{unseen} ({mean_of(part, 'unseen_unedited_accuracy')})" if unseen != NONE else ""
        rows.append(row)
    text = pd.DataFrame(rows)
    return markdown(text.loc[:, (text != "").any()])


def layer_table(table: pd.DataFrame) -> str:
    """A row a layer and fit, its hook there alone."""
    columns = [column for column, _ in FIGURES.values()]
    means = (
        table.groupby(["method", "layer"], sort=False)[columns]
        .mean()
        .rename(columns={column: heading for heading, (column, _) in FIGURES.items()})
    )
    return _drawn(means.rename(index=int, level="layer"))


def _wide(frame: pd.DataFrame, keys: Sequence[str], column: str, groups: Sequence[str]) -> pd.DataFrame:
    """The means over seeds of a column, a column a group."""
    return frame.groupby([*keys, "group"], sort=False)[column].mean().unstack("group")[list(groups)]


def _drawn(means: pd.DataFrame) -> str:
    """Figures to three decimals, what the rows are about in front."""
    text = means.map(lambda value: "" if pd.isna(value) else f"{value:.3f}")
    return markdown(text.reset_index().astype(str))


def _code(token: str) -> str:
    """A token in Markdown, as it is spelled, fit for the cell of a table."""
    return "`" + repr(str(token))[1:-1].replace("|", "/").replace("`", "'") + "`"
