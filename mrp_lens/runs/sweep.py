"""Per-layer effects: the same methods fitted at one layer after another, point by point, in a folder that can be resumed."""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mrp_lens import metrics
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits.subspace import random_units
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, Fit
from mrp_lens.methods.rmu import C_SHARE
from mrp_lens.models import LensModel, check_layers, identity_of
from mrp_lens.utils.store import ResultStore
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for

UNEDITED = "unedited"
FITS = "fits"  # of points that are not measured yet
SWEPT = (MRP.name, RMU.name, AdaptiveRMU.name)


@dataclass(frozen=True)
class Point:
    """One fit: a method at a layer with a coefficient and a seed.

    Attributes:
        method: "mrp", "rmu" or "adaptive-rmu".
        layer: that MRP projects, or that RMU steers at.
        coefficient: c of RMU in units of the stream, beta of Adaptive RMU; None: MRP has none.
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


@dataclass(frozen=True)
class Plan:
    """What a sweep covers, and how much it trains and measures at each point.

    Attributes:
        methods: by name.
        layers: to fit at.
        coefficients: c of RMU in units of the stream.
        betas: of Adaptive RMU.
        seeds: of the fits.
        steps: updates of each fit.
        questions: at most this many on each side are asked at each point, evenly spread.
        documents: from at most this many on each side states are read, likewise.
    """

    methods: tuple[str, ...]
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    betas: tuple[float, ...] = (AdaptiveRMU.beta,)
    seeds: tuple[int, ...] = (0,)
    steps: int = 150
    questions: int | None = None
    documents: int | None = 200

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in SWEPT]
        if unknown or not self.methods:
            raise ValueError(f"unknown methods {unknown}; choose among {', '.join(SWEPT)}")
        for name in ("coefficients", "betas"):
            if not all(value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name} must be above 0, got {list(getattr(self, name))}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name, number in Counter(point.name for point in self.points()).items():
            if number > 1:
                raise ValueError(
                    f"{number} points would be kept as {name!r}; give coefficients that differ in six digits"
                )

    def points(self) -> list[Point]:
        """All of them once, in the order of the table."""
        strengths: dict[str, Sequence[float | None]] = {
            MRP.name: (None,),
            RMU.name: self.coefficients,
            AdaptiveRMU.name: self.betas,
        }
        points = [
            Point(method, layer, strength, seed)
            for method in self.methods
            for strength, layer, seed in product(strengths[method], self.layers, self.seeds)
        ]
        return list(dict.fromkeys(points))


def default_layers(model: LensModel, count: int) -> tuple[int, ...]:
    """`count` layers, evenly spread from the third to the last; all of them if there are no more."""
    first, last = min(2, model.cfg.n_layers - 1), model.cfg.n_layers - 1
    steps = max(count - 1, 1)
    return tuple(sorted({first + round(i * (last - first) / steps) for i in range(count)}))


@ordinary_torch(gradients=False)
def default_coefficient(model: LensModel, task: UnlearningTask, *, layer: int) -> float:
    """c of RMU's default: twice the mean norm of the forget states at a layer, to three digits."""
    frame = metrics.alignment(model, task.forget_texts.spread(64), torch.ones(model.cfg.d_model), layers=[layer])
    return float(f"{C_SHARE * frame['norm'].iloc[0]:.3g}")


