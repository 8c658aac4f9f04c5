"""How sure is the model before and after, and does Proposition 1 say by how much steering spreads the logits?

`python -m analysis.confidence --model demo --out runs/confidence`

Confidence is measured greedily on the first generated tokens, as the paper (arXiv 2408.06223) does, and teacher-forced
on the right answers, where all versions of the model are asked about the same tokens. The theory check puts RMU's
target on by a hook, with noise, and compares the logits' mean and covariance with W g(cu) and eta W J J^T W^T; then
c grows.
"""

from collections.abc import Sequence

import pandas as pd

from analysis.common.arguments import Study, parser_for
from mrp_lens import metrics
from mrp_lens.edits import Edit, edit_on

QUESTIONS = 100  # a side
PROMPTS = 3  # of the theory check
SPREADS = (0.3, 0.1, 0.01)  # length of the noise over c, in the theory check
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # c over the norm of the prompts' own states
NOISE_SHARE = 0.01  # length of the noise over that norm, as c grows
KEYS = ["method", "group", "mode", "measure"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "confidence")
    parser.add_argument("--tokens", type=int, default=30, help="generated tokens a question (default 30, the paper's)")
    parser.add_argument("--samples", type=int, default=4096, help="draws of the noise in the theory check")
    options = parser.parse_args(arguments)
    study = Study.begin("analysis.confidence", "Confidence before and after, and Proposition 1", options)
    questions = study.task.asked(limit=QUESTIONS)
    fits = study.fit_defaults()
    edits: dict[str, Edit | None] = {"unedited": None} | {name: fit.edit for name, fit in fits.items()}
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
        samples=options.samples // 8,
        seed=options.seed,
        progress=True,
    )
    frames = {
        "confidence_by_method": table[table["mode"] == "forced"],
        "confidence_distribution": pd.concat(tokens, ignore_index=True),
        "theory_check": theory,
        "variance_by_coefficient": growth,
    }
    text = "\n\n".join([confidence_finding(table), theory_finding(theory, c), growth_finding(growth)])
    study.end(text, frames, table[[*KEYS, *(name for name in table if name not in KEYS)]])


def confidence_finding(table: pd.DataFrame) -> str:
    """MaxLogit and the right answer's probability, before and after, in sentences."""
    values = {tuple(row[key] for key in KEYS): row for row in table.to_dict("records")}
    lines = []
    for method in table["method"].unique():
        if method == "unedited":
            continue
        parts = []
        for group in table["group"].unique():
            for mode in table["mode"].unique():
                before, after = (values[name, group, mode, "max_logit"] for name in ("unedited", method))
                moved = (
                    "down" if after["high"] < before["low"] else "up" if after["low"] > before["high"] else "nowhere"
                )
                spread = "narrower" if after["std"] < before["std"] else "wider"
                parts.append(
                    f"{group}, {mode}: {moved} from {before['mean']:.2f} to {after['mean']:.2f}, {spread} "
                    f"(spread over tokens {before['std']:.2f} to {after['std']:.2f})"
                )
        answer = [values[name, "forget", "forced", "probability"]["mean"] for name in ("unedited", method)]
        lines.append(
            f"{method}, MaxLogit: {'; '.join(parts)}. Probability of the right answer's tokens on forget questions: "
            f"{answer[0]:.3f} to {answer[1]:.3f}."
        )
    return "\n\n".join(lines)


def theory_finding(theory: pd.DataFrame, c: float) -> str:
    """How far Proposition 1 is off, and from which noise on it is not."""
    lines = [f"Proposition 1 at c = {c:.4g}, the noise at the last position:"]
    for statistic, rows in theory.groupby("statistic", sort=False):
        steps = [
            f"{abs(part['error']).mean():.3f} at eta = {noise:.3g} (inside the interval for {int(part['inside'].sum())} of {len(part)} prompts)"
            for noise, part in sorted(rows.groupby("noise"), key=lambda pair: -float(pair[0]))  # type: ignore[arg-type]
        ]
        lines.append(f"{str(statistic).replace('_', ' ')}, mean absolute error: {', '.join(steps)}.")
    smallest = theory[theory["noise"] == theory["noise"].min()]
    share = float(smallest["inside"].mean())
    verdict = (
        "holds to within sampling error" if share >= 0.9 else "does not hold throughout" if share >= 0.5 else "fails"
    )
    lines.append(
        f"At the smallest noise it {verdict} ({int(smallest['inside'].sum())} of {len(smallest)} statistics inside)."
    )
    return " ".join(lines)


def growth_finding(growth: pd.DataFrame) -> str:
    """Whether the logits' variance grows with c, as the paper argues."""
    mean = growth.assign(share=growth["coefficient"] / growth["norm"].mean()).groupby("share")["measured"].mean()
    course = ", ".join(f"{value:.3g} at c = {share:g} norms" for share, value in mean.items())
    steps = mean.diff().dropna()
    grows = "grows" if (steps > 0).all() else "falls" if (steps < 0).all() else "goes up and down"
    agrees = "as the paper argues" if grows == "grows" else "against the paper's argument"
    return f"As c grows with the noise held, the variance of the logits {grows}, {agrees}: {course}."


if __name__ == "__main__":
    main()
