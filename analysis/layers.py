"""Which layers can be steered, with which c? The paper's claim, a sweep, noise sensitivity, and Eq. 19's c.

`python -m analysis.layers --model demo --out runs/layers` (quick), `--full` (all layers, three seeds, three c, every fit to its end)

The claim (arXiv 2408.06223): RMU with a fixed c works only where c exceeds the stream's norm; Adaptive RMU works at most
layers. A fit *works* here if the forget quiz comes to within five points of the never-taught level (of chance, where that is
unknown), above or below, and the retain quiz loses at most five points; further below it is *suppressed*, hence still known. The
sweep lies in the output folder and goes on where it was interrupted.
"""

from collections.abc import Sequence

import pandas as pd
import torch

from analysis.common.arguments import Study, numbers, parser_for
from analysis.common.tables import markdown_of_rows
from mrp_lens import SweepConfig, metrics, sweep
from mrp_lens.cli.app import as_program
from mrp_lens.edits.subspace import random_units
from mrp_lens.metrics.controls import ABSENT_WITHIN, UNEDITED
from mrp_lens.utils.result_store import holds_run

KEPT_WITHIN = 0.05
DOCUMENTS = 100  # a side, for noise sensitivity and Eq. 19
MOST = 0.5  # "most": more than this share
READING = """\
First table: fits of {steps}, `works` being the share of seeds with which both sides came out as they should, `suppressed` that with
which the forget quiz fell below what was never taught, so that it is still known. The claim holds where RMU works in the rows with
`c / norm` above 1 and not in the others, and where Adaptive RMU (whose `c / norm` is beta) works at more than half of the layers.
Second: how much of a noise added at a layer arrives behind the last block (`sensitivity`, which the paper finds falling with depth),
and the c that Eq. 19 predicts before any fit, with its interval, beside the smallest of those tried that worked there (`working
coefficient`; nothing where none did)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "layers")
    parser.add_argument(
        "--full", action="store_true", help="all layers, three seeds, three values of c, every fit to its end"
    )
    parser.add_argument("--methods", default="mrp,rmu,adaptive-rmu", help="separated by commas (default all three)")
    parser.add_argument("--seeds", help="such as 0,1,2 (default: --seed, with --full three)")
    options = parser.parse_args(arguments)
    if (
        not options.overwrite
        and options.out.is_dir()
        and any(options.out.iterdir())
        and not holds_run(options.out / "sweep", "sweep")
    ):
        raise FileExistsError(
            f"{options.out} holds something other than this study; choose another folder, or give --overwrite"
        )
    study = Study.begin("analysis.layers", "Per-layer effects of each method", options, in_place=True)
    seeds = numbers(options.seeds or (None if options.full else str(options.seed)), int, "--seeds")
    config = SweepConfig(methods=tuple(options.methods.split(",")), seeds=seeds, full=options.full)
    steps = config.resolved(study.model, study.task).steps
    table = sweep(study.model, study.task, config, options.out / "sweep", overwrite=options.overwrite)
    assert table is not None
    table = table.assign(suppressed=suppressed(table), works=works(table))
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
    study.end(finding(table, sensitivity, predicted, steps), frames, table, in_place=True)


def works(table: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row forgot the forget set, neither knows nor suppresses it, and kept the retain set, by the quizzes."""
    kept = table.loc[table["method"] == UNEDITED, "retain_accuracy"].iloc[0] - KEPT_WITHIN
    forgot = (table["forget_accuracy"] <= _floor(table) + ABSENT_WITHIN) & ~suppressed(table)
    return forgot & (table["retain_accuracy"] >= kept)


def suppressed(table: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row answers the forget quiz worse than what was never taught, for which it has to be known."""
    return table["forget_accuracy"] < _floor(table) - ABSENT_WITHIN


def _floor(table: pd.DataFrame) -> "pd.Series[float]":
    """The never-taught level; chance where that is unknown."""
    return table["untaught_accuracy"] if "untaught_accuracy" in table else table["chance"]


def smallest_working(table: pd.DataFrame) -> "pd.Series[float]":
    """Layer -> the smallest c with which RMU worked for more than half of the seeds."""
    rmu = table[table["method"] == "rmu"]
    share = rmu.groupby(["layer", "coefficient"])["works"].mean().reset_index()
    return share[share["works"] > MOST].groupby("layer")["coefficient"].min()


def finding(table: pd.DataFrame, sensitivity: pd.DataFrame, predicted: pd.DataFrame, steps: int | None) -> str:
    """Every layer and c with the share of seeds that worked, noise sensitivity and Eq. 19's c, and how to read them."""
    keys = ["method", "layer", "relative_coefficient"]
    columns = ["forget_accuracy", "retain_accuracy", "suppressed", "works"]
    fits = table[table["method"] != UNEDITED].groupby(keys, sort=False, dropna=False)[columns].mean().reset_index()
    theory = predicted.merge(sensitivity[["group", "layer", "sensitivity"]], how="left", on=["group", "layer"])
    shown = ["group", "layer", "sensitivity", "coefficient", "low", "high", "norm", "working_coefficient"]
    tables = (
        markdown_of_rows(fits.to_dict("records"), [*keys, *columns]),
        markdown_of_rows(theory.to_dict("records"), shown),
    )
    updates = "as many updates as the methods do by default" if steps is None else f"at most {steps} updates"
    return "\n\n".join([*tables, READING.format(steps=updates)])


if __name__ == "__main__":
    as_program("analysis.layers", main)
