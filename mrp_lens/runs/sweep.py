"""Per-layer effects: the same methods fitted at one layer after another, point by point, in a folder that can be resumed."""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mrp_lens import metrics
from mrp_lens.data import UnlearningTask
from mrp_lens.edits import Edit
from mrp_lens.edits.subspace import random_units
from mrp_lens.methods import METHODS, RMU, AdaptiveRMU, Fit, Method
from mrp_lens.methods.rmu import default_layer
from mrp_lens.metrics import Measured, rows_for
from mrp_lens.metrics.controls import UNEDITED
from mrp_lens.models import LensModel, check_layers, identity_of
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.training import NonFiniteLossError
from mrp_lens.training.checkpoints import CheckpointError
from mrp_lens.training.loop import TooLittleMemoryError
from mrp_lens.utils.io import as_json, one_line
from mrp_lens.utils.result_store import ResultStore
from mrp_lens.utils.sequences import spread_over
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_shard, check_whole, generator_for, meant, or_default

QUIZZES = {"forget": "questions", "retain": "retain_questions"}  # side -> what an UnlearningTask calls its quiz
FITS = "fits"  # of points that are not measured yet
QUICK_LAYERS, QUICK_STEPS, QUICK_QUESTIONS, QUICK_DOCUMENTS = 4, 75, 150, 100
FULL_SEEDS, FULL_DOCUMENTS = (0, 1, 2), 200
FULL_SHARES = (0.25, 1.0, 4.0)
FAILED = "failed: "  # how the outcome of a point without figures begins
OF_STATES = ("forget_cosine", "forget_norm", "retain_cosine", "retain_norm", "null_mean", "null_low", "null_high")


