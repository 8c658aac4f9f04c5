"""`mrp-lens unlearn`: fit, measure before and after, save, on anybody's model and data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mrp_lens import metrics
from mrp_lens.cli.show import Column, console, percent, show_examples, show_table
from mrp_lens.corpus import Corpus, Questions
from mrp_lens.files import check_free
from mrp_lens.generation import continuations
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, Fit
from mrp_lens.model import LensModel, load_model
from mrp_lens.runs import Run

METHODS: dict[str, type[MRP] | type[RMU] | type[AdaptiveRMU]] = {"mrp": MRP, "rmu": RMU, "adaptive-rmu": AdaptiveRMU}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB = "hub:"
EXAMPLES = 3
HELD_OUT = 200  # at most this many retain documents are kept from the fit, and at most a tenth


@dataclass(frozen=True)
class DataOptions:
    """Where the data are and how to read them. None: as the schema says, else the defaults of the library."""

    forget: tuple[str, ...]
    retain: str
    questions: str | None
    retain_questions: str | None
    field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    question_prompt: str | None = None
    choices: str | None = None
    answer: str | None = None
    forget_schema: str | None = None
    retain_schema: str | None = None
    questions_schema: str | None = None

    def corpus(self, source: str, schema: str | None) -> Corpus:
        """Read one corpus: a file, a folder or `hub:NAME[:CONFIG[:SPLIT]]`."""
        columns = {"field": self.field, "prompt": self.prompt, "completion": self.completion}
        if source.startswith(HUB):
            path, config, split = hub_parts(source)
            return Corpus.from_hub(path, config=config, split=split, schema=schema, **columns)
        return Corpus.from_file(source, schema=schema, **columns)

    def quiz(self, source: str | None) -> Questions | None:
        """Read one quiz, likewise, if there is one."""
        if source is None:
            return None
        choices = self.choices.split(",") if self.choices is not None and "," in self.choices else self.choices
        prompt, answer, schema = self.question_prompt, self.answer, self.questions_schema
        if source.startswith(HUB):
            path, config, split = hub_parts(source)
            return Questions.from_hub(
                path, config=config, split=split, prompt=prompt, choices=choices, answer=answer, schema=schema
            )
        return Questions.from_file(source, prompt=prompt, choices=choices, answer=answer, schema=schema)


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of `hub:NAME[:CONFIG[:SPLIT]]`; an empty configuration is the usual one.

    Raises:
        ValueError: there is no name, or there are more parts.
    """
    path, *rest = source.removeprefix(HUB).split(":")
    if not path or len(rest) > 2:
        raise ValueError(
            f"{source!r} is no data set of the Hub; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"
        )
    config, split = (*rest, "", "")[:2]
    return path, config or None, split or None


def run_unlearn(
    *,
    model_name: str,
    method: str,
    layers: str | None,
    released: bool,
    hyperparameters: Mapping[str, Any],
    data: DataOptions,
    out: Path,
    backend: str,
    dtype: str,
    device: str | None,
    seed: int,
    overwrite: bool,
) -> Run:
    """Fit, measure, print, write; returns the record."""
    check_free(out, overwrite=overwrite)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose {', '.join(DTYPES)}")
    fitter = make_method(method, layers, hyperparameters, released=released)
    forget = [data.corpus(source, data.forget_schema) for source in data.forget]
    kept, held_out = split_tenth(data.corpus(data.retain, data.retain_schema))
    quizzes = {"forget": data.quiz(data.questions), "retain": data.quiz(data.retain_questions)}
    arguments = {
        "model": model_name,
        "method": method,
        "layers": layers,
        "released": released,
        **hyperparameters,
        **asdict(data),
        "backend": backend,
        "dtype": dtype,
    }
    run = Run("unlearn", arguments, seed)
    console.print(f"Loading {model_name} ...")
    model = load_model(model_name, backend=backend, device=device, dtype=DTYPES[dtype])
    prompts = example_prompts(model, forget, kept)
    before = measure(model, forget, held_out, quizzes)
    written = continuations(model, prompts)
    fit: Fit = fitter.fit(model, forget, kept, seed=seed)
    if fit.interrupted:
        run.notes.append(f"interrupted after {len(fit.log)} steps: the edit holds what was learned until then")
    with fit.edit.applied(model):
        after = measure(model, forget, held_out, quizzes)
        rewritten = continuations(model, prompts)
    base = before["text_perplexity"]
    run.rows = [
        {"method": name, **figures, "text_perplexity_ratio": figures["text_perplexity"] / base, "seconds": seconds}
        for name, figures, seconds in (("unedited", before, 0.0), (method, after, float(fit.log["seconds"].iloc[-1])))
    ]
    run.examples = [
        dict(prompt=p, unedited=a, **{method: b}) for p, a, b in zip(prompts, written, rewritten, strict=True)
    ]
    show_table(f"Forgetting {', '.join(corpus.name for corpus in forget)}", columns(before), run.rows, caption=CAPTION)
    show_examples(run.examples)
    for note in run.notes:
        console.print(note)

    def save_fit(folder: Path) -> None:
        fit.edit.save_pretrained(folder / "edit")
        fit.log.to_csv(folder / "log.csv", index=False)

    run.write(out, overwrite=overwrite, extras=[save_fit])
    console.print(
        f"Written to {out}: edit/, log.csv, table.csv, summary.json. Load it with mrp_lens.load_edit({str(out / 'edit')!r})."
    )
    return run


