"""Requests to forget that come one after another: what each costs, and whether earlier ones stay forgotten.

`python -m analysis.continual --out runs/continual` (one seed), `--full` (three)

Topics of the demo are requested one after another, in an order that the seed draws; a topic has to stay until it is
requested. With all of them requested only ordinary text is left to be kept. Each request is fitted with the edit so far
in place, and measured: all requests so far, the worst topic that stays, ordinary text, numbers trained, bytes stored and
seconds for this request. From the third request on, an edit that keeps its requests apart also has the second taken back.

For a model of one's own, `--forget a.jsonl b.jsonl c.jsonl --questions qa.jsonl qb.jsonl qc.jsonl --retain r.jsonl
--retain-questions qr.jsonl` are three requests, in an order that the seed draws. There, the retain set is the same
throughout: requests that have not come yet are not part of it. `--reference` is a model that never saw what is forgotten.

Every request's figures and edit lie in the output folder and are gone on with after an interruption; longer sequences
and more methods may be added later; `--shard 1/2` and `--shard 2/2` divide the sequences between two processes.
"""

import argparse
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.common.arguments import Study, add_resumable_options, add_set_option, numbers, parser_for
from analysis.common.methods import compared_methods, names_in, settings_of, with_settings
from analysis.common.requests import Requests, accuracy, numbers_in
from analysis.common.resumable import Job, ResumableStudy, result_name, shard_in
from analysis.common.tables import NONE, figure, markdown, mean_of
from mrp_lens.cli.app import as_program
from mrp_lens.data import TaskConfig
from mrp_lens.data.world import World
from mrp_lens.edits import Edit, ProjectionEdit, load_edit
from mrp_lens.edits.serialization import stored_bytes
from mrp_lens.methods import Fit
from mrp_lens.metrics.controls import UNEDITED
from mrp_lens.models import identity_of
from mrp_lens.training import NonFiniteLossError
from mrp_lens.utils.result_store import ResultStore

FULL_SEEDS = "0,1,2"
TAKEN_BACK = 1  # the second request: one before it and one after it stay
FORGOTTEN_WITHIN = 0.10  # of the never-taught level, above or below
KEPT = 0.95  # of what the unedited model knows of the worst topic that stays
TEXT = 1.1  # times the perplexity of ordinary text
SHOWN = {
    "requests so far": "forget_accuracy",
    "highest": "forget_highest_accuracy",
    "latest": "forget_latest_accuracy",
    "first": "forget_first_accuracy",
    "worst topic that stays": "worst_topic_accuracy",
    "mean": "retain_accuracy",
    "text": "text_perplexity_ratio",
}
READING = f"""\
One row a method and number of requests: accuracy on the requests so far (their mean, the highest, the latest, the first), on the
worst topic that stays (empty where none is left) and the mean of these, and the perplexity of ordinary text over the unedited
model's; of several seeds the mean (lowest to highest). Facts that were never taught are answered {{untaught}}: that is where requests
should be, and a first request that climbs away from it as others follow comes back. `does both` counts the seeds in which every
request so far is within {FORGOTTEN_WITHIN:.2f} of that level, the worst topic at {KEPT:.0%} of what it was, and text at no more than {TEXT:g}
times its perplexity. `taken back` is what taking the second request back again does to it / to the other requests / to the worst
topic that stays. The costs are those of one request. A sequence that broke off has no figures, and its reason in the last column."""

REQUEST = "request{}"  # part of a result's name

