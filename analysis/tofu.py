"""Forgetting real text: TOFU's authors in a small model that knows them, beside one that never saw them.

`python -m analysis.tofu --data DIR --model DIR --reference DIR --out runs/tofu`

The data folder holds `forget.jsonl`, `retain.jsonl` and `forget_paraphrased.jsonl` (question, answer), and
`forget_quiz.jsonl`, `retain_quiz.jsonl` (question, choices, answer as an index). The reference is a model taught the
retain set only. With `--benchmark N` the field's measures are taken as well (`metrics.rows_for("benchmark", ...)`): extraction strength,
truth ratio, forget quality, membership inference, answers in the model's own words, utility, depth; on N documents and questions a
side, since answers are written. With `--tuning` ten authors of the retain set are forgotten instead, whom the benchmark does not score
as forgotten: that is where the settings under TUNED come from. The reference was taught these, so that it is refused there. `--methods`
takes every registered method, and `--set` its settings: a baseline at the damage that RMU is allowed is `--methods npo --set
npo.budget=0.05 npo.steps=600`.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.common.arguments import add_set_option, add_shard_option
from analysis.common.methods import settings_of, with_settings
from analysis.common.resumable import ROW, Job, ResumableStudy, result_name, shard_in
from analysis.common.tables import print_row
from mrp_lens import metrics
from mrp_lens.cli.app import as_program
from mrp_lens.data import Corpus, Questions, UnlearningTask
from mrp_lens.edits import Edit, edit_on
from mrp_lens.methods import METHODS as registry
from mrp_lens.methods import MRP, RMU, AdaptiveRMU
from mrp_lens.metrics import Measured
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.models import LensModel, identity_of, load_model
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.utils.frames import by_figure, frame_of, rows_of
from mrp_lens.utils.result_store import ResultStore

QUESTION, ANSWER = "Question: {question}\nAnswer:", " {answer}"
METHODS: Mapping[str, Any] = {method.name: method for method in (MRP(), RMU(), AdaptiveRMU())}
TUNED: Mapping[str, Any] = {
    "rmu-tuned": RMU(
        layer=2, alpha=4.0, lr=0.007, steps=150, batch_size=16, errors="absolute", budget=None, coverage=None
    )
}
TUNING_QUESTIONS = 200  # those on the first ten authors of the retain set


@dataclass(frozen=True)
class Benchmark:
    """What to forget, what to keep, and the questions and answers by which either is measured."""

    forget: Corpus
    retain: Corpus
    paraphrased: Corpus | None
    forget_quiz: Questions
    retain_quiz: Questions

    @classmethod
    def read(cls, folder: Path, *, tuning: bool) -> "Benchmark":
        """The benchmark of a folder, or the one for tuning made of its retain set."""
        corpus = {
            name: Corpus.from_file(folder / f"{name}.jsonl", prompt=QUESTION, completion=ANSWER)
            for name in ("forget", "retain", "forget_paraphrased")
        }
        quiz = {
            name: Questions.from_file(folder / f"{name}_quiz.jsonl", prompt=QUESTION) for name in ("forget", "retain")
        }
        if not tuning:
            return cls(corpus["forget"], corpus["retain"], corpus["forget_paraphrased"], quiz["forget"], quiz["retain"])
        texts, questions = corpus["retain"].documents, quiz["retain"].questions
        return cls(
            Corpus(texts[:TUNING_QUESTIONS], "tuning-forget"),
            Corpus(texts[TUNING_QUESTIONS:], "tuning-retain"),
            None,
            Questions(questions[:TUNING_QUESTIONS], "tuning-forget"),
            Questions(questions[TUNING_QUESTIONS:], "tuning-retain"),
        )

    def fingerprints(self) -> dict[str, str]:
        """Role -> hash of the data."""
        parts: dict[str, Corpus | Questions | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    def score(self, model: Any, edit: Edit | None) -> dict[str, float]:
        """Quiz accuracy and mean probability per token of the answers, each with its 95% interval."""
        row: dict[str, float] = {}
        quizzes = {"forget": self.forget_quiz, "retain": self.retain_quiz}
        texts = {"forget": self.forget, "paraphrased": self.paraphrased, "retain": self.retain}
        with edit_on(model, edit):
            for side, quiz in quizzes.items():
                figures = metrics.accuracy(model, quiz, progress=True).iloc[0]
                row |= _with_interval(f"{side}_accuracy", figures["accuracy"], figures)
            for side, corpus in texts.items():
                if corpus is not None:
                    figures = metrics.answer_probability(model, corpus, progress=True).iloc[0]
                    row |= _with_interval(f"{side}_probability", figures["probability"], figures)
        return row

    def measured(self, model: Any, edit: Edit | None, reference: Any, neutral: Corpus | None, limit: int) -> Measured:
        """What the field's measures look at; of the forget set the paraphrases are text that no model was taught."""
        held_out = self.retain if neutral is None else neutral
        return Measured(
            model=model,
            task=UnlearningTask((self.forget,), self.retain, held_out, self.forget_quiz, self.retain_quiz),
            edit=edit,
            reference=reference,
            unseen=self.paraphrased,
            limit=limit,
            documents=limit,
        )


