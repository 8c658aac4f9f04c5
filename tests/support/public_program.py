"""A program as a user would write it, with every public name: never run, only type-checked (tests/test_public_names.py)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import assert_type

import pandas as pd
import plotly.graph_objects as go
import torch

import mrp_lens as ml
from mrp_lens import attacks, hf, methods, metrics, models, plots, training


def data() -> ml.UnlearningTask:
    """Forget set, retain set and quizzes."""
    forget = ml.Corpus.from_file("forget.jsonl", field="text")
    quiz = ml.Questions.from_file(
        "quiz.jsonl", prompt="Question: {question}\nAnswer:", choices="choices", answer="answer"
    )
    print(
        len(forget), len(quiz), ml.World().topics, ml.TaskConfig(forget=("forget.jsonl",), retain="retain.txt").load()
    )
    train, held_out = ml.UnlearningTask.from_world("potions").split()
    assert_type(train, ml.Questions)
    print(held_out, ml.UnlearningTask.from_hub("cais/wmdp-corpora", "wikitext"))
    return ml.UnlearningTask.from_files("forget.jsonl", "retain.jsonl", questions="quiz.jsonl", entity="who")


def fits(model: ml.LensModel, task: ml.UnlearningTask) -> list[ml.Fit]:
    """Every method."""
    chosen: list[methods.Method] = [
        *(
            ml.MRP(layers=[3, 5], rank=4),
            ml.MRP(distillation=ml.Distillation()),
            ml.MRP(budget=0.05, target=0.3, coverage=methods.Coverage(questions=32), gate_directions=4),
            ml.UnconditionalMRP(layers=[3, 5], rank=4),
            ml.RMU(layer=7),
            ml.AdaptiveRMU(beta=5.0),
        ),
        *(ml.NoisyRMU(), ml.GradientAscent(), ml.GradientDifference(), ml.NPO(beta=0.1), ml.DirectionAblation()),
        *(ml.SimNPO(gamma=0.5), ml.UNDIAL(strength=10.0), ml.IdkPreference(beta=0.1)),
    ]
    print(
        list(methods.METHODS),
        methods.MRP,
        methods.UnconditionalMRP,
        methods.NPO,
        methods.RMU,
        methods.AdaptiveRMU,
        methods.NoisyRMU,
    )
    print(methods.Block(most=2), methods.Factor(0.1, 10.0), methods.Options((1, 2)))
    print(methods.Distillation, methods.GradientAscent, methods.GradientDifference, methods.DirectionAblation)
    print(methods.SimNPO, methods.UNDIAL, methods.IdkPreference)
    return [
        method.fit(model, task.forget, task.retain, seed=0, checkpoint="fit", callbacks=[Quiet()]) for method in chosen
    ]


@dataclass(frozen=True)
class Middle:
    """What the method below runs with."""

    layer: int


SPACE = {"layer": methods.Depth(0.2, 0.8), "max_length": methods.Range(16, 64, log=True, whole=True)}


@methods.register("mine", summary="Nothing yet.", source="none", swept=methods.Swept(layer="layer"), space=SPACE)
@dataclass(frozen=True, kw_only=True)
class Mine(methods.FitTemplate[Middle]):
    """A method of one's own."""

    layer: int | None = None

    def resolve(self, model: ml.LensModel, data: methods.Data) -> Middle:
        """Fill in the layer."""
        return Middle(self.layer or model.cfg.n_layers // 2)

    def learn(self, settings: Middle, context: methods.FitContext) -> methods.Fit:
        """Learn nothing."""
        with methods.fitting(context.model, context.after):
            raise NotImplementedError(settings.layer)


class Quiet(training.Callback):
    """A callback of one's own."""

    def on_start(self, state: training.TrainingState) -> None:
        """Nothing."""

    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        """Nothing."""


def train(losses: Callable[[int], list[dict[str, torch.Tensor]]], optimizer: torch.optim.Optimizer) -> pd.DataFrame:
    """The training loop by itself."""
    logger: training.Logger = training.logger_named("tensorboard", "runs/board")
    looks: list[training.Callback] = [training.LoggerCallback(logger), training.Evaluation(lambda step: None, [0, 5])]
    try:
        run: training.TrainingRun = training.train(losses, optimizer, steps=5, description="mine", callbacks=looks)
    except training.NonFiniteLossError:
        return pd.DataFrame()
    print(training.Checkpoint)
    return run.log


def ended(model: ml.LensModel, task: ml.UnlearningTask, fit: ml.Fit) -> bool:
    """How a fit ended."""
    outcome: methods.Outcome | None = fit.outcome
    print(outcome, fit.ended, methods.control_accuracy(model, task.forget, seed=1))
    return outcome is not None and outcome.damage < outcome.budget


def edits(model: ml.LensModel, fit: ml.Fit) -> ml.Edit:
    """Applied, attached, made by hand, saved, loaded."""
    assert_type(fit.edit, ml.Edit)
    with fit.edit.applied(model):
        print(ml.continuations(model, ["The colour of"]))
    handle: hf.Attached = fit.edit.attach(model)
    handle.detach()
    answer = ml.Chat(model, fit.edit, max_new_tokens=8).ask("The colour of", ml.Switches(strength=0.5))
    print(answer.before, answer.after, answer.tokens)
    by_hand = ml.ProjectionEdit({"blocks.3.hook_resid_post": ml.Subspace(torch.eye(2, 8))}, request="mine")
    gate = ml.Gate(torch.ones(8), threshold=0.2, sharpness=20.0, hard=False)
    print(gate(torch.ones(1, 3, 8)))
    some = ml.ConditionalProjectionEdit(
        {"blocks.3.hook_resid_post": ml.Subspace(torch.eye(2, 8))}, {"blocks.3.hook_resid_post": gate}
    )
    print(some.gates("edit"), some.random_like(seed=1), by_hand + some)
    steer = ml.SteeringEdit.towards(torch.ones(8), layer=7, coefficient=20.0)
    print(ml.EditStack([by_hand, steer]), ml.WeightEdit, by_hand.without("mine"), ml.Edit.from_pretrained("org/name"))
    (by_hand + steer).save_pretrained("edit")
    return ml.load_edit("org/name", revision="main")


def looking(model: ml.LensModel, task: ml.UnlearningTask, edit: ml.Edit) -> float:
    """Every metric."""
    texts, quizzes, u = task.texts(limit=100), task.quiz(), torch.ones(model.cfg.d_model)
    frames: list[pd.DataFrame] = [
        *(
            metrics.alignment(model, texts, u),
            metrics.geometry(model, texts, edit),
            metrics.propagation(model, texts, edit),
        ),
        *(
            metrics.gate(model, edit, task.forget_texts, quizzes["retain"], part="all"),
            metrics.gate_tokens(model, edit, texts, limit=5),
            metrics.token_effects(model, edit, [1, 5, 6], prompt=2),
        ),
        *(
            metrics.principal_plane(model, texts, edit, layer=3),
            metrics.principal_angles(model, texts, edit, layers=[3]),
            metrics.separability(model, texts["forget"], texts["retain"], layers=[3]),
        ),
        *(metrics.confidence(model, quizzes), metrics.token_confidence(model, texts["forget"])),
        *(metrics.perplexity(model, task.held_out), metrics.answer_probability(model, task.forget_texts)),
        *(metrics.logit_lens(model, quizzes["forget"]), metrics.damage(model, edit, task.held_out)),
        *(metrics.noise_sensitivity(model, texts), metrics.predicted_coefficient(model, texts, u)),
        *(metrics.exact_memorization(model, texts["forget"]), metrics.extraction_strength(model, texts["forget"])),
        *(
            metrics.truth_ratio(model, quizzes["forget"]),
            metrics.forget_quality(model, quizzes["forget"], reference=model),
        ),
        *(metrics.open_ended(model, quizzes["forget"]), metrics.fluency(model, edit, task.forget_prompts(limit=9))),
        *(metrics.model_utility(model, {"retain": task.retain}, quizzes), metrics.membership(model, *texts.values())),
        *(metrics.depth(model, edit, texts["forget"], reference=model, into="unedited", positions="answer"),),
    ]
    print(
        frames,
        metrics.choice_scores(model, quizzes["forget"]),
        metrics.proposition_1,
        metrics.variance_by_coefficient,
        metrics.bootstrap_interval,
    )
    measured = metrics.Measured(model=model, task=task, edit=edit)
    print(
        metrics.rows_and_frames_for("benchmark", measured),
        metrics.rows_for("unlearn", measured),
        metrics.frames_for(measured),
        metrics.headings(),
        list(metrics.METRICS),
    )
    return metrics.value(metrics.accuracy(model, quizzes["forget"]))


@metrics.register(
    "mine", summary="Nothing.", row=lambda frame: {"mine": 0.0}, headings={"mine": "nothing"}, figures=["mine"]
)
def mine(measured: metrics.Measured) -> pd.DataFrame:
    """A metric of one's own."""
    known: metrics.Metric = metrics.METRICS["mine"]
    return pd.DataFrame([{"mine": len(known.name) + measured.seed}])


@plots.register("mine")
def drawn(frame: plots.Frame) -> go.Figure:
    """A figure of one's own."""
    print(list(plots.FIGURES))
    return plots.training(frame)


PICTURES: list[Callable[..., go.Figure]] = [
    *(plots.accuracies, plots.alignment_by_coefficient, plots.alignment_by_layer, plots.coefficient_effects),
    *(plots.confidence_by_method, plots.confidence_distribution, plots.displacement, plots.effective_rank),
    *(plots.gate, plots.gate_tokens),
    *(plots.input_gradients, plots.jailbreak_curve, plots.layer_effects, plots.logit_lens, plots.noise_sensitivity),
    *(plots.norms, plots.predicted_coefficients, plots.principal_angles, plots.principal_plane, plots.probe_bits),
    *(plots.propagation, plots.recoveries, plots.relearning_curves, plots.removed_energy, plots.theory_check),
    *(plots.variance_by_coefficient, plots.pareto, plots.depth, plots.budget, plots.separability),
]


def attacking(model: ml.LensModel, task: ml.UnlearningTask, edit: ml.Edit) -> None:
    """Every attack, alone and as a suite."""
    train, held_out = task.split()
    curve = attacks.relearn(model, edit, train=train, held_out=held_out, steps=20, lr=1e-3)
    found: list[pd.DataFrame] = [
        *(attacks.best(curve), attacks.with_floor(curve, curve), attacks.input_gradients(model, edit, held_out)),
        *(attacks.probe(model, edit, train=train, held_out=held_out), attacks.bypass(model, edit, held_out=held_out)),
        attacks.jailbreak(model, edit, train=train, held_out=held_out),
    ]
    budgets: tuple[attacks.Attack, ...] = (
        attacks.Relearn(steps=20),
        attacks.Probe(),
        attacks.Bypass(),
        attacks.Jailbreak(),
    )
    config = attacks.SuiteConfig(attacks=("relearn",), budgets=budgets)
    frames = attacks.run_suite(model, edit, task, config, "runs/attack")
    print(
        found,
        attacks.rows_of_attacks(frames, "mine", config),
        attacks.notes_of(frames, "mine", config),
        attacks.worst_attack(attacks.rows_of_attacks(frames, "mine", config), "mine"),
        attacks.relearned,
    )
    print(list(attacks.ATTACKS), attacks.FactSplit, attacks.labelled({"forget": held_out}))


@attacks.register("mine", summary="Nothing.", source="none")
@dataclass(frozen=True, kw_only=True)
class Nothing(attacks.Attack):
    """An attack of one's own."""

    def run(self, setting: attacks.Setting) -> Mapping[str, pd.DataFrame]:
        """Nothing."""
        return {}

    def rows(self, frames: Mapping[str, pd.DataFrame], name: str) -> list[Mapping[str, float]]:
        """Nothing."""
        return []


def leaving(model: ml.LensModel, task: ml.UnlearningTask, edit: ml.Edit) -> Path:
    """Search, sweep, page, harness, export."""
    tuned: ml.Tuned = ml.tune(model, task, method="rmu", trials=30, seed=0, out="runs/tune", budget=0.05)
    print(tuned.front, tuned.best["damage"], tuned.why, tuned.edit, ml.tune(model, task, ml.RMU(steps=50)).trials)
    planned: ml.Plan = ml.plan(
        "org/name", ["mrp", ml.RMU(steps=50)], dtype="bfloat16", device_memory="80GB", tflops=300.0
    )
    print(planned.frame["peak"], planned.sizes.n_layers, planned.notes, ml.PlanConfig(documents=500))
    table = ml.sweep(model, task, ml.SweepConfig(layers=(2, 5), steps=75), "runs/sweep")
    scores: pd.DataFrame = ml.evaluate("org/name", ["mmlu"], edit=edit, limit=10)
    report: ml.ExportReport = ml.export_hf(model, edit, "out", record=ml.Measurements.read("runs/mine"))
    print(ml.Record, table, scores, report.form, report.max_logit_diff, hf.attach, hf.find_folder("org/name"))
    return ml.report("runs/mine")


def parts(model: ml.LensModel, edit: ml.Edit) -> None:
    """What rows of data are read as, what an edit consists of, and what an export proves."""
    columns = ml.data.QuestionColumns(prompt="{question}", choices="choices", answer="answer")
    schema: ml.data.Schema = ml.data.KNOWN["locuslab/TOFU"]
    print(columns, schema, ml.data.DocumentColumns("text"), ml.data.Document("", "text"))
    print(ml.data.Question("Snow is", (" white", " black"), 0), ml.data.task_for("demo", ml.TaskConfig()))
    with ml.edits.edit_on(model, ml.edits.at_strength(model, edit, min(0.5, ml.edits.most_strength(edit)))):
        print(ml.edits.edits_on(model), ml.edits.has_hooks(edit), ml.edits.without_hooks(edit))
    projection: ml.ProjectionEdit | None = ml.edits.projection_in(edit)
    print(projection, ml.edits.without_projections(edit), ml.edits.projection_hook, ml.edits.Direction)
    try:
        ml.export.push_to_hub("out", "org/name")
    except ml.export.ExportMismatchError as error:
        print(error, ml.export.Proof)


models.register_family(models.Layout("model.layers", {}, {}, ("model.embed_tokens",)), "MineForCausalLM")

if __name__ == "__main__":
    the_model = ml.load_model("demo", backend="auto", device="cpu", dtype="float32")
    assert_type(the_model, ml.LensModel)
    tokens = the_model.to_tokens("The colour of")
    assert_type(tokens, torch.Tensor)
    the_task = data()
    the_fit = fits(the_model, the_task)[0]
    the_edit = edits(the_model, the_fit)
    print(ended(the_model, the_task, the_fit))
    parts(the_model, the_edit)
    print(looking(the_model, the_task, the_edit), leaving(the_model, the_task, the_edit), ml.attacks, ml.hf, ml.models)
    print(ml.methods, ml.metrics, ml.plots, ml.training, ml.data, ml.edits, ml.evals, ml.export)