Cell = Mapping[str, Any]
"""What was found after a number of requests, or why they could not be fitted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "continual")
    add_resumable_options(parser, seeds="--seed, with --full three; of order and fits")
    parser.set_defaults(topic=None, questions=None)
    several = parser.add_argument_group("requests", conflict_handler="resolve")  # here there is more than one of each
    several.add_argument(
        "--topic", nargs="+", action="extend", dest="topics", help="of the demo's world, to request (default all)"
    )
    several.add_argument(
        "--questions", nargs="+", action="extend", dest="quizzes", help="a file for each of --forget, in the same order"
    )
    parser.add_argument("--requests", help="lengths of sequences, such as 3,4 (default: all, and all but one)")
    parser.add_argument("--full", action="store_true", help=f"seeds {FULL_SEEDS}")
    add_set_option(parser)
    parser.add_argument("--reference", help="a model that never saw what is forgotten: how absent looks")
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    study = Study.begin("analysis.continual", "Requests one after another", options, in_place=True)
    continual = Continual(study, options)
    if not continual.run(shard):
        return
    table = rows_of_cells([continual.result(*part) for part in continual.parts()], continual.unedited())
    reading = READING.format(untaught=mean_of(table, "untaught_accuracy"))
    text = f"{markdown(compact(table, continual.lengths))}\n\n{reading}"
    study.end(text, pictures(table, continual.lengths), table, in_place=True)


def requests_of(study: Study, options: argparse.Namespace) -> Requests:
    """Files, or topics of the demo's world.

    Raises:
        ValueError: files without a quiz each, an unknown topic, or files and topics.
    """
    if options.forget and options.topics:
        raise ValueError("--topic names topics of the demo's world, and --forget gives files; leave out one of the two")
    if options.quizzes and not options.forget:
        raise ValueError(
            "--questions are about the requests of --forget; give these, too, or leave both out for the demo's world"
        )
    if not options.forget:
        return Requests.from_world(options.topics or World().topics, limit=options.limit)
    columns = TaskConfig.from_options(vars(options))
    quizzes = [columns.quiz(source) for source in options.quizzes or ()]
    return Requests.of_files(study.task, [quiz for quiz in quizzes if quiz is not None], limit=options.limit)


class Continual(ResumableStudy):
    """Every request of every sequence, each in a file of its own.

    Attributes:
        lengths: of the sequences that are reported; the longest one holds the others.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.requests = requests_of(study, options)
        self.reference = study.another(options.reference)
        self.seeds = numbers(options.seeds or (FULL_SEEDS if options.full else str(options.seed)), int, "--seeds") or ()
        self.lengths = self._lengths()
        known = compared_methods(study.model)
        chosen = names_in(options.methods, known, default=list(known))
        self.methods = with_settings({name: known[name] for name in chosen}, options.set)
        settings = {
            "model": identity_of(study.model),
            "data": self.requests.fingerprints(),
            "limit": options.limit,
            "reference": None if self.reference is None else identity_of(self.reference),
        }
        self.store = ResultStore.claim(
            options.out,
            "sequence",
            settings,
            earlier={"data": self.requests.legacy_fingerprints()},
            overwrite=options.overwrite,
        )

    def _lengths(self) -> tuple[int, ...]:
        count = len(self.requests.forget)
        chosen = numbers(self.options.requests, int, "--requests") or range(max(1, count - 1), count + 1)
        if not 1 <= min(chosen) <= max(chosen) <= count:
            raise ValueError(f"--requests {self.options.requests}: there are {count}; choose lengths from 1 to {count}")
        return tuple(sorted(set(chosen)))

    @property
    def jobs(self) -> list[Job]:
        """The sequences, seed by seed."""
        return [(name, seed) for seed in self.seeds for name in self.methods]

    def parts(self) -> list[tuple[Job, str]]:
        """The requests of each sequence."""
        return [(job, REQUEST.format(n)) for job in self.jobs for n in range(1, self.lengths[-1] + 1)]

    def run(self, shard: tuple[int, int]) -> bool:
        """Compute this shard's requests; first the unedited model, which all are compared with."""
        self.unedited()
        return super().run(shard)

    def unedited(self) -> Cell:
        """The model as it is, asked about all requests, and how what was never taught looks, where that is known."""
        return self.store.once(UNEDITED, self._unedited)

    def _unedited(self) -> Cell:
        model, requests = self.study.model, self.requests
        found = requests.measure(model, None, asked=list(requests.forget), gone=())
        found["untaught_accuracy"] = None
        if requests.untaught is not None:
            found["untaught_accuracy"] = accuracy(model, requests.untaught)
        if self.reference is not None:
            asked = [accuracy(self.reference, quiz) for quiz in requests.quizzes.values()]
            found["untaught_accuracy"] = sum(asked) / len(asked)
        return found

    def result(self, job: Job, part: str) -> Cell:
        """A request of a sequence: fitted, saved and measured, unless it was before.

        Raises:
            ValueError: the method was fitted with other settings.
        """
        (name, seed), n = job, int(part.removeprefix("request"))
        known = self.store.stored(result_name(job, part))
        if known is not None:
            self.check_settings(name, self.methods[name], known=known["settings"])
            return known
        order = self.requests.order(seed)
        row: dict[str, Any] = {"method": name, "seed": seed, "requests": n, "order": list(order[:n])}
        row |= {"settings": settings_of(self.methods[name])}
        if n > 1 and "failed" in (before := self.result(job, REQUEST.format(n - 1))):
            row["failed"] = before["failed"]
        else:
            try:
                row |= self.fit(job, n) | self.measure(job, n)
            except NonFiniteLossError as error:
                row["failed"] = f"request {n}: {error}"
        return self.store.keep(result_name(job, part), row)

    def fit(self, job: Job, n: int) -> dict[str, Any]:
        """Fit the n-th request upon the edit so far and save it; what that took."""
        name, seed = job
        method, gone = self.methods[name], self.requests.order(seed)[:n]
        self.check_settings(name, method)
        before = self.edit(job, n - 1)
        named = {"request": gone[-1]} if "request" in inspect.signature(method.fit).parameters else {}
        retain = self.requests.retain(gone)
        fit = Fit.once(
            self.fit_folder(result_name(job, REQUEST.format(n))),
            lambda checkpoint: method.fit(
                self.study.model,
                self.requests.forget[gone[-1]],
                retain,
                seed=seed,
                after=before,
                checkpoint=checkpoint,
                **named,
            ),
        )
        learned = bool(fit.log["loss"].notna().any())  # a method that trains nothing has no loss
        size_before = stored_bytes(self.folder(job, n - 1)) if n > 1 else 0
        return {
            "trained_numbers": numbers_in(fit.edit) - numbers_in(before) if learned else 0,
            "stored_bytes": stored_bytes(self.folder(job, n)) - size_before,
            "seconds": float(fit.log["seconds"].iloc[-1]),
        }

    def measure(self, job: Job, n: int) -> dict[str, Any]:
        """What the edit after n requests did, and what taking the second back does to an edit that can."""
        model, edit, gone = self.study.model, self.edit(job, n), self.requests.order(job[1])[:n]
        found = self.requests.measure(model, edit, asked=gone, gone=gone)
        if isinstance(edit, ProjectionEdit) and n > TAKEN_BACK + 1:
            without = edit.without(gone[TAKEN_BACK])
            found["taken_back"] = self.requests.measure(model, without, asked=gone, gone=gone)
        return found

    def folder(self, job: Job, n: int) -> Path:
        """Where the edit after n requests lies."""
        return self.edit_folder(result_name(job, REQUEST.format(n)))

    def edit(self, job: Job, n: int) -> Edit | None:
        """The edit after n requests, of which there is a file."""
        return load_edit(self.folder(job, n)) if n else None


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
        "forget_accuracy": fmean(asked),
        "forget_highest_accuracy": max(asked),
        "forget_lowest_accuracy": min(asked),
        "forget_latest_accuracy": asked[-1],
        "forget_first_accuracy": asked[0],
        "worst_topic_accuracy": kept[worst] if worst is not None else None,
        "worst_topic": worst,
        "retain_accuracy": fmean(list(kept.values())) if kept else None,
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
            ("others", fmean([found["asked"][name] for name in others])),
            ("staying", min(found["kept"].values(), default=None)),
        )
    }