def _with_interval(key: str, value: Any, figures: Any) -> dict[str, float]:
    return {key: float(value), f"{key}_low": float(figures["low"]), f"{key}_high": float(figures["high"])}


class TofuStudy(ResumableStudy):
    """The unedited model, the one that never saw the forget set, and a fit for every method."""

    def __init__(
        self,
        benchmark: Benchmark,
        methods: Mapping[str, Any],
        model: LensModel,
        reference: LensModel | None,
        options: Any,
    ) -> None:
        self.benchmark, self.methods, self.model, self.reference = benchmark, methods, model, reference
        self.seed, self.limit = options.seed, options.benchmark
        self.neutral = Corpus.from_file(options.neutral) if options.neutral else None
        settings = {
            "model": identity_of(model),
            "reference": reference and identity_of(reference),
            "data": benchmark.fingerprints(),
            "benchmark": self.limit,
            "neutral": self.neutral and self.neutral.fingerprint,
            "methods": {name: settings_of(method) for name, method in methods.items()},
        }
        self.store = ResultStore.claim(options.out, "tofu", settings, overwrite=options.overwrite)

    @property
    def jobs(self) -> list[Job]:
        """The models first."""
        models = [UNEDITED] if self.reference is None else [UNEDITED, NEVER_TAUGHT]
        return [(name, self.seed) for name in (*models, *self.methods)]

    def parts(self) -> list[tuple[Job, str]]:
        """A row of each, with its frames."""
        return [(job, ROW) for job in self.jobs]

    def result(self, job: Job, part: str) -> dict[str, Any]:
        """The row, and the rows of each frame by the name of its figure."""
        return self.store.once(result_name(job, part), lambda: self._scored(job))

    def frames(self) -> dict[str, pd.DataFrame]:
        """Of all of them, by the name of the figure."""
        found = {job[0]: self.result(job, part)["frames"] for job, part in self.parts()}
        return by_figure(
            {method: {figure: frame_of(rows) for figure, rows in frames.items()} for method, frames in found.items()}
        )

    def _scored(self, job: Job) -> dict[str, Any]:
        name, seed = job
        if name in (UNEDITED, NEVER_TAUGHT):
            return self._looked_at(name, self.model if name == UNEDITED else self.reference, None)
        fit = self.fitted(f"{name}-seed{seed}", self.methods[name], self.model, self.benchmark, seed=seed)
        ended = "" if fit.outcome is None else str(fit.outcome)
        return self._looked_at(name, self.model, fit.edit, ended, float(fit.log["seconds"].iloc[-1]))

    def _looked_at(
        self, name: str, model: Any, edit: Edit | None, outcome: str = "", seconds: float = 0.0
    ) -> dict[str, Any]:
        """The row, which is printed, and the frames."""
        scores = self.benchmark.score(model, edit)
        frames: Mapping[str, pd.DataFrame] = {}
        if self.limit:
            measured = self.benchmark.measured(model, edit, self.reference, self.neutral, self.limit)
            more, frames = metrics.rows_and_frames_for("benchmark", measured)
            scores = {**more, **scores}
        return {
            "row": print_row({"method": name, **scores, "outcome": outcome, "seconds": seconds}),
            "frames": {figure: rows_of(frame) for figure, frame in frames.items()},
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print its table and write it; the same line goes on with one that was interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl files")
    parser.add_argument("--model", type=Path, required=True, help="the model that knows forget and retain set")
    parser.add_argument("--reference", type=Path, help="the model that never saw the forget set")
    known = {**{name: kind() for name, kind in registry.items()}, **METHODS, **TUNED}
    usual = [*METHODS, *TUNED]
    parser.add_argument("--methods", nargs="+", choices=known, default=usual, help=f"default: {' '.join(usual)}")
    add_set_option(parser)
    parser.add_argument("--benchmark", type=int, metavar="N", help="the field's measures, on N documents a side")
    parser.add_argument("--neutral", type=Path, help="text to measure damage on (default: the retain set)")
    parser.add_argument("--tuning", action="store_true", help="forget ten authors of the retain set instead")
    parser.add_argument("--backend", default="auto", help="auto, hooked or bridge (default auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/tofu"), help="folder for the table")
    add_shard_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever the output folder holds")
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    if options.tuning and options.reference:
        parser.error(
            "--reference was taught the retain set, of which --tuning makes what is forgotten: it knows that, and is no never-taught "
            "model there; leave out one of the two"
        )
    methods = with_settings({name: known[name] for name in options.methods}, options.set)
    benchmark = Benchmark.read(options.data, tuning=options.tuning)
    model = load_model(options.model, backend=options.backend)
    reference = load_model(options.reference, backend=options.backend) if options.reference else None
    study = TofuStudy(benchmark, methods, model, reference, options)
    run = Run("analysis.tofu", vars(options), options.seed)
    if not study.run(shard):
        return
    run.rows = [study.result(*part)["row"] for part in study.parts()]
    run.frames = study.frames()
    run.write_into(options.out)
    report(options.out)


if __name__ == "__main__":
    as_program("analysis.tofu", main)