@dataclass(frozen=True)
class Point:
    """One fit: a method at a layer with a coefficient and a seed.

    Attributes:
        method: by name.
        layer: that MRP projects, or that RMU steers at.
        coefficient: how hard: c of RMU in units of the stream, beta of Adaptive RMU; None: the method has no such setting, or
            derives it from the model.
        seed: of the fit.
    """

    method: str
    layer: int
    coefficient: float | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        strength = "" if self.coefficient is None else f"-c{self.coefficient:.6g}"
        return f"{self.method}-layer{self.layer}{strength}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What a sweep covers, and how much it trains and measures at each point. None: derived from the model, or as quick as is
    useful.

    Attributes:
        methods: By name: mrp, mrp-unconditional, rmu, adaptive-rmu, rmu-noise, direction-ablation, and registered ones that are `swept`.
        layers: To fit at. Default: four, evenly spread.
        coefficients: Values of c, in units of the stream, of methods that have a `steering_coeff`. Default: twice the forget
            states' norm at RMU's layer, if there is such a method.
        betas: Values of beta, of methods that have one.
        strengths: Values of any method's strength, by its name; they go before those of `coefficients` and `betas`.
        seeds: Of the fits. Default: 0.
        steps: Updates of each fit, at most. Default: 75, which is too few for many a fit to get to its target.
        questions_limit: Questions asked on each side at each point, evenly spread. Default: 150.
        documents: Documents on each side that states are read from, evenly spread. Default: 100.
        micro_batch: Documents in a pass of a fit, if a batch does not fit into memory. Default: that of the method.
        max_length: Tokens at which a fit cuts documents. Default: 512, or the context if that is shorter.
        full: All layers, seeds 0, 1 and 2, c at a quarter, once and four times its default, as many updates as the methods
            do by default, all questions, 200 documents, where nothing else is given.
    """

    methods: tuple[str, ...] = field(default=("mrp", "rmu", "adaptive-rmu"), metadata={"separator": ","})
    layers: tuple[int, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    betas: tuple[float, ...] = (AdaptiveRMU.beta,)
    strengths: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    steps: int | None = None
    questions_limit: int | None = None
    documents: int | None = None
    micro_batch: int | None = None
    max_length: int | None = None
    full: bool = False

    def __post_init__(self) -> None:
        sweepable = [name for name, kind in METHODS.items() if kind.swept is not None]
        given: Any = self.methods
        if isinstance(given, str):
            raise TypeError(f"methods must be several names, such as ({given!r},), got {given!r}")
        unknown = [method for method in (*self.methods, *self.strengths) if method not in sweepable]
        if unknown or not self.methods:
            near = meant(unknown[0], sweepable) if unknown else ""
            raise ValueError(f"unknown methods {unknown}; {near}choose among {', '.join(sweepable)}")
        varied = {"coefficients": self.coefficients or (), "betas": self.betas, **self.strengths}
        for name, values in varied.items():
            if not all(value > 0 for value in values):
                raise ValueError(f"{name} must be above 0, got {list(values)}")
        for method in self.strengths:
            swept = METHODS[method].swept
            if swept is None or swept.strength is None:
                raise ValueError(f"{method} has no strength to vary; leave it out of strengths")
        check_whole(steps=self.steps, micro_batch=self.micro_batch, max_length=self.max_length)

    def resolved(self, model: LensModel, task: UnlearningTask) -> "ResolvedSweep":
        """Every default filled in."""
        layers, coefficients, full = self.layers, self.coefficients, self.full
        if layers is None:
            layers = tuple(range(model.cfg.n_layers)) if full else default_layers(model, QUICK_LAYERS)
        taken = any(in_stream_units(method) and not self.strengths.get(method) for method in self.methods)
        if coefficients is None and taken:
            usual = default_coefficient(model, task, layer=default_layer(model))
            coefficients = tuple(usual * share for share in (FULL_SHARES if full else (1.0,)))
        return ResolvedSweep(
            methods=self.methods,
            layers=layers,
            coefficients=coefficients,
            betas=self.betas,
            seeds=self.seeds or (FULL_SEEDS if full else (0,)),
            steps=or_default(self.steps, None if full else QUICK_STEPS),
            questions=or_default(self.questions_limit, None if full else QUICK_QUESTIONS),
            documents=or_default(self.documents, FULL_DOCUMENTS if full else QUICK_DOCUMENTS),
            strengths={method: tuple(values) for method, values in self.strengths.items()},
            micro_batch=self.micro_batch,
            max_length=self.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedSweep:
    """A `SweepConfig` with every default filled in; what it says decides which folder a sweep goes on in."""

    methods: tuple[str, ...]
    layers: tuple[int, ...]
    coefficients: tuple[float, ...] | None  # None: no method takes them
    betas: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int | None  # None: each method's own
    questions: int | None
    documents: int
    strengths: Mapping[str, tuple[float, ...]]
    micro_batch: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, number in Counter(point.name for point in self.points()).items():
            if number > 1:
                raise ValueError(
                    f"{number} points would be kept as {name!r}; give coefficients that differ in six digits"
                )

    def settings(self) -> dict[str, Any]:
        """As version 0.1 wrote them; what it did not know, and coefficients that no method takes, only where they are given."""
        if_given = ("strengths", "micro_batch", "max_length", "coefficients")
        return {name: value for name, value in asdict(self).items() if name not in if_given or value}

    def points(self) -> list[Point]:
        """All of them once, in the order of the table."""
        points = [
            Point(method, layer, strength, seed)
            for method in self.methods
            for strength, layer, seed in product(self._strengths(method), self.layers, self.seeds)
        ]
        return list(dict.fromkeys(points))

    def _strengths(self, method: str) -> Sequence[float | None]:
        """The values of its strength; None: it has none, or derives it from the model."""
        swept = METHODS[method].swept
        if swept is None or swept.strength is None:
            return (None,)
        known = {"steering_coeff": self.coefficients, "beta": self.betas}
        return self.strengths.get(method) or or_default(known.get(swept.strength), (None,))

    def fitter(self, point: Point) -> Method:
        """The method of a point.

        Raises:
            ValueError: it is no method for sweeps, or it has no strength, or needs one.
        """
        kind = METHODS[point.method]
        if kind.swept is None or (point.coefficient is not None and kind.swept.strength is None):
            raise ValueError(f"a sweep cannot fit {point.method!r} with coefficient {point.coefficient}")
        place: Any = [point.layer] if kind.swept.layer == "layers" else point.layer
        varied = {kind.swept.layer: place}
        if kind.swept.strength is not None and point.coefficient is not None:
            varied[kind.swept.strength] = point.coefficient
        given = {"steps": self.steps, "micro_batch": self.micro_batch, "max_length": self.max_length}
        known = kind.__dataclass_fields__
        return kind(**varied, **{name: value for name, value in given.items() if name in known and value is not None})


def in_stream_units(method: str) -> bool:
    """Whether a method's strength is a length in the stream, which the norm of its states makes comparable."""
    swept = METHODS[method].swept if method in METHODS else None
    return swept is not None and swept.strength == "steering_coeff"


def default_layers(model: LensModel, count: int) -> tuple[int, ...]:
    """`count` layers, evenly spread from the third to the last; all of them if there are no more."""
    last = int(model.cfg.n_layers) - 1
    return spread_over(min(2, last), last, count)


@ordinary_torch(gradients=False)
def default_coefficient(model: LensModel, task: UnlearningTask, *, layer: int) -> float:
    """c of RMU's default at a layer, to three digits."""
    _, settings, _ = RMU(layer=layer).prepared(model, task.forget, task.retain, after=None, request=None)
    return float(f"{settings.steering_coeff:.3g}")