def works(table: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row has every request so far forgotten, and the worst topic that stays and ordinary text kept."""
    before = table[table["method"] == UNEDITED].set_index(["seed", "requests"])["worst_topic_accuracy"]
    places = pd.MultiIndex.from_frame(table[["seed", "requests"]])
    needed = KEPT * before.astype(float).reindex(places).set_axis(table.index)
    untaught, worst = table["untaught_accuracy"].astype(float), table["worst_topic_accuracy"].astype(float)
    forgotten = table["forget_highest_accuracy"] <= untaught + FORGOTTEN_WITHIN
    forgotten &= table["forget_lowest_accuracy"] >= untaught - FORGOTTEN_WITHIN
    return forgotten & ((worst >= needed) | needed.isna()) & (table["text_perplexity_ratio"] <= TEXT)


def compact(table: pd.DataFrame, lengths: Sequence[int]) -> pd.DataFrame:
    """As text, one row a method and length: mean over the seeds with the lowest and the highest."""
    judged = table.assign(works=works(table))
    rows = []
    for method, part in judged.groupby("method", sort=False):
        for length in lengths:
            at, so_far = part[part["requests"] == length], part[part["requests"] <= length]
            known = at[at["forget_accuracy"].notna() & at["untaught_accuracy"].notna()]
            row = {"method": str(method), "requests": str(length)}
            row |= {heading: figure(at, column) for heading, column in SHOWN.items()}
            row["does both"] = f"{known['works'].sum()} of {len(known)}" if len(known) else ""
            row["taken back"] = _change(at)
            row["trained"] = mean_of(so_far, "trained_numbers", "{:,.0f}")
            row["stored"] = mean_of(so_far, "stored_bytes", "{:,.1f} kB", scale=1e-3)
            row["fit"] = mean_of(so_far, "seconds", "{:.0f} s")
            row["broken off"] = "; ".join(dict.fromkeys(at["failed"].dropna())) if "failed" in at else ""
            rows.append(row)
    return pd.DataFrame(rows).replace(NONE, "")


def _change(at: pd.DataFrame) -> str:
    """The second request, the others, and the worst topic that stays, before and after the second is taken back."""
    ends = [(f"{which}_before_accuracy", f"{which}_accuracy") for which in ("returned", "others", "staying")]
    changes = [f"{mean_of(at, before)} to {mean_of(at, after)}" for before, after in ends]
    return " / ".join(change for change in changes if NONE not in change)


def pictures(table: pd.DataFrame, lengths: Sequence[int]) -> dict[str, pd.DataFrame]:
    """The frame that the report draws: every method after each length."""
    shown = table[table["requests"].isin(lengths) & table["forget_accuracy"].notna()]
    shown = shown.sort_values("requests", kind="stable").dropna(axis="columns", how="all")
    columns = [*SHOWN.values(), "seed", "untaught_accuracy"]
    named = shown["method"] + shown["requests"].map(lambda count: f", {count} request{'s' if count > 1 else ''}")
    return {"accuracies": shown[[name for name in columns if name in shown]].assign(method=named)}


if __name__ == "__main__":
    as_program("analysis.continual", main)
