"""From the requests of a sequence to rows, a table and sentences: whether all stay forgotten, and what is left of the rest."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.common.attackers import UNEDITED
from analysis.common.resistance import spread

FORGOTTEN_WITHIN = 0.10  # of the never-taught level, above or below
KEPT = 0.95  # of what the unedited model knows of the worst topic that stays
TEXT = 1.1  # times the perplexity of ordinary text
BACK = 0.05  # from which rise on an earlier request is said to come back
OWN, PAPERS_RIVALS = "mrp", ("gradient-ascent", "npo")  # which the MRP paper sets against each other over a sequence
SHOWN = {
    "requests so far": "forget_accuracy",
    "highest": "forget_highest_accuracy",
    "latest": "forget_latest_accuracy",
    "first": "forget_first_accuracy",
    "worst topic that stays": "worst_topic_accuracy",
    "mean": "retain_accuracy",
    "text": "text_perplexity_ratio",
}

Cell = Mapping[str, Any]
Lengths = Sequence[int]


def rows_of_cells(cells: Sequence[Cell], unedited: Cell) -> pd.DataFrame:
    """One row a method, seed and number of requests; the unedited model's come first.

    Args:
        cells: what was found after each request, or why it could not be fitted.
        unedited: what the model knew of all requests and topics.

    Returns:
        `method`, `seed`, `requests` (how many so far), `request` (the latest), `order`; accuracy on the requests so far:
        `forget_accuracy` (mean), `forget_highest_accuracy`, `forget_lowest_accuracy`, `forget_latest_accuracy`,
        `forget_first_accuracy`, and `accuracy_<name>` of each and of each topic that stays; `untaught_accuracy`;
        `worst_topic_accuracy`, `worst_topic`, `retain_accuracy` (mean), unknown where no topic is left to stay;
        `text_perplexity_ratio`; of this request alone `trained_numbers`, `stored_bytes` and `seconds`;
        once the second request is taken back, accuracy on it (`returned_accuracy`), on the other requests
        (`others_accuracy`, mean) and on the worst topic that stays (`staying_accuracy`), each with what it was before
        (`returned_before_accuracy`); `failed`: why there are no figures.
    """
    fixed = {"untaught_accuracy": unedited["untaught_accuracy"]}
    rows: dict[Any, dict[str, Any]] = {}
    for cell in cells:
        keys = {key: cell[key] for key in ("seed", "requests")}
        keys |= {"request": cell["order"][-1], "order": ", ".join(cell["order"])}
        known = {key: cell[key] for key in ("trained_numbers", "stored_bytes", "seconds", "failed") if key in cell}
        row = {"method": cell["method"], **keys, **known, **fixed}
        if "failed" not in cell:
            row |= _figures(cell, cell["order"], cell["kept"], unedited) | _taken_back(cell)
            untouched = {"method": UNEDITED, **keys, **fixed}
            untouched |= _figures(unedited, cell["order"], cell["kept"], unedited)
            rows.setdefault((UNEDITED, cell["seed"], cell["requests"]), untouched)
        rows[cell["method"], cell["seed"], cell["requests"]] = row
    controls_first = sorted(rows.values(), key=lambda row: row["method"] != UNEDITED)
    table = pd.DataFrame(controls_first)
    figures = [*SHOWN.values(), "forget_lowest_accuracy"]  # missing where every sequence broke off
    return table.reindex(columns=list(dict.fromkeys([*table.columns, *figures])))


def _figures(found: Cell, order: Sequence[str], topics: Iterable[str], unedited: Cell) -> dict[str, Any]:
    """Accuracies on the requests of the sequence and on the topics that stay, and the cost for text."""
    asked, kept = [found["asked"][name] for name in order], {topic: found["kept"][topic] for topic in topics}
    worst = min(kept, key=lambda topic: float(kept[topic])) if kept else None
    return {
        "forget_accuracy": _mean(asked),
        "forget_highest_accuracy": max(asked),
        "forget_lowest_accuracy": min(asked),
        "forget_latest_accuracy": asked[-1],
        "forget_first_accuracy": asked[0],
        "worst_topic_accuracy": kept[worst] if worst is not None else None,
        "worst_topic": worst,
        "retain_accuracy": _mean(list(kept.values())) if kept else None,
        "text_perplexity_ratio": found["text_perplexity"] / unedited["text_perplexity"],
        **{f"accuracy_{name}": value for name, value in [*zip(order, asked, strict=True), *kept.items()]},
    }


def _taken_back(cell: Cell) -> dict[str, Any]:
    """The second request, the others and what stays, before and after it is taken back; nothing for an edit that cannot."""
    if "taken_back" not in cell:
        return {}
    second, others = cell["order"][1], [cell["order"][0], *cell["order"][2:]]
    return {
        f"{which}_{when}accuracy": value
        for when, found in (("before_", cell), ("", cell["taken_back"]))
        for which, value in (
            ("returned", found["asked"][second]),
            ("others", _mean([found["asked"][name] for name in others])),
            ("staying", min(found["kept"].values(), default=None)),
        )
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compact(table: pd.DataFrame, lengths: Lengths) -> pd.DataFrame:
    """As text, one row a method and length: mean over the seeds with the lowest and the highest."""
    rows = []
    for method, part in table.groupby("method", sort=False):
        for length in lengths:
            at = part[part["requests"] == length]
            row = {"method": str(method), "requests": str(length)}
            row |= {heading: spread(at[column].astype(float)) for heading, column in SHOWN.items()}
            row |= dict(zip(("trained", "stored", "fit"), _costs(part[part["requests"] <= length]), strict=True))
            rows.append(row)
    return pd.DataFrame(rows).replace("unknown", "")


def _costs(part: pd.DataFrame) -> tuple[str, str, str]:
    """Numbers trained, bytes stored and seconds of a request, on average; nothing where nothing was fitted."""
    keys = ["trained_numbers", "stored_bytes", "seconds"]
    known = part[keys].dropna() if set(keys) <= set(part) else part.iloc[:0]
    if known.empty:
        return "", "", ""
    numbers, size, seconds = (float(known[key].mean()) for key in keys)
    return f"{numbers:,.0f}", f"{size / 1000:,.1f} kB", f"{seconds:.0f} s"


def pictures(table: pd.DataFrame, lengths: Lengths) -> dict[str, pd.DataFrame]:
    """The frame that the report draws: every method after each length."""
    shown = table[table["requests"].isin(lengths) & table["forget_accuracy"].notna()]
    shown = shown.sort_values("requests", kind="stable").dropna(axis="columns", how="all")
    columns = [*SHOWN.values(), "seed", "untaught_accuracy"]
    named = shown["method"] + shown["requests"].map(lambda count: f", {count} request{'s' if count > 1 else ''}")
    return {"accuracies": shown[[name for name in columns if name in shown]].assign(method=named)}


def finding(table: pd.DataFrame, lengths: Lengths) -> str:
    """What the numbers say."""
    parts = [headline(table, length) for length in lengths]
    parts += [doing_both(table), courses(table), persistence(table)]
    parts += [against_rivals(table, lengths), returned(table, lengths), costs(table), failures(table)]
    return "\n\n".join(part for part in parts if part)


def _methods(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The edited models' rows, method by method."""
    return [(str(method), rows) for method, rows in table.groupby("method", sort=False) if method != UNEDITED]


