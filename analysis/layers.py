"""Which layers can be steered, with which c? The paper's claim, a sweep, noise sensitivity, and Eq. 19's c.

`python -m analysis.layers --model demo --out runs/layers` (quick), `--full` (all layers, three seeds, three c)

The claim (arXiv 2408.06223): RMU with a fixed c works only where c exceeds the stream's norm; Adaptive RMU works at most
layers. A fit *works* here if what must go falls to within five points of the never-taught level (of chance, where that
is unknown) and what must stay loses at most five points. The sweep lies in the output folder and goes on where it was
interrupted.
"""

from collections.abc import Sequence

import pandas as pd
import torch

from analysis.common.arguments import Study, parser_for
from mrp_lens import metrics
from mrp_lens.cli.sweep import Grid
from mrp_lens.edits.subspace import random_units
from mrp_lens.runs.sweep import UNEDITED, sweep
from mrp_lens.runs.train_world import ABSENT_WITHIN

KEPT_WITHIN = 0.05
DOCUMENTS = 100  # a side, for noise sensitivity and Eq. 19
MOST = 0.5  # "most": more than this share


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "layers")
    parser.add_argument("--full", action="store_true", help="all layers, three seeds, three values of c, 150 steps")
    parser.add_argument("--methods", default="mrp,rmu,adaptive-rmu", help="separated by commas (default all three)")
    parser.add_argument("--seeds", help="such as 0,1,2 (default: --seed, with --full three)")
    options = parser.parse_args(arguments)
    study = Study.begin("analysis.layers", "Per-layer effects of each method", options, in_place=True)
    seeds = options.seeds or (None if options.full else str(options.seed))
    plan = Grid(methods=options.methods, seeds=seeds, full=options.full).plan(study.model, study.task)
    table = sweep(study.model, study.task, plan, options.out / "sweep")
    assert table is not None
    table = table.assign(works=works(table))
    texts = study.task.texts(limit=DOCUMENTS)
    u = random_units(1, study.model.cfg.d_model, "uniform", torch.Generator().manual_seed(options.seed))[0]
    sensitivity = metrics.noise_sensitivity(study.model, texts, seed=options.seed, progress=True)
    predicted = metrics.predicted_coefficient(study.model, texts, u, seed=options.seed, progress=True)
    predicted["working_coefficient"] = predicted["layer"].map(smallest_working(table))
    frames = {
        "layer_effects": table[table["method"] != UNEDITED],
        "noise_sensitivity": sensitivity,
        "predicted_coefficients": predicted,
        "coefficient_effects": table[table["method"] == "rmu"],
    }
    text = "\n\n".join(
        [f"Fits of {plan.steps} steps. {claim(table)}", sensitivity_finding(sensitivity), prediction_finding(predicted)]
    )
    study.end(text, frames, table, in_place=True)


def works(table: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row forgot what must go and kept what must stay."""
    floor = table["untaught_accuracy"] if "untaught_accuracy" in table else table["chance"]
    kept = table.loc[table["method"] == UNEDITED, "retain_accuracy"].iloc[0] - KEPT_WITHIN
    return (table["forget_accuracy"] <= floor + ABSENT_WITHIN) & (table["retain_accuracy"] >= kept)


def smallest_working(table: pd.DataFrame) -> "pd.Series[float]":
    """Layer -> the smallest c with which RMU worked for more than half of the seeds."""
    rmu = table[table["method"] == "rmu"]
    share = rmu.groupby(["layer", "coefficient"])["works"].mean().reset_index()
    return share[share["works"] > MOST].groupby("layer")["coefficient"].min()


def claim(table: pd.DataFrame) -> str:
    """The paper's claim held against the table."""
    parts = {method: table[table["method"] == method] for method in ("rmu", "adaptive-rmu", "mrp")}
    lines = []
    if len(parts["rmu"]):
        lines.append(rmu_claim(parts["rmu"]))
    if len(parts["adaptive-rmu"]):
        share = parts["adaptive-rmu"].groupby("layer")["works"].mean()
        working = [str(int(layer)) for layer in share.index[share > MOST]]
        lines.append(
            f"Adaptive RMU worked at {len(working)} of {len(share)} layers ({', '.join(working) or 'none'}): that it works "
            f"at most layers {'holds' if len(working) > MOST * len(share) else 'does not hold'} here."
        )
    if len(parts["mrp"]):
        left = parts["mrp"].groupby("layer")["forget_accuracy"].mean()
        lines.append(
            f"MRP at a single layer left an accuracy of {left.min():.3f} at best (layer {left.idxmin():.0f}) and "
            f"{left.max():.3f} at worst (layer {left.idxmax():.0f})."
        )
    return " ".join(lines)


def rmu_claim(rows: pd.DataFrame) -> str:
    """Whether RMU with a fixed c worked where c exceeds the norm of the stream, and only there."""
    above, below = rows[rows["relative_coefficient"] > 1], rows[rows["relative_coefficient"] <= 1]
    told = f"RMU with a fixed c worked in {counted(above)} fits where c exceeds the norm of the stream, {counted(below)} where it does not"
    if above.empty or below.empty:
        return f"{told}: whether it works only where c exceeds the norm cannot be told from one side."
    if not rows["works"].any():
        return f"{told}: as none worked, whether c must exceed the norm cannot be told."
    needed = "is not needed" if below["works"].any() else "is needed"
    enough = "is enough" if above["works"].all() else "is not always enough"
    more = (
        "works more often there" if above["works"].mean() > below["works"].mean() else "does not work more often there"
    )
    return f"{told}: c above the norm {needed}, and it {enough}; RMU {more}."


def counted(rows: pd.DataFrame) -> str:
    """3 of 8."""
    return f"{int(rows['works'].sum())} of {len(rows)}"


def sensitivity_finding(table: pd.DataFrame) -> str:
    """Whether noise sensitivity falls with depth."""
    parts = []
    for group, rows in table.groupby("group", sort=False):
        values = rows.sort_values("layer")["sensitivity"]
        steps = values.diff().dropna()
        trend = "does not fall throughout"
        if (steps < 0).all() or (steps > 0).all():
            trend = f"{'falls' if steps.iloc[0] < 0 else 'rises'} at every step"
        parts.append(f"{group} {values.iloc[0]:.3g} at the first layer, {values.iloc[-1]:.3g} at the last; it {trend}")
    return f"Noise sensitivity of the layers above, by depth: {'; '.join(parts)}."


def prediction_finding(table: pd.DataFrame) -> str:
    """Eq. 19's c beside the c that worked."""
    rows = table[table["group"] == "forget"].dropna(subset="working_coefficient")
    if rows.empty:
        return "Eq. 19's c cannot be compared: no c that was tried worked at any layer."
    parts = [
        f"layer {row['layer']}: {row['coefficient']:.3g} predicted, {row['working_coefficient']:.3g} worked (norm {row['norm']:.3g})"
        for row in rows.to_dict("records")
    ]
    ratio = (rows["working_coefficient"] / rows["coefficient"]).median()
    return (
        f"Eq. 19's c beside the smallest that worked of those tried: {'; '.join(parts)}. Median ratio of the second to the "
        f"first: {ratio:.3g}."
    )


if __name__ == "__main__":
    main()
