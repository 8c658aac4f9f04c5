"""Do forget states point along u, and more so as c grows? Each against unrelated directions of the same law.

`python -m analysis.alignment --model demo --out runs/alignment`

RMU is fitted at several c, given as multiples of the forget states' norm at its layer, all with its default alpha, which
does not depend on c, as the paper (arXiv 2408.06223) varies c alone; Adaptive RMU and MRP with their defaults. MRP has
no direction: its states are held against RMU's u, which is unrelated to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from analysis.common.arguments import Study, add_set_option, parser_for
from analysis.common.methods import OWN, with_settings
from analysis.common.tables import markdown_of_rows
from mrp_lens import metrics
from mrp_lens.cli.app import as_program
from mrp_lens.data import Corpus
from mrp_lens.edits import edit_on
from mrp_lens.methods import METHODS, RMU, Fit
from mrp_lens.methods.rmu import default_layer
from mrp_lens.metrics.controls import UNEDITED

SHARES = (0.5, 1.0, 2.0, 4.0)  # c over the norm of the forget states
USUAL = 2.0  # RMU's default; by layer, the one nearest to it is shown
DOCUMENTS = 200  # a side
SHOWN = (
    "method",
    "relative_coefficient",
    "group",
    "cosine",
    "low",
    "high",
    "null_mean",
    "null_low",
    "null_high",
    "norm",
)
READING = """\
The cosine of the states with u at layer {layer}, where unedited forget states have a mean norm of {norm:.3g}; `c / norm` is
RMU's c in units of that norm. The entries of u are drawn from U[0, 1), so that a cosine other than 0 says nothing by itself:
`null mean` is what unrelated directions of the same law give. RMU steers where forget states lie above that interval while
retain states stay inside it, and the paper is right about c where their cosine rises from one c to the next. MRP's rows show
what an edit does that has never heard of u."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "alignment")
    parser.add_argument("--layer", type=int, help="RMU's layer (default: by the model's depth)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="c over the norm (default 0.5 1 2 4)")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    methods = with_settings({name: METHODS[name]() for name in OWN}, options.set)
    study = Study.begin("analysis.alignment", "Alignment of the states with RMU's direction", options)
    study.check_one_direction()
    layer = default_layer(study.model) if options.layer is None else options.layer
    texts = study.task.texts(limit=DOCUMENTS)
    first = study.fit(RMU(layer=layer, steering_coeff=1.0, steps=1))  # for its u, which depends on the seed alone
    norm = float(
        metrics.alignment(study.model, texts, first.direction, layers=[layer]).set_index("group")["norm"]["forget"]
    )
    rmu, adaptive = replace(methods["rmu"], layer=layer), replace(methods["adaptive-rmu"], layer=layer)
    fits = {("rmu", share): study.fit(replace(rmu, steering_coeff=share * norm)) for share in options.shares} | {
        ("adaptive-rmu", adaptive.beta): study.fit(adaptive),
        ("mrp", float("nan")): study.fit(methods["mrp"]),
    }
    frames = [measured(study, texts, None, first).assign(method=UNEDITED)]
    for (method, share), fit in fits.items():
        frame = measured(study, texts, fit, first)
        frames.append(frame.assign(method=method, relative_coefficient=share))
    table = pd.concat(frames, ignore_index=True)
    table["coefficient"] = (table["relative_coefficient"] * norm).where(table["method"] == "rmu")
    at_layer = table[table["layer"] == layer]
    usual = min(options.shares, key=lambda share: abs(share - USUAL))
    by_layer = table[(table["method"] != "rmu") | (table["relative_coefficient"] == usual)]
    study.end(
        finding(at_layer, layer, norm),
        {
            "alignment_by_coefficient": at_layer[at_layer["method"] == "rmu"],
            "alignment_by_layer": by_layer.drop(columns=["coefficient", "relative_coefficient"]),
            "norms": by_layer.drop(columns="relative_coefficient"),
        },
        at_layer,
    )


def measured(study: Study, texts: Mapping[str, Corpus], fit: Fit | None, first: Fit) -> pd.DataFrame:
    """Alignment at all layers, with the fit's own u if it has one."""
    u = fit.direction if fit is not None and fit.directions else first.direction
    with edit_on(study.model, fit.edit if fit else None):
        return metrics.alignment(study.model, texts, u, seed=study.run.seed)


def finding(table: pd.DataFrame, layer: int, norm: float) -> str:
    """The rows of RMU's layer, and how to read them; Adaptive RMU's c is beta times the norm of each state."""
    return f"{markdown_of_rows(table.to_dict('records'), SHOWN)}\n\n{READING.format(layer=layer, norm=norm)}"


if __name__ == "__main__":
    as_program("analysis.alignment", main)