@ordinary_torch(gradients=True)
def sweep(
    model: LensModel,
    task: UnlearningTask,
    plan: Plan,
    out: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> pd.DataFrame | None:
    """Fit and measure every point that has no file yet.

    The folder holds `sweep.json` (the settings) and one file a point, each whole or not at all: a sweep that was
    killed goes on where it stopped, and several processes or machines share one by their shards (merge the folders
    by copying `points/`).

    Args:
        model: HookedTransformer or TransformerBridge; left as it is.
        case: the data, with `questions` and `retain_questions`.
        plan: what to cover.
        out: the folder.
        shard: (i, n): every n-th point from the i-th on, i from 1.
        progress: show progress bars.

    Returns:
        One row a point, the unedited model first, once every point of the plan has its file; else None.
        `method`, `layer`, `coefficient`, `seed`; `norm` (mean of the unedited forget states at the layer, in units of
        the stream), `relative_coefficient` (RMU: c over that norm; Adaptive RMU: beta);
        `forget_accuracy`, `retain_accuracy`, the intervals `forget_low`, `forget_high`, `retain_low`, `retain_high`
        (95%, bootstrap over questions), the controls `untaught_accuracy` (where the case knows it) and `chance`;
        `forget_cosine`, `retain_cosine` with the fit's u at the layer (MRP: with an unrelated u), the controls
        `null_mean`, `null_low`, `null_high`; `forget_norm`, `retain_norm`; `forget_max_probability`,
        `retain_max_probability`, `forget_max_logit`, `retain_max_logit` (teacher-forced); `text_perplexity_ratio`.

    Raises:
        ValueError: the case lacks questions, a layer does not exist, the shard is not 1 <= i <= n, or the folder
            belongs to a sweep with other settings (which differ is said).
        KeyboardInterrupt: Ctrl-C; the points that are done stay.
    """
    number, count = shard
    if not 1 <= number <= count:
        raise ValueError(f"shard {number}/{count} does not exist; write 1/{count} to {count}/{count}")
    missing = {"forget", "retain"} - set(task.quiz())
    if missing:
        raise ValueError(f"a sweep needs questions on both sides; there are none for {', '.join(sorted(missing))}")
    check_layers(model, plan.layers)
    settings = {"model": identity_of(model), "data": task.fingerprints(), **asdict(plan)}
    store = ResultStore.claim(out, "sweep", settings)
    untouched = store.once(UNEDITED, lambda: _measure_unedited(model, task, plan))
    todo = [point for point in plan.points()[number - 1 :: count] if store.stored(point.name) is None]
    with tqdm(todo, desc="points", disable=not progress) as bar:
        for point in bar:
            bar.set_postfix_str(point.name)
            kept = store.folder / FITS / point.name
            store.keep(point.name, _fit_and_measure(model, task, plan, point, untouched, kept, progress=progress))
            shutil.rmtree(kept, ignore_errors=True)
    return table(store, plan.points())


def table(store: ResultStore, points: Iterable[Point]) -> pd.DataFrame | None:
    """The rows of all points, or None if some are missing; timings are left to the points' files."""
    files = [store.stored(name) for name in (UNEDITED, *(point.name for point in points))]
    if any(file is None for file in files):
        return None
    store.tidy()
    return pd.DataFrame([file["row"] for file in files if file is not None])


def _measure_unedited(model: LensModel, task: UnlearningTask, plan: Plan) -> dict[str, Any]:
    """The baseline: its row, the forget states' norm at each layer, and the perplexity that ratios refer to."""
    perplexity = float(metrics.perplexity(model, task.held_out)["perplexity"].iloc[0])
    norms = metrics.alignment(
        model, task.texts(limit=plan.documents)["forget"], torch.ones(model.cfg.d_model), layers=plan.layers
    ).set_index("layer")["norm"]
    row: dict[str, Any] = {
        "method": UNEDITED,
        **dict.fromkeys(("layer", "coefficient", "seed", "norm", "relative_coefficient")),
    }
    row |= _behaviour(model, task, plan) | {"text_perplexity_ratio": 1.0}
    controls: dict[str, float] = {}
    if task.untaught_questions is not None:
        controls["untaught_accuracy"] = float(metrics.accuracy(model, task.untaught_questions)["accuracy"].iloc[0])
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
    plan: Plan,
    point: Point,
    untouched: Mapping[str, Any],
    kept: Path,
    *,
    progress: bool,
) -> dict[str, Any]:
    """The row of a point; its fit is kept in a folder until that is written."""
    method = _method(plan, point)
    fit = Fit.once(
        kept,
        lambda checkpoint: method.fit(
            model, task.forget, task.retain, seed=point.seed, progress=progress, checkpoint=checkpoint
        ),
    )
    u = next(iter(fit.directions.values()), None)
    if u is None:  # MRP has none: an unrelated one shows what the null looks like
        u = random_units(1, model.cfg.d_model, "uniform", generator_for(point.seed))[0]
    norm = float(untouched["norms"][str(point.layer)])
    share = point.coefficient / norm if point.method == "rmu" and point.coefficient is not None else point.coefficient
    row = asdict(point) | {"norm": norm, "relative_coefficient": share}
    with fit.edit.applied(model):
        row |= _behaviour(model, task, plan)
        perplexity = float(metrics.perplexity(model, task.held_out)["perplexity"].iloc[0])
        aligned = metrics.alignment(
            model, task.texts(limit=plan.documents), u, layers=[point.layer], law="uniform", seed=point.seed
        ).set_index("group")
    row["text_perplexity_ratio"] = perplexity / float(untouched["perplexity"])
    for side in aligned.index:
        row |= {f"{side}_cosine": float(aligned["cosine"][side]), f"{side}_norm": float(aligned["norm"][side])}
    row |= {key: float(aligned[key]["forget"]) for key in ("null_mean", "null_low", "null_high")}
    return {"row": row | untouched["controls"], "seconds": float(fit.log["seconds"].iloc[-1])}


def _method(plan: Plan, point: Point) -> MRP | RMU | AdaptiveRMU:
    layer, strength = point.layer, point.coefficient
    if point.method == MRP.name:
        return MRP(layers=[layer], steps=plan.steps)
    if point.method == RMU.name and strength is not None:
        return RMU(layer=layer, steps=plan.steps, steering_coeff=strength)
    if point.method == AdaptiveRMU.name and strength is not None:
        return AdaptiveRMU(layer=layer, steps=plan.steps, beta=strength)
    raise ValueError(
        f"a sweep cannot fit {point.method!r} with coefficient {strength}; choose among {', '.join(SWEPT)}"
    )


def _behaviour(model: LensModel, task: UnlearningTask, plan: Plan) -> dict[str, float]:
    """Accuracy and confidence on each side."""
    row: dict[str, float] = {}
    for side, quiz in task.quiz(limit=plan.questions).items():
        figures = metrics.accuracy(model, quiz).iloc[0]
        row |= {f"{side}_accuracy": float(figures["accuracy"])}
        row |= {f"{side}_{end}": float(figures[end]) for end in ("low", "high")}
        sure = metrics.confidence(model, {side: quiz}, mode="forced").set_index("measure")["mean"]
        row |= {f"{side}_{measure}": float(sure[measure]) for measure in ("max_probability", "max_logit")}
    return row
