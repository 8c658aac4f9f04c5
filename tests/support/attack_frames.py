"""Frames such as attacks make, small and made up."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from tests.support.grids import grid, with_interval


def relearning(
    steps: Any = (0, 5, 20, 40, 100), rates: Any = (3e-4, 1e-3, 3e-3), forms: Any = ("kept",)
) -> pd.DataFrame:
    """As `mrp_lens.attacks.relearn` makes it: the middle rate is the best."""
    frame = grid(form=forms, lr=rates, step=steps)
    slow = np.where(frame["lr"] == 1e-3, 8, 20) * np.where(frame["form"] == "kept", 1, 0.3)
    back = 0.27 + 0.6 * (1 - np.exp(-frame["step"] / slow))
    frame = frame.assign(attack="relearn", parameters="all", samples=248, held_out_accuracy=back, n=252, floor=0.25)
    frame = frame.assign(train_accuracy=np.minimum(back + 0.15, 1), ceiling=0.99, counts=frame["lr"] == 1e-3)
    return frame.assign(new_accuracy=np.minimum(back + 0.1, 1), recovery=(back - 0.25) / 0.74)


def attacked() -> pd.DataFrame:
    """As the table of `mrp-lens attack`."""
    names = [f"relearn, edit kept, {steps} steps" for steps in (5, 20, 100)]
    names += [
        "relearn, hooks stripped, 100 steps",
        "bypass: direction ablated, one for all layers",
        "jailbreak, answers",
    ]
    frame = pd.DataFrame({"method": "mrp", "attack": names, "recovery": [0.3, 0.5, 0.8, 1.0, 0.1, 0.28]})
    control = pd.DataFrame({"method": ["never-taught"], "attack": names[2], "recovery": 0.02})
    frame = pd.concat([frame, control], ignore_index=True)
    return frame.assign(recovery_low=frame["recovery"] - 0.1, recovery_high=frame["recovery"] + 0.1)


def probed(layers: Any = range(8)) -> pd.DataFrame:
    frame = grid(layer=layers, kind=["linear"], target=["answer"], group=("held-out", "shuffled", "never-taught"))
    bits = np.where(frame["group"] == "held-out", 0.2 + 0.1 * frame["layer"], 0.01)
    return with_interval(frame.assign(bits=bits, entropy=2.0, cross_entropy=2 - bits, accuracy=0.4, n=252), "bits")


def unembedded(layers: Any = range(8)) -> pd.DataFrame:
    frame = grid(layer=layers, group=("forget", "never-taught"))
    accuracy = np.where(frame["group"] == "forget", 0.3 + 0.08 * frame["layer"], 0.26)
    return with_interval(frame.assign(accuracy=accuracy, chance=0.25, probability=0.3, rank=2.0), "accuracy")


def input_gradients() -> pd.DataFrame:
    frame = grid(model=("unedited", "edited"), group=("forget", "retain"))
    steep = np.where((frame["model"] == "edited") & (frame["group"] == "forget"), 20.0, 0.03)
    frame = frame.assign(mean=steep, median=steep, relative=3 * steep, loss=steep / 2, n=252)
    return with_interval(frame, "mean").assign(relative_low=2.7 * steep, relative_high=3.3 * steep)


def jailbreak() -> pd.DataFrame:
    frame = pd.DataFrame({"kind": ["none", "random", "found", "found"], "step": [0, 0, 25, 50]})
    back = np.array([0.27, 0.44, 0.5, 0.52])
    frame = frame.assign(loss=[10.5, 5.1, 3.0, 2.4], held_out_accuracy=back, train_accuracy=back + 0.05)
    return frame.assign(
        untaught_accuracy=[0.27, 0.25, 0.26, 0.25], accuracy_before=1.0, trigger=["", "a b", "c d", "e"]
    )


def particular() -> Iterator[tuple[str, str, pd.DataFrame, dict[str, Any]]]:
    """Picture, case, frame and options, as in `tests.support.frames`."""
    forms = [relearning(forms=("kept", "stripped")).assign(method=method) for method in ("mrp", "rmu")]
    yield "relearning_curves", "two forms", pd.concat(forms), {}
    seeds = [relearning(rates=[1e-3]).assign(seed=seed) for seed in range(3)]
    yield "relearning_curves", "one rate, seeds", pd.concat(seeds), {}
    yield "relearning_curves", "no new facts", relearning().assign(new_accuracy=np.nan), {}
    bypassed = attacked().rename(columns={"attack": "variant"}).drop(columns="method").iloc[:5]
    yield "recoveries", "of bypass", bypassed, {}
    yield "recoveries", "next to nothing removed", attacked().assign(recovery_low=-4.7, recovery_high=0.5), {}
    states = [probed(range(32)).assign(method=method) for method in ("unedited", "mrp, relearned")]
    yield "probe_bits", "two states, 32 layers", pd.concat(states), {}
    lenses = [unembedded().assign(method=method) for method in ("unedited", "mrp")]
    yield "logit_lens", "two states", pd.concat(lenses), {}
    searches = [jailbreak().assign(objective=objective) for objective in ("answer", "representation")]
    yield "jailbreak_curve", "two objectives", pd.concat(searches), {}
