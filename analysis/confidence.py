"""How sure is the model before and after, and does Proposition 1 say by how much steering spreads the logits?

`python -m analysis.confidence --model demo --out runs/confidence`

Confidence is measured greedily on the first generated tokens, as the paper (arXiv 2408.06223) does, and teacher-forced
on the right answers, where all versions of the model are asked about the same tokens. The theory check puts RMU's
target on by a hook, with noise, and compares the logits' mean and covariance with W g(cu) and eta W J J^T W^T; then
c grows.
"""

from collections.abc import Sequence

import pandas as pd

from analysis.common.arguments import Study, add_set_option, parser_for
from analysis.common.methods import OWN, with_settings
from analysis.common.tables import markdown_of_rows
from mrp_lens import metrics
from mrp_lens.cli.app import as_program
from mrp_lens.edits import Edit, edit_on
from mrp_lens.methods import METHODS
from mrp_lens.metrics.controls import UNEDITED

QUESTIONS = 100  # a side
PROMPTS = 3  # of the theory check
SPREADS = (0.3, 0.1, 0.01)  # length of the noise over c, in the theory check
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # c over the norm of the prompts' own states
NOISE_SHARE = 0.01  # length of the noise over that norm, as c grows
KEYS = ["method", "group", "mode", "measure"]
READING = """\
First table: the largest logit and the probability of the right answer's tokens, mean over tokens with the spread (`std`) beside
it. An edit makes the model less sure where MaxLogit falls out of the unedited interval on forget questions and not on retain
questions. Second: Proposition 1 at c = {c:.4g}, the mean absolute error of each statistic of the logits at the last position,
and for how many prompts the prediction lies `inside` the sampling interval; it is a statement about small noise (eta), so that
the smallest is the one that tests it. Third: with the noise held and c in units of the states' norm, the paper argues that the
variance of the logits grows with c."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "confidence")
    parser.add_argument("--tokens", type=int, default=30, help="generated tokens a question (default 30, the paper's)")
    parser.add_argument("--samples", type=int, default=4096, help="draws of the noise in the theory check")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    methods = with_settings({name: METHODS[name]() for name in OWN}, options.set)
    study = Study.begin("analysis.confidence", "Confidence before and after, and Proposition 1", options)
    study.check_one_direction()
    questions = study.task.asked(limit=QUESTIONS)
    fits = {name: study.fit(method) for name, method in methods.items()}
    edits: dict[str, Edit | None] = {UNEDITED: None} | {name: fit.edit for name, fit in fits.items()}
    summaries, tokens = [], []
    for name, edit in edits.items():
        with edit_on(study.model, edit):
            for mode in ("generated", "forced"):
                frame = metrics.confidence(study.model, questions, mode=mode, tokens=options.tokens, progress=True)
                summaries.append(frame.assign(method=name))
            tokens.append(metrics.token_confidence(study.model, questions, mode="forced").assign(method=name))
    table = pd.concat(summaries, ignore_index=True)
    rmu = fits["rmu"]
    layer, c = int(rmu.settings["layer"]), float(rmu.settings["steering_coeff"])
    prompts = study.task.forget_prompts(limit=PROMPTS)
    d_model = int(study.model.cfg.d_model)
    theory = metrics.proposition_1(
        study.model,
        prompts,
        rmu.direction,
        layer=layer,
        coefficient=c,
        noise=[(share * c) ** 2 / d_model for share in SPREADS],
        samples=options.samples,
        seed=options.seed,
        progress=True,
    )
    norm = float(theory["norm"].mean())
    growth = metrics.variance_by_coefficient(
        study.model,
        prompts,
        rmu.direction,
        layer=layer,
        coefficients=[share * norm for share in SHARES],
        noise=(NOISE_SHARE * norm) ** 2 / d_model,
        samples=max(2, options.samples // 8),
        seed=options.seed,
        progress=True,
    )
    frames = {
        "confidence_by_method": table[table["mode"] == "forced"],
        "confidence_distribution": pd.concat(tokens, ignore_index=True),
        "theory_check": theory,
        "variance_by_coefficient": growth,
    }
    study.end(finding(table, theory, growth, c), frames, table[[*KEYS, *(name for name in table if name not in KEYS)]])


def finding(table: pd.DataFrame, theory: pd.DataFrame, growth: pd.DataFrame, c: float) -> str:
    """The rows of MaxLogit and the right answer's probability, both checks of the theory, and how to read them."""
    sure = table[table["measure"].isin(["max_logit", "probability"])]
    check = theory.assign(error=theory["error"].abs()).groupby(["statistic", "noise"], sort=False)
    rising = growth.assign(relative_coefficient=growth["coefficient"] / growth["norm"].mean())
    means = rising.groupby("relative_coefficient")["measured"].mean()
    tables = [
        markdown_of_rows(sure.to_dict("records"), [*KEYS, "mean", "low", "high", "std"]),
        markdown_of_rows(
            check.agg(mean_error=("error", "mean"), inside=("inside", "sum"), prompts=("inside", "size"))
            .reset_index()
            .to_dict("records"),
            ["statistic", "noise", "mean_error", "inside", "prompts"],
        ),
        markdown_of_rows(
            means.rename("variance_of_the_logits").reset_index().to_dict("records"),
            ["relative_coefficient", "variance_of_the_logits"],
        ),
    ]
    return "\n\n".join([*tables, READING.format(c=c)])


if __name__ == "__main__":
    as_program("analysis.confidence", main)
