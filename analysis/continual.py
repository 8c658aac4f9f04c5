"""Requests to forget that come one after another: what each costs, and whether earlier ones stay forgotten.

`python -m analysis.continual --out runs/continual` (one seed), `--full` (three)

Topics of the demo are requested one after another, in an order that the seed draws; a topic has to stay until it is
requested. With all of them requested only ordinary text is left to be kept. Each request is fitted with the edit so far
in place, and measured: all requests so far, the worst topic that stays, ordinary text, numbers trained, bytes stored and
seconds for this request. From the third request on, an edit that keeps its requests apart also has the second taken back.

For a model of one's own, `--forget a.jsonl b.jsonl c.jsonl --questions qa.jsonl qb.jsonl qc.jsonl --retain r.jsonl
--retain-questions qr.jsonl` are three requests, in an order that the seed draws. There, what must stay is the same
throughout: requests that have not come yet are not part of it. `--reference` is a model that never saw what is forgotten.

Every request's figures and edit lie in the output folder and are gone on with after an interruption; longer sequences
and more methods may be added later; `--shard 1/2` and `--shard 2/2` divide the sequences between two processes.
"""

import argparse
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from analysis.common.arguments import Study, parser_for
from analysis.common.attackers import UNEDITED
from analysis.common.contenders import changed, contenders, names_in, settings_of
from analysis.common.endurance import compact, finding, pictures, rows_of_cells
from analysis.common.sequence import Requests, accuracy, numbers_in
from mrp_lens.cli.parsing import numbers, shard_of
from mrp_lens.data.task import TaskConfig
from mrp_lens.data.world import World
from mrp_lens.edits import Edit, ProjectionEdit, load_edit
from mrp_lens.edits.serialization import stored_bytes
from mrp_lens.models import describe, load_model
from mrp_lens.training.loop import NonFiniteLossError
from mrp_lens.utils.store import ResultStore

FULL_SEEDS = "0,1,2"
TAKEN_BACK = 1  # the second request: one before it and one after it stay