def _requests(count: int) -> str:
    return f"{count} request{'s' if count > 1 else ''}"


def headline(table: pd.DataFrame, length: int) -> str:
    """What is left of the requests, and of what stays, after so many of them."""
    rows = table[(table["requests"] == length) & table["forget_accuracy"].notna()]
    if rows.empty:
        return ""
    stays = bool(rows["worst_topic_accuracy"].notna().any())
    lines = []
    for method, part in rows.groupby("method", sort=False):
        figures = [spread(part["forget_accuracy"]), f"x{part['text_perplexity_ratio'].mean():.2f}"]
        if stays:
            figures.insert(1, spread(part["worst_topic_accuracy"].astype(float)))
        lines.append(f"{method} {' / '.join(figures)}")
    seeds = rows["seed"].nunique()
    untaught = rows["untaught_accuracy"].astype(float).mean()
    level = "" if pd.isna(untaught) else f"; never taught: {untaught:.2f}"
    measured = "the worst topic that stays / text" if stays else "text, as no topic is left to stay"
    return (
        f"After {_requests(length)} ({seeds} seed{'s: mean, lowest to highest' if seeds > 1 else ''}{level}), accuracy on these / "
        f"{measured}: {'; '.join(lines)}."
    )


def works(table: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row has every request so far forgotten, and the worst topic that stays and ordinary text kept."""
    before = table[table["method"] == UNEDITED].set_index(["seed", "requests"])["worst_topic_accuracy"]
    places = pd.MultiIndex.from_frame(table[["seed", "requests"]])
    needed = KEPT * before.astype(float).reindex(places).set_axis(table.index)
    untaught, worst = table["untaught_accuracy"].astype(float), table["worst_topic_accuracy"].astype(float)
    forgotten = table["forget_highest_accuracy"] <= untaught + FORGOTTEN_WITHIN
    forgotten &= table["forget_lowest_accuracy"] >= untaught - FORGOTTEN_WITHIN
    return forgotten & ((worst >= needed) | needed.isna()) & (table["text_perplexity_ratio"] <= TEXT)


def doing_both(table: pd.DataFrame) -> str:
    """Which methods forget every request and keep the rest, after each number of requests."""
    if table["untaught_accuracy"].isna().all():
        return ""
    judged = table.assign(works=works(table))
    told = []
    for count, rows in judged.groupby("requests"):
        able = [method for method, part in _methods(rows) if bool(part["works"].all())]
        told.append(f"after {count} {', '.join(able) or 'none'}")
    return (
        f"In every seed, every request so far within {FORGOTTEN_WITHIN:.2f} of the never-taught level, the worst topic that stays at "
        f"{KEPT:.0%} of what it was, and text at no more than {TEXT:g} times its perplexity: {'; '.join(told)}."
    )


def courses(table: pd.DataFrame) -> str:
    """How the worst topic that stays fares over the sequence."""
    known = table[table["worst_topic_accuracy"].notna()]
    counts = sorted(known["requests"].unique())
    if len(counts) < 2:
        return ""
    lines = []
    for method, rows in _methods(known.astype({"worst_topic_accuracy": float})):
        whole = rows.pivot_table(index="seed", columns="requests", values="worst_topic_accuracy").dropna()
        if len(whole):
            lines.append(f"{method} {' / '.join(f'{value:.2f}' for value in whole.mean())}")
    return f"The worst topic that stays, after {' / '.join(map(str, counts))} requests: {'; '.join(lines)}."


def persistence(table: pd.DataFrame) -> str:
    """Whether the first request comes back as others follow."""
    known = table[table["forget_accuracy"].notna()]
    last = known["requests"].max()
    if not last > 1:
        return ""
    lines, back = [], []
    for method, rows in _methods(known):
        by_count = rows.pivot_table(index="seed", columns="requests", values="forget_first_accuracy")
        if not {1, last} <= set(by_count):
            continue
        lasting = by_count.dropna(subset=[last])  # seeds whose sequence broke off say nothing here
        if lasting.empty:
            continue
        first, final = lasting[1], lasting[last]
        lines.append(f"{method} {first.mean():.2f} to {final.mean():.2f}")
        if bool((final - first > BACK).all()):
            back.append(method)
    return (
        f"The first request, from right after it to after {_requests(last)}: {'; '.join(lines)}. It comes back by more than {BACK:.2f} in "
        f"every seed with {', '.join(back) or 'none'}."
    )


def against_rivals(table: pd.DataFrame, lengths: Lengths) -> str:
    """MRP beside the methods that its paper finds it better than over a sequence."""
    lines = []
    for rival in PAPERS_RIVALS:
        for length in lengths:
            at = table[table["requests"] == length]
            told = _compared(*(at[at["method"] == name].set_index("seed") for name in (OWN, rival)))
            if told:
                lines.append(f"{rival} after {length}: {', '.join(told)}")
    return f"{OWN} against {'; '.join(lines)}." if lines else ""


def _compared(own: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """How much nearer to never taught the requests are, how much more of the worst topic is left, and text."""
    distances = [(part["forget_accuracy"] - part["untaught_accuracy"].astype(float)).abs() for part in (own, other)]
    gains = {
        "{} on the distance of the requests from never taught": distances[0] - distances[1],
        "{} on the worst topic that stays": (own["worst_topic_accuracy"] - other["worst_topic_accuracy"]).astype(float),
        "{} on the ratio of text": own["text_perplexity_ratio"] - other["text_perplexity_ratio"],
    }
    told = []
    for words, gain in gains.items():
        known = gain.dropna()
        if len(known):
            disagree = bool((known > 0).any() and (known < 0).any())
            told.append(words.format(f"{known.mean():+.2f}") + (" (the seeds disagree)" if disagree else ""))
    return told


def returned(table: pd.DataFrame, lengths: Lengths) -> str:
    """What taking the second request back does."""
    if "returned_accuracy" not in table:
        return ""
    known = table[table["requests"].isin(lengths) & table["returned_accuracy"].notna()]
    parts = {"returned": "", "others": "the others ", "staying": "the worst topic that stays "}
    lines = []
    for (method, count), rows in known.groupby(["method", "requests"], sort=False):
        changes = [
            f"{words}{rows[f'{part}_before_accuracy'].mean():.2f} to {rows[f'{part}_accuracy'].mean():.2f}"
            for part, words in parts.items()
            if rows[f"{part}_accuracy"].notna().any()
        ]
        lines.append(f"{method} of {count} {changes[0]} ({', '.join(changes[1:])})")
    return f"The second request taken back again: {'; '.join(lines)}." if lines else ""


def costs(table: pd.DataFrame) -> str:
    """What one request takes."""
    lines = []
    for method, rows in _methods(table):
        numbers, size, seconds = _costs(rows)
        if numbers:
            lines.append(f"{method} {numbers} numbers trained, {size} stored, {seconds}")
    return f"One request takes: {'; '.join(lines)}."


def failures(table: pd.DataFrame) -> str:
    """Which sequences broke off."""
    broken = table[table["failed"].notna()].drop_duplicates(["method", "seed"]) if "failed" in table else table[:0]
    told = "; ".join(f"{row.method}, seed {row.seed}: {row.failed}" for row in broken.itertuples())
    return f"Broken off: {told}." if told else ""