@ordinary_torch(gradients=True)
def sweep(
    model: LensModel,
    task: UnlearningTask,
    config: SweepConfig | None = None,
    out: str | Path = "runs/sweep",
    *,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> pd.DataFrame | None:
    """Fit and measure every point that has no file yet.

    The folder holds `sweep.json` (the settings) and one file a point, each whole or not at all: a sweep that was
    killed goes on where it stopped, and several processes or machines share one by their shards (merge the folders
    by copying `points/`).

    Args:
        model: HookedTransformer or TransformerBridge; left as it is.
        task: the data, with `questions` and `retain_questions`.
        config: what to cover. None: the quick sweep of `SweepConfig()`.
        out: the folder.
        shard: (i, n): every n-th point from the i-th on, i from 1.
        overwrite: begin anew where the folder holds a run.
        progress: show progress bars.

    Returns:
        One row a point, the unedited model first, once every point of the plan has its file; else None.
        `method`, `layer`, `coefficient`, `seed`; `norm` (mean of the unedited forget states at the layer, in units of
        the stream), `relative_coefficient` (RMU: c over that norm; Adaptive RMU: beta);
        `forget_accuracy`, `retain_accuracy`, the intervals `forget_low`, `forget_high`, `retain_low`, `retain_high`
        (95%, as of `metrics.accuracy`), the controls `untaught_accuracy` (of the same groups of questions, where
        the task has such) and `chance`;
        `forget_cosine`, `retain_cosine` with the fit's u at the layer (MRP: with an unrelated u; None of several forget corpora,
        each of which has a u of its own), the controls
        `null_mean`, `null_low`, `null_high`; `forget_norm`, `retain_norm`; `forget_max_probability`,
        `retain_max_probability`, `forget_max_logit`, `retain_max_logit` (teacher-forced); `text_perplexity_ratio`;
        `outcome` and `updates`: how a fit with a budget ended (`Outcome.ended`), after so many. Of a point whose fit or figures
        became NaN or infinite, or which is refused (the first one is an error), `outcome` is "failed: " and why, and no figure is
        known; it is not fitted again.

    Raises:
        ValueError: the task lacks questions, a layer does not exist, the shard is not 1 <= i <= n or one of several and to overwrite,
            no point at all gave figures, or the folder belongs to a sweep with other settings (which differ is said).
        CheckpointError: an interrupted fit of the folder is of other versions of this package or of torch, or damaged.
        TooLittleMemoryError: memory ran out; what was done stays.
        KeyboardInterrupt: Ctrl-C; the points that are done stay.
    """
    number, count = shard
    check_shard(number, count, overwrite=overwrite)
    missing = {"forget", "retain"} - set(task.quiz())
    if missing:
        wanted = " and ".join(f"{QUIZZES[side]}=..." for side in sorted(missing))
        raise ValueError(f"a sweep needs questions on both sides; give {wanted}, too")
    plan = (config or SweepConfig()).resolved(model, task)
    check_layers(model, plan.layers)
    defaults = {name: as_json(asdict(METHODS[name]())) for name in plan.methods}
    settings = {"model": identity_of(model), "data": task.fingerprints(), **plan.settings(), "defaults": defaults}
    store = ResultStore.claim(out, "sweep", settings, earlier={"data": task.legacy_fingerprints()}, overwrite=overwrite)
    untouched = store.once(UNEDITED, lambda: _measure_unedited(model, task, plan))
    todo = [point for point in plan.points()[number - 1 :: count] if store.stored(point.name) is None]
    with tqdm(todo, desc="points", disable=not progress) as bar:
        for point in bar:
            bar.set_postfix_str(point.name)
            kept = store.folder / FITS / point.name
            try:
                found = _fit_and_measure(model, task, plan, point, untouched, kept, progress=progress)
            except (NonFiniteError, NonFiniteLossError) as error:
                found = {"row": _failed(point, untouched, error)}
            except (CheckpointError, TooLittleMemoryError):  # nothing that the next run would find, too
                raise
            except ValueError as error:  # what cannot be done at one layer may be done at another, but perhaps nowhere
                if not any(store.stored(other.name) for other in plan.points()):
                    raise
                found = {"row": _failed(point, untouched, error)}
            store.keep(point.name, found)
            shutil.rmtree(kept, ignore_errors=True)
    frame = table(store, plan.points())
    if frame is not None and len(frame) > 1 and frame["forget_accuracy"].iloc[1:].isna().all():
        raise ValueError(
            f"none of {len(frame) - 1} points gave figures, the last {frame['outcome'].iloc[-1]}. Sweep other layers or strengths, in another "
            "folder"
        )
    return frame


def table(store: ResultStore, points: Iterable[Point]) -> pd.DataFrame | None:
    """The rows of all points, or None if some are missing; timings are left to the points' files."""
    files = [store.stored(name) for name in (UNEDITED, *(point.name for point in points))]
    if any(file is None for file in files):
        return None
    store.tidy()
    return pd.DataFrame([file["row"] for file in files if file is not None])


def _measure_unedited(model: LensModel, task: UnlearningTask, plan: ResolvedSweep) -> dict[str, Any]:
    """The baseline: its row, the forget states' norm at each layer, and the perplexity that ratios refer to."""
    perplexity = metrics.value(metrics.perplexity(model, task.held_out, progress=False))
    norms = metrics.alignment(
        model,
        task.texts(limit=plan.documents)["forget"],
        torch.ones(model.cfg.d_model),
        layers=plan.layers,
        progress=False,
    ).set_index("layer")["norm"]
    row: dict[str, Any] = {
        "method": UNEDITED,
        **dict.fromkeys(("layer", "coefficient", "seed", "norm", "relative_coefficient")),
    }
    row |= _behaviour(model, task, plan, None) | {"text_perplexity_ratio": 1.0}
    controls: dict[str, float] = {}
    if task.untaught_alike is not None:
        controls["untaught_accuracy"] = metrics.value(metrics.accuracy(model, task.untaught_alike, progress=False))
    asked = task.quiz(limit=plan.questions)["forget"].questions
    controls["chance"] = sum(1 / len(question.choices) for question in asked) / len(asked)
    return {
        "row": row | controls,
        "controls": controls,
        "perplexity": perplexity,
        "norms": {str(layer): float(norm) for layer, norm in norms.items()},
    }


def _fit_and_measure(
    model: LensModel,
    task: UnlearningTask,
    plan: ResolvedSweep,
    point: Point,
    untouched: Mapping[str, Any],
    kept: Path,
    *,
    progress: bool,
) -> dict[str, Any]:
    """The row of a point; its fit is kept in a folder until that is written."""
    method = plan.fitter(point)
    fit = Fit.once(
        kept,
        lambda checkpoint: method.fit(
            model, task.forget, task.retain, seed=point.seed, progress=progress, checkpoint=checkpoint
        ),
    )
    u = next(iter(fit.directions.values()), None)
    if u is None:  # MRP has none: an unrelated one shows what the null looks like
        u = random_units(1, model.cfg.d_model, "uniform", generator_for(point.seed))[0]
    row = _place(point, untouched) | _behaviour(model, task, plan, fit.edit)
    with fit.edit.applied(model):
        perplexity = metrics.value(metrics.perplexity(model, task.held_out, progress=False))
        aligned = metrics.alignment(
            model,
            task.texts(limit=plan.documents),
            u,
            layers=[point.layer],
            seed=point.seed,
            progress=False,
        ).set_index("group")
    row["text_perplexity_ratio"] = perplexity / float(untouched["perplexity"])
    for side in aligned.index:
        row |= {f"{side}_cosine": float(aligned["cosine"][side]), f"{side}_norm": float(aligned["norm"][side])}
    row |= {key: float(aligned[key]["forget"]) for key in ("null_mean", "null_low", "null_high")}
    if len(fit.directions) > 1:  # one a forget corpus, whose states are looked at together here
        row |= dict.fromkeys(key for key in row if key.endswith("_cosine") or key.startswith("null_"))
    row |= untouched["controls"] | {"outcome": fit.ended, "updates": len(fit.log)}
    return {"row": row, "seconds": float(fit.log["seconds"].iloc[-1])}


def _place(point: Point, untouched: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its point before any fit."""
    norm = float(untouched["norms"][str(point.layer)])
    share = point.coefficient
    if share is not None and in_stream_units(point.method):
        share /= norm
    return asdict(point) | {"norm": norm, "relative_coefficient": share}


def _failed(point: Point, untouched: Mapping[str, Any], error: Exception) -> dict[str, Any]:
    """The row of a point that gave no figures, and why."""
    unknown = dict.fromkeys((*untouched["row"], *OF_STATES))
    ended = {"outcome": f"{FAILED}{one_line(error)}", "updates": None}
    return unknown | _place(point, untouched) | untouched["controls"] | ended


def _behaviour(model: LensModel, task: UnlearningTask, plan: ResolvedSweep, edit: Edit | None) -> dict[str, float]:
    """What the registered metrics say of an edit."""
    asked = Measured(model=model, task=task, edit=edit, limit=plan.questions, documents=plan.documents, progress=False)
    return rows_for("sweep", asked)