Chain = tuple[str, int]
"""Name of a method, and seed: one sequence of requests."""

Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print its table and what it found, and write it."""
    parser = parser_for(__doc__, "continual")
    parser.set_defaults(topic=World().topics[0], questions=None)
    several = parser.add_argument_group("requests", conflict_handler="resolve")  # here there is more than one of each
    several.add_argument("--topic", nargs="+", dest="topics", help="of the demo's world, to request (default all)")
    several.add_argument(
        "--questions", nargs="+", dest="quizzes", help="a file for each of --forget, in the same order"
    )
    parser.add_argument("--requests", help="lengths of sequences, such as 3,4 (default: all, and all but one)")
    parser.add_argument("--methods", help="separated by commas (default: all)")
    parser.add_argument("--seeds", help="of order and fits, such as 0,1,2 (default: --seed)")
    parser.add_argument("--full", action="store_true", help=f"seeds {FULL_SEEDS}")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="a hyperparameter, such as steps=50 or rmu.alpha=4, of one method or of all that have it",
    )
    parser.add_argument("--limit", type=int, help="at most this many questions of each quiz and topic")
    parser.add_argument("--reference", help="a model that never saw what is forgotten: how absent looks")
    parser.add_argument("--shard", default="1/1", help="i/n: this process's part of the sequences (default 1/1)")
    options = parser.parse_args(arguments)
    parts = shard_of(options.shard)
    study = Study.begin("analysis.continual", "Requests one after another", options, in_place=True)
    campaign = Campaign(study, options)
    cells = campaign.run(parts)
    if cells is None:
        print(f"Shard {options.shard} is done; other requests of {options.out} are still missing.")
        return
    table = rows_of_cells(cells, campaign.unedited())
    print(compact(table, campaign.lengths).to_string(index=False))
    study.end(finding(table, campaign.lengths), pictures(table, campaign.lengths), table, in_place=True)


def requests_of(study: Study, options: argparse.Namespace) -> Requests:
    """Files, or topics of the demo's world.

    Raises:
        ValueError: files without a quiz each, or an unknown topic.
    """
    if not options.forget:
        return Requests.from_world(options.topics or World().topics, limit=options.limit)
    columns = TaskConfig.from_options(vars(options))
    quizzes = [columns.quiz(source) for source in options.quizzes or ()]
    return Requests.of_files(study.task, [quiz for quiz in quizzes if quiz is not None], limit=options.limit)


def with_settings(methods: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The methods with hyperparameters given as `NAME=VALUE` or `METHOD.NAME=VALUE`; a value is JSON, else text.

    Raises:
        ValueError: no such hyperparameter, or no `=`.
    """
    changed = dict(methods)
    for given in texts:
        place, equals, text = given.partition("=")
        method, _, name = place.rpartition(".")
        having = [key for key in methods if method in ("", key) and name in methods[key].__dataclass_fields__]
        if not equals or not having:
            raise ValueError(f"--set {given}: none of {', '.join(methods)} has {place!r}; write NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        changed |= {key: replace(changed[key], **{name: value}) for key in having}
    return changed


class Campaign:
    """Every request of every sequence, each in a file of its own.

    Attributes:
        lengths: of the sequences that are reported; the longest one holds the others.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.requests = requests_of(study, options)
        self.seeds = numbers(options.seeds or (FULL_SEEDS if options.full else str(options.seed)), int, "--seeds") or ()
        self.lengths = self._lengths()
        self.methods = self._methods()
        settings = {
            "model": describe(study.model),
            "data": self.requests.fingerprints(),
            "limit": options.limit,
            "reference": options.reference,
        }
        self.store = ResultStore.claim(options.out, "sequence", settings)

    def _lengths(self) -> tuple[int, ...]:
        count = len(self.requests.forget)
        chosen = numbers(self.options.requests, int, "--requests") or range(max(1, count - 1), count + 1)
        if not 1 <= min(chosen) <= max(chosen) <= count:
            raise ValueError(f"--requests {self.options.requests}: there are {count}; choose lengths from 1 to {count}")
        return tuple(sorted(set(chosen)))

    def _methods(self) -> dict[str, Any]:
        known = contenders(self.study.model)
        chosen = names_in(self.options.methods, known, default=list(known))
        return with_settings({name: known[name] for name in chosen}, self.options.set)

    @property
    def chains(self) -> list[Chain]:
        """The sequences, seed by seed."""
        return [(name, seed) for seed in self.seeds for name in self.methods]

    def run(self, shard: tuple[int, int]) -> list[Cell] | None:
        """Compute this shard's requests that have no file yet; all requests, once every one has.

        Raises:
            ValueError: a method of the folder was fitted with other settings.
        """
        number, count = shard
        mine = self.chains[number - 1 :: count]
        every = range(1, self.lengths[-1] + 1)
        self.unedited()
        with tqdm([(chain, n) for chain in mine for n in every], desc="requests") as bar:
            for chain, n in bar:
                bar.set_postfix_str(piece_of(chain, n))
                self.cell(chain, n)
        if any(self.store.stored(piece_of(chain, n)) is None for chain in self.chains for n in every):
            return None
        self.store.tidy()
        return [self.cell(chain, n) for chain in self.chains for n in every]

    def unedited(self) -> Cell:
        """The model as it is, asked about all requests, and how what was never taught looks, where that is known."""
        return self.store.once(UNEDITED, self.measure_unedited)

    def measure_unedited(self) -> Cell:
        """The same, computed."""
        model, requests = self.study.model, self.requests
        found: Cell = requests.measure(model, None, asked=list(requests.forget), gone=())
        found["untaught_accuracy"] = None
        if requests.untaught is not None:
            found["untaught_accuracy"] = accuracy(model, requests.untaught)
        if self.options.reference:
            never_saw = load_model(self.options.reference, backend=self.options.backend)
            asked = [accuracy(never_saw, quiz) for quiz in requests.quizzes.values()]
            found["untaught_accuracy"] = sum(asked) / len(asked)
        return found

    def cell(self, chain: Chain, n: int) -> Cell:
        """The n-th request of a sequence, from 1: fitted, saved and measured, unless it was before."""
        name, seed = chain
        known = self.store.stored(piece_of(chain, n))
        if known is not None:
            differing = changed(known["settings"], self.methods[name])
            if differing:
                raise ValueError(
                    f"{self.options.out} holds {name} with other settings: {'; '.join(differing)}; choose another folder"
                )
            return known
        order = self.requests.order(seed)
        row: Cell = {"method": name, "seed": seed, "requests": n, "order": list(order[:n])}
        row["settings"] = settings_of(self.methods[name])
        if n > 1 and "failed" in (before := self.cell(chain, n - 1)):
            return self.store.keep(piece_of(chain, n), row | {"failed": before["failed"]})
        try:
            return self.store.keep(piece_of(chain, n), row | self.fit(chain, n) | self.measure(chain, n))
        except NonFiniteLossError as error:
            return self.store.keep(piece_of(chain, n), row | {"failed": f"request {n}: {error}"})

    def fit(self, chain: Chain, n: int) -> Cell:
        """Fit the n-th request upon the edit so far and save it; what that took."""
        name, seed = chain
        method, gone = self.methods[name], self.requests.order(seed)[:n]
        before = self.edit(chain, n - 1)
        named = {"request": gone[-1]} if "request" in inspect.signature(method.fit).parameters else {}
        retain = self.requests.retain(gone)
        started = time.perf_counter()
        fit = method.fit(self.study.model, self.requests.forget[gone[-1]], retain, seed=seed, after=before, **named)
        seconds = time.perf_counter() - started
        if fit.interrupted:
            raise KeyboardInterrupt
        fit.edit.save_pretrained(self.folder(chain, n), overwrite=True)
        learned = bool(fit.log["loss"].notna().any())  # a method that trains nothing has no loss
        return {
            "trained_numbers": numbers_in(fit.edit) - numbers_in(before) if learned else 0,
            "stored_bytes": stored_bytes(self.folder(chain, n))
            - (stored_bytes(self.folder(chain, n - 1)) if n > 1 else 0),
            "seconds": seconds,
        }

    def measure(self, chain: Chain, n: int) -> Cell:
        """What the edit after n requests did, and what taking the second back does to an edit that can."""
        edit, gone = self.edit(chain, n), self.requests.order(chain[1])[:n]
        found = self.requests.measure(self.study.model, edit, asked=gone, gone=gone)
        if isinstance(edit, ProjectionEdit) and n > TAKEN_BACK + 1:
            found["taken_back"] = self.requests.measure(
                self.study.model, edit.without(gone[TAKEN_BACK]), asked=gone, gone=gone
            )
        return found

    def folder(self, chain: Chain, n: int) -> Path:
        """Where the edit after n requests lies."""
        out: Path = self.options.out
        return out / "edits" / piece_of(chain, n)

    def edit(self, chain: Chain, n: int) -> Edit | None:
        """The edit after n requests, of which there is a file."""
        return load_edit(self.folder(chain, n)) if n else None


def piece_of(chain: Chain, n: int) -> str:
    """The name of a result's file."""
    return f"{chain[0]}-seed{chain[1]}-request{n}"


if __name__ == "__main__":
    main()
