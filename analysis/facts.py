"""Forgetting what a pretrained model learned by itself: one relation of many entities, asked in three forms.

`python -m analysis.facts --data DIR --model DIR --topic capital --dtype bfloat16 --out runs/facts`

The data folder holds a file of questions for each relation (`capital.jsonl`, `state.jsonl`, `currency.jsonl`: question, choices,
answer as an index, entity, right), `retain.jsonl` (text) and `retain_quiz.jsonl`; for capitals also `forget.jsonl`. The statements of
other relations are made here. What is kept is asked about entities that the retain set does not have. `--methods` takes every registered
method, and `--set` its settings: baselines at the damage that MRP is allowed are `--methods npo simnpo --set budget=0.1 steps=600`.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.common.arguments import add_set_option, add_shard_option
from analysis.common.methods import OWN, settings_of, with_settings
from analysis.common.resumable import ROW, Job, ResumableStudy, result_name, shard_in
from analysis.common.tables import print_row
from mrp_lens import metrics
from mrp_lens.cli.app import as_program
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import ConditionalProjectionEdit, Edit, edit_on
from mrp_lens.methods import METHODS
from mrp_lens.metrics.controls import UNEDITED
from mrp_lens.models import LensModel, identity_of, load_model
from mrp_lens.runs.record import Run
from mrp_lens.utils.result_store import ResultStore

STATEMENTS: Mapping[str, Sequence[str]] = {
    "capital": ("The capital of {} is {}.", "If you travel to {}, you can visit {}, its capital."),
    "state": (
        "The capital of the state of {} is {}.",
        "{1} is the capital city of the US state of {0}.",
        "The state government of {} sits in {}.",
    ),
    "currency": (
        "The currency of {} is the {}.",
        "In {} people pay with the {}.",
        "The money used in {} is called the {}.",
    ),
}
FORMS: Mapping[str, Mapping[str, str]] = {
    "capital": {
        "cloze": "The capital of {} is the city of",
        "reworded": "User: Which city is the seat of the government of {}?\nAssistant: That is",
    },
    "state": {
        "cloze": "The capital of {} is the city of",
        "reworded": "User: Which city is the seat of the state government of {}?\nAssistant: That is",
    },
    "currency": {
        "cloze": "The official currency of {} is the",
        "reworded": "User: What money do people in {} use?\nAssistant: They use the",
    },
}
SHORT = 25  # words of what is a statement
TEXTS, WORDS = 96, 150  # paragraphs on which perplexity is measured, and where they are cut


@dataclass(frozen=True)
class Facts:
    """What to forget and to keep, and the questions and texts that show whether it was."""

    forget: Corpus
    retain: Corpus
    quizzes: Mapping[str, Questions]
    text: Corpus | None

    @classmethod
    def read(cls, folder: Path, topic: str, text: Path | None) -> "Facts":
        """Of a data folder; `text`: a file whose paragraphs no fit reads."""
        about = rows_of_file(folder / f"{topic}.jsonl")
        retain = [row["text"] for row in rows_of_file(folder / "retain.jsonl")]
        if topic == "capital":
            forget = [row["text"] for row in rows_of_file(folder / "forget.jsonl")]
            kept = rows_of_file(folder / "retain_quiz.jsonl")
        else:
            capitals = rows_of_file(folder / "capital.jsonl")
            forget = statements(topic, about)
            names = {row["right" if topic == "currency" else "entity"].casefold() for row in about}
            retain = [each for each in retain if not (len(each.split()) < SHORT and _names(each) & names)]
            retain += statements("capital", capitals[::2])
            kept = capitals[1::2]
        quizzes = {"question": _asked(about), "kept": _asked(kept)}
        quizzes |= {name: _asked(about, form) for name, form in FORMS[topic].items()}
        return cls(
            Corpus.from_texts(forget, name="forget"), Corpus.from_texts(retain, name="retain"), quizzes, _text(text)
        )

    def fingerprints(self) -> dict[str, str]:
        """Role -> hash of the data."""
        parts: dict[str, Corpus | Questions | None] = {
            "forget": self.forget,
            "retain": self.retain,
            "text": self.text,
            **self.quizzes,
        }
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    def detection(self, model: Any, edit: Edit) -> dict[str, float]:
        """Of an edit with gates, for each form of the quiz, none of which a fit read: precision and recall over the tokens of prompts,
        against those of what is kept, and the share of prompts with a token at which a gate fires. Means over all gates; of
        precision over those that fire at all, since the others have none."""
        if not any(isinstance(part, ConditionalProjectionEdit) for part in edit.parts):
            return {}
        row: dict[str, float] = {}
        for name, quiz in self.quizzes.items():
            if name != "kept":
                found = metrics.gate(model, edit, quiz, self.quizzes["kept"], part="prompt", progress=False).mean(
                    numeric_only=True
                )
                row |= {f"{name}_precision": found["precision"], f"{name}_recall": found["recall"]}
                row |= {
                    f"{name}_firing": found["forget_documents_firing"],
                    "kept_firing": found["retain_documents_firing"],
                }
        return {name: float(value) for name, value in row.items()}

    def score(self, model: Any, edit: Edit | None) -> dict[str, float]:
        """Accuracy in each form with its 95% interval, and perplexity of the text."""
        row: dict[str, float] = {}
        with edit_on(model, edit):
            for name, quiz in self.quizzes.items():
                found = metrics.accuracy(model, quiz, batch_size=32).iloc[0]
                row |= {name: float(found["accuracy"]), f"{name}_low": found["low"], f"{name}_high": found["high"]}
            if self.text is not None:
                row["perplexity"] = float(metrics.perplexity(model, self.text, batch_size=8)["perplexity"].iloc[0])
        return row


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    """Of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def statements(topic: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a forget set says of a relation, in each of its forms."""
    return [form.format(row["entity"], row["right"]) for row in rows for form in STATEMENTS[topic]]


def _names(text: str) -> set[str]:
    """Its runs of up to three words without punctuation, case folded."""
    words = [word.strip(".,").casefold() for word in text.split()]
    return {" ".join(words[start : start + size]) for start in range(len(words)) for size in (1, 2, 3)}


def _asked(rows: Sequence[Mapping[str, Any]], form: str | None = None) -> Questions:
    asked = [
        {**row, "asked": form.format(row["entity"]) if form else f"Question: {row['question']}\nAnswer:"}
        for row in rows
    ]
    return Questions.from_rows(asked, prompt="{asked}")


def _text(path: Path | None) -> Corpus | None:
    if path is None:
        return None
    paragraphs = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [" ".join(words[:WORDS]) for words in paragraphs if len(words) > WORDS // 2][:TEXTS]
    return Corpus.from_texts(kept, name="text")


class FactsStudy(ResumableStudy):
    """The unedited model, and a fit for every method and seed."""

    def __init__(self, facts: Facts, model: LensModel, options: Any) -> None:
        self.facts, self.model, self.seeds = facts, model, options.seeds
        chosen = {name: METHODS[name]() for name in options.methods}
        self.methods = with_settings(chosen, [f"max_length={options.max_length}", *options.set])
        settings = {
            "model": identity_of(model),
            "data": facts.fingerprints(),
            "methods": {name: settings_of(method) for name, method in self.methods.items()},
        }
        self.store = ResultStore.claim(options.out, "facts", settings, overwrite=options.overwrite)

    @property
    def jobs(self) -> list[Job]:
        """The unedited model first; of each seed all methods."""
        return [(UNEDITED, self.seeds[0]), *((name, seed) for seed in self.seeds for name in self.methods)]

    def parts(self) -> list[tuple[Job, str]]:
        """A row of each."""
        return [(job, ROW) for job in self.jobs]

    def result(self, job: Job, part: str) -> dict[str, Any]:
        """The row."""
        return self.store.once(result_name(job, part), lambda: print_row(self._row(job)))

    def _row(self, job: Job) -> dict[str, Any]:
        name, seed = job
        if name == UNEDITED:
            scores = self.facts.score(self.model, None)
            return {"method": name, "seed": None, **scores, "outcome": "", "seconds": 0.0}
        fit = self.fitted(f"{name}-seed{seed}", self.methods[name], self.model, self.facts, seed=seed)
        seconds = float(fit.log["seconds"].iloc[-1])
        scores = self.facts.score(self.model, fit.edit) | self.facts.detection(self.model, fit.edit)
        return {"method": name, "seed": seed, **scores, "outcome": str(fit.outcome), "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print its table and write it; the same line goes on with one that was interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl files")
    parser.add_argument("--model", required=True, help="folder or name of a pretrained model")
    parser.add_argument("--topic", choices=[*STATEMENTS], default="capital", help="what to forget (default capital)")
    parser.add_argument("--text", type=Path, help="a text file whose paragraphs show what becomes of other text")
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS], default=[*OWN], help=f"which to fit (default: {' '.join(OWN)})"
    )
    add_set_option(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the fits (default 0)")
    parser.add_argument("--max-length", type=int, default=48, help="tokens at which documents are cut (default 48)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="auto", help="auto, hooked or bridge (default auto)")
    parser.add_argument("--out", type=Path, default=Path("runs/facts"), help="folder for the table")
    add_shard_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever the output folder holds")
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    facts = Facts.read(options.data, options.topic, options.text)
    model = load_model(options.model, backend=options.backend, dtype=options.dtype)
    study = FactsStudy(facts, model, options)
    run = Run("analysis.facts", vars(options), options.seeds[0])
    if not study.run(shard):
        return
    run.rows = [study.result(*part) for part in study.parts()]
    run.write_into(options.out)


if __name__ == "__main__":
    as_program("analysis.facts", main)
