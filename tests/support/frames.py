"""Frames such as the metrics, fits and sweeps make, small and made up, for the tests of pictures and reports."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from tests.support import attack_frames
from tests.support.grids import grid, with_interval

METHODS = ("mrp", "rmu", "adaptive-rmu", "random-projection")
SIX = ("unedited", *METHODS, "untrained-start")
GROUPS, WHEN, SEEDS = ("forget", "retain"), ("before", "after"), (0, 1, 2)
COEFFICIENTS = (1.0, 2.0, 4.0, 8.0, 16.0)
PROMPTS = [f"Question: what is the colour of <s> number {n}? Answer:"[n:] for n in range(3)]


def by_method(frame: pd.DataFrame, methods: tuple[str, ...] = METHODS) -> pd.DataFrame:
    """The frame once for each method, as a study puts frames together."""
    return pd.concat([frame.assign(method=method) for method in methods], ignore_index=True)


def norms_of(frame: pd.DataFrame) -> Any:
    return (
        1.5 * 1.35 ** (frame["layer"] * 8 / max(8, frame["layer"].max())) * np.where(frame["group"] == "forget", 1.1, 1)
    )


def alignment(layers: Any = range(8), **keys: Any) -> pd.DataFrame:
    frame, random = grid(group=GROUPS, layer=layers, **keys), np.random.default_rng(0)
    gain = np.where(frame["group"] == "forget", 0.8, 0.15) / (1 + abs(frame["layer"] - 4) / 2)
    c = frame.get("coefficient", 6.5)
    frame = frame.assign(cosine=0.1 + gain * c / (c + 4) + random.normal(0, 0.01, len(frame)), norm=norms_of(frame))
    null = 0.08 + 0.01 * frame["layer"] * (frame["group"] == "forget")
    frame = frame.assign(null_mean=null, null_low=null - 0.06, null_high=null + 0.06, norm_std=0.2 * frame["norm"])
    return with_interval(frame, "cosine")


def confidence(mode: str = "generated") -> pd.DataFrame:
    means = {"max_logit": 14.0, "max_probability": 0.8, "entropy": 0.7, "margin": 2.5, "probability": 0.75}
    uniform = {"max_logit": np.nan, "max_probability": 1 / 512, "entropy": 6.24, "margin": 0.0, "probability": 1 / 512}
    frame = grid(group=GROUPS, mode=[mode], measure=means)
    mean: Any = frame["measure"].map(means) * np.where(frame["group"] == "forget", 0.7, 1.0)
    return with_interval(frame.assign(mean=mean, uniform=frame["measure"].map(uniform)), "mean")


def token_confidence(tokens: int = 700) -> pd.DataFrame:
    frame, random = grid(group=GROUPS, mode=["generated"], position=range(tokens)), np.random.default_rng(0)
    sure = random.beta(2, np.where(frame["group"] == "forget", 3, 1))
    logit, margin = random.normal(10 + 6 * sure, 2), random.exponential(2, len(frame))
    frame = frame.assign(question=frame["position"] // 7, token="the", max_logit=logit, max_probability=sure)
    return frame.assign(entropy=-4 * np.log(sure), margin=margin, probability=sure)


def gates(sites: Any = ("resid_post",), **keys: Any) -> pd.DataFrame:
    frame = grid(request=["one", "two"], layer=[1, 3, 5], site=sites, **keys)
    frame["hook"] = [f"blocks.{layer}.hook_{site}" for layer, site in zip(frame["layer"], frame["site"], strict=True)]
    recall = 0.5 + 0.08 * frame["layer"] + 0.01 * frame.get("seed", 0)
    return frame.drop(columns="site").assign(
        precision=0.9 * recall, precision_null=0.3, recall=recall, retain_firing=0.1 * recall
    )


def gate_tokens(length: int = 7) -> pd.DataFrame:
    frame = grid(group=GROUPS, layer=[1, 3], document=[0, 4], position=range(length))
    frame["hook"] = [f"blocks.{layer}.hook_resid_post" for layer in frame["layer"]]
    words = [("The", " colour", " of", " <s>", " is", "\n", " green")[position % 7] for position in frame["position"]]
    return frame.assign(request="one", token=words, share=(frame["position"] % 7 + frame["layer"]) / 10)


def accuracies() -> pd.DataFrame:
    forget = np.array([1.0, 0.274, 0.304, 0.296, 1.0, 0.932])
    frame = pd.DataFrame({"method": SIX, "forget_accuracy": forget, "retain_accuracy": 0.99})
    frame = frame.assign(forget_low=forget - 0.04 * (forget < 1), forget_high=np.minimum(forget + 0.04, 1))
    return frame.assign(worst_topic_accuracy=0.98, untaught_accuracy=0.26, text_perplexity_ratio=1.01)


def unlearned() -> pd.DataFrame:
    frame = pd.DataFrame({"method": ["unedited", "mrp"], "forget_probability": [0.81, 0.12]})
    frame = frame.assign(forget_probability_low=[0.78, 0.1], forget_probability_high=[0.84, 0.15])
    return frame.assign(text_perplexity=12.1, text_perplexity_ratio=[1.0, 1.02])


def training() -> pd.DataFrame:
    step, random = np.arange(120), np.random.default_rng(0)
    forget, retain = 500 * np.exp(-step / 15) + random.uniform(0.4, 0.9, 120), 0.3 * (step > 0)
    frame = pd.DataFrame({"step": step, "loss": forget + retain, "forget": forget, "retain": retain})
    return frame.assign(forget_cross_entropy=0.1 + step / 20, seconds=0.1 * step)


def budgeted() -> pd.DataFrame:
    step = np.arange(120)
    looked = step // 5 * 5
    frame = training().assign(left=1.0 - 0.7 * (step // 20) / 5, target=0.34, budget=0.05)
    allowed = np.where(step < 80, 0.03, 0.05)
    return frame.assign(damage=0.0005 * looked, allowed=allowed, retain_factor=np.exp(0.02 * looked - 1.5))


def separable(layers: Any = range(8)) -> pd.DataFrame:
    frame = grid(layer=layers, unit=["token", "document"])
    area = np.where(frame["unit"] == "token", 0.6, 0.8) + 0.02 * frame["layer"]
    return with_interval(frame.assign(auc=area), "auc", 0.05).assign(null=0.5)


def sweep(layers: Any = range(1, 8), seeds: Any = SEEDS) -> pd.DataFrame:
    """As `mrp_lens.runs.sweep` writes it: the unedited model, mrp, rmu with two coefficients, adaptive-rmu with one beta."""
    points = [("mrp", np.nan), ("rmu", 4.0), ("rmu", 16.0), ("adaptive-rmu", 5.0)]
    frame = grid(point=points, layer=layers, seed=seeds)
    frame = frame.assign(method=frame["point"].str[0], coefficient=frame["point"].str[1]).drop(columns="point")
    relative: Any = frame["coefficient"] / np.where(frame["method"] == "rmu", 1.5 * 1.35 ** frame["layer"], 1)
    forget = np.where(relative < 1.2, 0.9, 0.3) + np.random.default_rng(0).normal(0, 0.03, len(frame))
    frame = frame.assign(relative_coefficient=relative, forget_accuracy=forget, retain_accuracy=0.97, retain_low=0.94)
    frame = frame.assign(forget_low=forget - 0.05, forget_high=forget + 0.05, retain_high=0.99, forget_cosine=0.5)
    frame = frame.assign(retain_cosine=0.1, null_mean=0.07, null_low=0.02, null_high=0.12)
    unedited = pd.DataFrame({"method": ["unedited"], "forget_accuracy": 1.0, "retain_accuracy": 0.99})
    unedited = unedited.assign(forget_max_probability=0.95, retain_max_probability=0.93)
    frame = pd.concat([unedited, frame.assign(forget_max_probability=0.5, retain_max_probability=0.9)])
    return frame.assign(untaught_accuracy=0.26, chance=0.25).reset_index(drop=True)


def noise_sensitivity(layers: Any = range(8), noise: Any = (0.1,)) -> pd.DataFrame:
    frame = grid(group=GROUPS, layer=layers, noise=noise)
    norm = norms_of(frame)
    put_in = frame["noise"] ** 2 / norm**2
    return with_interval(frame.assign(norm=norm, input_ratio=put_in, sensitivity=put_in * norm), "sensitivity")


def predicted_coefficient() -> pd.DataFrame:
    frame = grid(group=GROUPS, layer=range(8))
    frame = frame.assign(norm=norms_of(frame), working_coefficient=np.where(frame["layer"] % 2, 9.0, np.nan))
    return with_interval(frame.assign(coefficient=0.6 * frame["norm"], projection=0.3 * frame["norm"]), "coefficient")


def proposition_1(prompts: Any = range(3)) -> pd.DataFrame:
    noises, statistics = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), ("mean", "trace", "top_eigenvalue")
    frame = grid(prompt=prompts, layer=[3], noise=noises, statistic=statistics)
    predicted, off = 50 * frame["noise"], 0.01 + 0.6 * frame["noise"] ** 0.5
    frame = with_interval(
        frame.assign(predicted=predicted, measured=predicted * (1 - off), error=-off), "measured", 0.04
    )
    mean = frame["statistic"] == "mean"
    frame.loc[mean, ["predicted", "low", "high"]] = (0.0, 0.01, 0.018)
    frame.loc[mean, ["measured", "error"]] = off[mean]
    return frame


def variance_by_coefficient() -> pd.DataFrame:
    frame = grid(prompt=range(3), layer=[3], coefficient=(0.5, *COEFFICIENTS, 32.0)).assign(noise=0.01, norm=4.2)
    predicted = 3 * (1 + frame["prompt"]) / frame["coefficient"] ** 2
    return with_interval(frame.assign(predicted=predicted, measured=0.8 * predicted), "measured")


def geometry() -> pd.DataFrame:
    frame = grid(group=GROUPS, when=WHEN, layer=range(8))
    after, forget = frame["when"] == "after", frame["group"] == "forget"
    edited, above = frame["layer"].isin([3, 5]), after & (frame["layer"] >= 3)
    energy, moved = np.where(forget, 0.4, 0.05) * np.where(after, 1e-14, 1), np.where(forget, 0.5, 0.1) * above
    rank = 12 + 3 * frame["layer"] - 4 * above + 10 * ~forget
    frame = frame.assign(effective_rank=rank, displacement=moved, removed_rank=8 * edited, norm=norms_of(frame))
    return frame.assign(
        removed_energy=np.where(edited, energy, np.nan), removed_energy_null=np.where(edited, 0.06, np.nan)
    )


def principal_angles() -> pd.DataFrame:
    start = {"forget-retain": 5, "forget-removed": 10, "retain-removed": 50}
    frame = grid(layer=range(8), when=WHEN, pair=start, number=range(1, 9))
    degrees, null = frame["pair"].map(start) + 9 * frame["number"] + frame["layer"] / 2, 55 + 4.5 * frame["number"]
    frame = frame.assign(degrees=degrees.clip(upper=90.0), null_degrees=null.clip(upper=90.0))
    return frame[(frame["pair"] == "forget-retain") | frame["layer"].isin([3, 5])].reset_index(drop=True)


def principal_plane(axes: str = "xy", states: int = 60) -> pd.DataFrame:
    frame, random = grid(group=GROUPS, when=WHEN, document=range(states)), np.random.default_rng(0)
    centre = np.where(frame["group"] == "retain", -4, np.where(frame["when"] == "after", -2, 4))
    places = {name: random.normal(centre * (name == "x"), 2) for name in axes}
    shares = {f"share_{name}": share for name, share in zip(axes, (0.34, 0.12, 0.06), strict=False)}
    return frame.assign(token=np.where(frame["document"] % 2, "<s>", " Zaxim"), **places, **shares)


def propagation(hooks: Any = ("hook_resid_post",)) -> pd.DataFrame:
    frame = grid(group=GROUPS, source=(3, 5), hook=hooks, layer=range(8))
    frame = frame[frame["layer"] >= frame["source"]].reset_index(drop=True)
    above, scale = frame["layer"] - frame["source"], np.where(frame["group"] == "forget", 0.4, 0.06)
    return frame.assign(before=scale * 0.9**above, after=scale * 0.15 * above, null=8 / 128)


def depths(**keys: Any) -> pd.DataFrame:
    frame = grid(into=["edited", "unedited"], layer=range(8), **keys)
    edited = np.where(frame["into"] == "edited", -4.0 * 0.3 ** frame["layer"], -1.0 - 0.8 * frame["layer"])
    frame = frame.assign(log_probability=edited - 0.1 * frame.get("seed", 0), unedited=-0.1, random=-15.0)
    never_saw = -7.0 + 0.5 * frame["layer"] * (frame["into"] == "edited")
    depth = np.where(frame["into"] == "edited", 0.12, 0.83)
    return with_interval(frame.assign(never_saw=never_saw, depth=depth, n=40), "log_probability")


def tuned(trials: int = 12) -> pd.DataFrame:
    """As `mrp-lens tune` writes it."""
    random = np.random.default_rng(0)
    damage, forget = 10 ** random.uniform(-3, 0, trials), random.uniform(0.2, 0.9, trials)
    frame = pd.DataFrame({"trial": range(trials), "forget_accuracy": forget, "damage": damage, "retain_accuracy": 0.9})
    beats = (damage[:, None] < damage) & (forget[:, None] < forget)
    front = ~beats.any(axis=0)
    chosen = np.arange(trials) == np.argmax(front)
    return frame.assign(on_front=front, chosen=chosen, lr=1e-3 * damage, layer=3, chance=0.25, unedited_accuracy=0.93)


PLAIN: dict[str, Callable[[], pd.DataFrame]] = {
    "accuracies": accuracies,
    "alignment_by_coefficient": lambda: alignment([3, 5], coefficient=COEFFICIENTS),
    "alignment_by_layer": alignment,
    "coefficient_effects": sweep,
    "budget": budgeted,
    "confidence_by_method": confidence,
    "confidence_distribution": token_confidence,
    "depth": depths,
    "displacement": geometry,
    "effective_rank": geometry,
    "gate": gates,
    "gate_tokens": gate_tokens,
    "input_gradients": attack_frames.input_gradients,
    "jailbreak_curve": attack_frames.jailbreak,
    "layer_effects": sweep,
    "logit_lens": attack_frames.unembedded,
    "noise_sensitivity": noise_sensitivity,
    "norms": alignment,
    "pareto": tuned,
    "predicted_coefficients": predicted_coefficient,
    "principal_angles": principal_angles,
    "principal_plane": principal_plane,
    "probe_bits": attack_frames.probed,
    "propagation": propagation,
    "recoveries": attack_frames.attacked,
    "relearning_curves": attack_frames.relearning,
    "removed_energy": geometry,
    "separability": separable,
    "theory_check": proposition_1,
    "training": training,
    "variance_by_coefficient": variance_by_coefficient,
}


def variants(picture: str) -> dict[str, pd.DataFrame]:
    """The frame of a picture plain, by method, with one group, and at one layer."""
    frame = PLAIN[picture]()
    found = {"plain": frame}
    if "method" not in frame:
        found |= {"one method": frame.assign(method="rmu"), "four methods": by_method(frame)}
    if "forget" in set(frame.get("group", ())):
        forget = frame[frame["group"] == "forget"]
        found |= {"one group": forget, "another group": forget.assign(group="virology")}
    if "layer" in frame:
        found["one layer"] = frame[frame["layer"] == 3]
    return found


VARIANTS = {f"{picture}: {case}": frame for picture in PLAIN for case, frame in variants(picture).items()}


def particular() -> Iterator[tuple[str, str, pd.DataFrame, dict[str, Any]]]:
    """Picture, case, frame and options: what is particular to one picture."""
    deep, twice = alignment(range(32)), [confidence("generated"), confidence("forced")]
    steered = alignment([5], coefficient=COEFFICIENTS, seed=SEEDS)
    without = steered.assign(method="mrp", coefficient=np.nan).drop_duplicates(["group", "layer", "seed"])
    yield "alignment_by_layer", "32 layers, four methods", by_method(deep), {}
    yield "depth", "seeds", depths(seed=SEEDS), {}
    yield "gate", "two sites, seeds", gates(("resid_post", "mlp_out"), seed=SEEDS), {}
    yield "gate_tokens", "long documents, few a line", gate_tokens(30), {"line": 8}
    yield "alignment_by_layer", "coefficients", alignment(coefficient=(1.0, 6.5, 40.0)), {}
    yield "alignment_by_layer", "seeds", alignment(seed=SEEDS), {}
    yield (
        "alignment_by_coefficient",
        "relative",
        steered.assign(relative_coefficient=lambda f: f["coefficient"] / 6),
        {},
    )
    yield "alignment_by_coefficient", "NaN for mrp", pd.concat([steered.assign(method="rmu"), without]), {}
    yield "norms", "32 layers", deep.assign(coefficient=6.5), {}
    yield "norms", "coefficient of each layer", alignment().assign(coefficient=lambda f: 5 * f["norm"]), {}
    yield "confidence_by_method", "two modes", pd.concat(twice), {}
    yield "confidence_by_method", "six methods", by_method(confidence(), SIX), {}
    for measure in ("max_probability", "entropy", "margin", "probability"):
        yield "confidence_distribution", measure, by_method(token_confidence(80), SIX), {"measure": measure}
    for measure in ("cosine", "max_probability"):
        yield "layer_effects", measure, sweep(), {"measure": measure}
    yield "layer_effects", "one seed, no controls", sweep(seeds=[0]).iloc[1:].drop(columns="untaught_accuracy"), {}
    yield "coefficient_effects", "one seed, 11 layers", sweep(range(0, 22, 2), [0]), {}
    yield "accuracies", "unlearn", unlearned(), {}
    yield "accuracies", "forget only", accuracies()[["method", "forget_accuracy"]], {}
    yield "accuracies", "chance", accuracies().drop(columns="untaught_accuracy").assign(forget_chance=0.25), {}
    yield (
        "accuracies",
        "seeds",
        pd.concat([accuracies().assign(seed=s, forget_accuracy=0.3 + s / 10) for s in SEEDS]),
        {},
    )
    yield "training", "negative loss", training().assign(loss=lambda f: -f["loss"], forget=lambda f: -f["forget"]), {}
    relative = noise_sensitivity().assign(noise=lambda f: 0.01 * f["norm"] ** 2)  # another noise at each layer
    yield "noise_sensitivity", "relative", relative, {}
    yield "noise_sensitivity", "three noises", noise_sensitivity(noise=(0.01, 0.1, 1.0)), {}
    yield "theory_check", "long prompts", proposition_1(PROMPTS), {}
    yield "principal_angles", "after", principal_angles(), {"when": "after"}
    yield "principal_plane", "space", principal_plane("xyz"), {}
    yield "principal_plane", "before only", principal_plane().query("when == 'before'"), {}
    yield from attack_frames.particular()
    yield "propagation", "two hooks", propagation(["hook_mlp_out", "hook_resid_post"]), {}


PARTICULAR = {f"{picture}: {case}": (frame, options) for picture, case, frame, options in particular()}
CASES: dict[str, tuple[pd.DataFrame, dict[str, Any]]] = {
    name: (frame, {}) for name, frame in VARIANTS.items()
} | PARTICULAR
"""Name of the picture, a colon and the case -> frame and options."""
