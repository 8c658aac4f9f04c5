"""The picture of README and front page, drawn from a run of the demo.

`mrp-lens demo --out runs/demo`, then `python -m docs.picture runs/demo`: writes docs/assets/demo.svg, and demo.csv, the table that it
shows. Plotly draws in a browser (Chromium, as in the tests of pages).
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import pandas as pd

import mrp_lens as ml
from tests.support.browser import look_at

ASSETS = Path(__file__).parent / "assets"
FIGURE = "demo"
DRAW = f"Plotly.toImage('{FIGURE}', {{format: 'svg'}})"


def main(folder: Path) -> None:
    """Draw the table of a run."""
    figure = ml.plots.accuracies(pd.read_csv(folder / "table.csv"))
    with TemporaryDirectory() as place:
        page = Path(place) / "page.html"
        page.write_text(figure.to_html(include_plotlyjs=True, div_id=FIGURE), encoding="utf-8")
        address = look_at(page, DRAW, ready=f"document.querySelector('#{FIGURE} .main-svg') !== null").value
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / "demo.svg").write_text(unquote(address.split(",", 1)[1]), encoding="utf-8")
    shutil.copy(folder / "table.csv", ASSETS / "demo.csv")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