CAPTION = (
    "forget text: mean probability per token of the forget documents. Brackets: 95%, bootstrap. text: perplexity of retain documents "
    "that the fit did not see, as a multiple of the unedited model's. Chance is what guessing gives; below it, the answer is suppressed, not gone."
)


def make_method(
    method: str, layers: str | None, hyperparameters: Mapping[str, Any], *, released: bool = False
) -> MRP | RMU | AdaptiveRMU:
    """The method with its hyperparameters; those not given are the library's, or the released code's.

    Raises:
        ValueError: layers that are no numbers, a hyperparameter that the method does not have, or no released recipe.
    """
    kind = METHODS[method]
    try:
        numbers = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"--layers takes numbers such as 3,5, got {layers!r}") from error
    known = set(kind.__dataclass_fields__)
    foreign = [name for name in hyperparameters if name not in known]
    if foreign:
        raise ValueError(f"{method} has no --{foreign[0].replace('_', '-')}; it has {', '.join(sorted(known))}")
    options = dict(hyperparameters)
    if numbers is not None and kind is MRP:
        options["layers"] = numbers
    elif numbers is not None:
        if len(numbers) != 1:
            raise ValueError(f"{method} steers at one layer; got --layers {layers}")
        options["layer"] = numbers[0]
    if not released:
        return kind(**options)
    if issubclass(kind, MRP):
        raise ValueError(f"--released is for rmu and adaptive-rmu; {method} has no released recipe here")
    return replace(kind.released(), **options)


def split_tenth(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """(for the fit, held out): every tenth document, at most 200, is kept from the fit; under ten documents, none is."""
    places = set(range(9, len(corpus), 10)[:HELD_OUT])
    if not places:
        console.print(f"{corpus.name}: under 10 documents, so text perplexity is measured on what the fit saw")
        return corpus, corpus
    kept = tuple(document for i, document in enumerate(corpus.documents) if i not in places)
    held = tuple(document for i, document in enumerate(corpus.documents) if i in places)
    return replace(corpus, documents=kept), replace(corpus, documents=held)


def measure(
    model: LensModel, forget: list[Corpus], held_out: Corpus, quizzes: Mapping[str, Questions | None]
) -> dict[str, float]:
    """All figures of one row."""
    texts = Corpus(tuple(document for corpus in forget for document in corpus.documents), "forget")
    probability = metrics.answer_probability(model, texts, progress=True).iloc[0]
    row = {
        f"forget_probability{suffix}": float(probability[name])
        for name, suffix in (("probability", ""), ("low", "_low"), ("high", "_high"))
    }
    row["text_perplexity"] = float(metrics.perplexity(model, held_out, progress=True)["perplexity"].iloc[0])
    for side, quiz in quizzes.items():
        if quiz is not None:
            figures = metrics.accuracy(model, quiz, progress=True).iloc[0]
            row |= {f"{side}_{name}": float(figures[name]) for name in ("accuracy", "low", "high", "chance")}
    return row


def columns(figures: Mapping[str, float]) -> list[Column]:
    """The columns that these figures fill."""
    chosen: list[Column] = [
        ("method", lambda row: str(row["method"])),
        (
            "forget text",
            lambda row: (
                f"{percent(row['forget_probability'])} [{percent(row['forget_probability_low'])}, {percent(row['forget_probability_high'])}]"
            ),
        ),
    ]
    for side, heading in (("forget", "forget quiz"), ("retain", "retain quiz")):
        if f"{side}_accuracy" in figures:
            chosen.append((f"{heading} (chance {percent(figures[f'{side}_chance'])})", _quiz_cell(side)))
    return [
        *chosen,
        ("text", lambda row: f"x{row['text_perplexity_ratio']:.3f}"),
        ("fit", lambda row: f"{row['seconds']:.0f} s"),
    ]


def _quiz_cell(side: str) -> Any:
    return lambda row: (
        f"{percent(row[f'{side}_accuracy'])} [{percent(row[f'{side}_low'])}, {percent(row[f'{side}_high'])}]"
    )


def example_prompts(model: LensModel, forget: list[Corpus], retain: Corpus) -> list[str]:
    """Prompts of the first documents; of a document without prompt, the first half of its first twelve words."""
    documents = [corpus.documents[0] for corpus in forget][:EXAMPLES] + list(retain.documents[:EXAMPLES])
    return [
        document.prompt
        or " ".join(document.completion.split()[:12][: max(1, len(document.completion.split()[:12]) // 2)])
        for document in documents
    ]
