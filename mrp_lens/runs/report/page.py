"""The page of a run folder: what was done, the table, the figures, answers, settings and versions."""

import base64
import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markdown_it import MarkdownIt
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mrp_lens.methods import METHODS
from mrp_lens.plots import FIGURES
from mrp_lens.plots.frames import TEXT_COLUMNS, NothingToDraw
from mrp_lens.runs.record import FRAMES
from mrp_lens.runs.report.answers import answers_of
from mrp_lens.runs.report.table import table_of
from mrp_lens.utils.io import write_text

PAGE = "report.html"
EDIT_CONFIG = "edit_config.json"

HEIGHT = 450  # of a figure that says nothing of its height: plotly's own
OTHERWISE = "fitted with the settings below"


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        name: of its function.
        caption: what it shows.
        json: the figure, so that it can stand inside a script element.
        height: in pixels, which the page keeps free until the figure is drawn.
    """

    name: str
    caption: str
    json: str
    height: int


@dataclass(frozen=True)
class Fitted:
    """A fit of the run.

    Attributes:
        sentence: what was done.
        method: a line on the method, and where it comes from; "": this library does not know it.
        settings: of the fit.
    """

    sentence: str
    method: str
    settings: Mapping[str, Any]


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Make one self-contained HTML page of a run folder; it opens without a network.

    Args:
        folder: that a command or study wrote: `summary.json`, and `frames/`, edits and `finding.md` where there are.
        out: the page. None: `report.html` in the folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such folder, or no `summary.json` in it.
        ValueError: a file in it is damaged.
    """
    source = Path(folder)
    if not (source / "summary.json").is_file():
        raise FileNotFoundError(
            f"{source} holds no summary.json; give the folder that a command or study of mrp_lens wrote, such as runs/demo"
        )
    finding = source / "finding.md"
    environment = Environment(
        loader=PackageLoader("mrp_lens.runs.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    with _named(source / "finding.md"):
        found = prose(finding.read_text(encoding="utf-8")) if finding.is_file() else ""
    edits, pictures = list(edits_in(source)), list(pictures_in(source))
    with _named(source / "summary.json"):
        summary = json.loads((source / "summary.json").read_text(encoding="utf-8"))
        html = environment.get_template("page.html.jinja").render(
            summary=summary,
            answers=answers_of(summary["rows"]),
            table=table_of(summary["rows"]),
            finding=found,
            edits=edits,
            pictures=pictures,
            examples=summary["examples"],
            plotlyjs=packed_plotly() if pictures else "",
        )
    target = source / PAGE if out is None else Path(out)
    write_text(target, html)
    return target


def prose(text: str) -> Markup:
    """Markdown as HTML, its headings one lower; markup of its own, links and images, which a page would fetch, stay text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))


@cache
def packed_plotly() -> str:
    """Plotly's script, compressed and as text; once a process, as it takes half a second."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What cannot be read inside is an error that names the file.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        UndefinedError,
        ValueError,
    ) as error:
        raise ValueError(f"{file} is damaged ({error!r}); run the command again") from error


def pictures_in(folder: Path) -> Iterator[Picture]:
    """Every stored frame with something to draw, by the function whose name it bears, in the order of `FIGURES`."""
    for name, draw in FIGURES.items():
        path = folder / FRAMES / f"{name}.csv"
        if path.is_file():
            with _named(path):
                try:
                    figure = draw(frame_in(path))
                except NothingToDraw:
                    continue
            caption = (draw.__doc__ or "").strip().splitlines()[0]
            yield Picture(name, caption, figure.to_json().replace("<", "\\u003c"), figure.layout.height or HEIGHT)


def frame_in(path: Path) -> pd.DataFrame:
    """A stored frame. In columns of text "null", "NA" and "01" are text, and an empty cell is an empty text; in others it is NaN."""
    columns = pd.read_csv(path, nrows=0).columns
    typed = {str(name): str for name in columns if name in TEXT_COLUMNS}
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=typed)
    others = frame.select_dtypes(exclude="number")
    texts = [name for name, values in others.items() if any(isinstance(value, str) for value in values)]
    return frame.fillna(dict.fromkeys(texts, ""))


def edits_in(folder: Path) -> Iterator[Fitted]:
    """The edits that the run saved, told from their records; each fit once, however many edits went on from it."""
    told = set()
    for path in sorted(folder.glob(f"**/{EDIT_CONFIG}")):
        with _named(path):
            fits = list(_fits_in(path))
        for words, method, settings in fits:
            fit = (words, json.dumps(settings, sort_keys=True))
            if fit not in told:
                told.add(fit)
                yield Fitted(words, method, settings)


def _fits_in(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of each fit of an edit that is on disk: a sentence, a line on its method, and its settings."""
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = config["settings"]["parts"] if config["kind"] == "stack" else [config]
    for part in parts:
        records = part["provenance"].get("requests", {"": part["provenance"]})
        for request, record in records.items():
            if "method" in record:
                kind = METHODS.get(str(record["method"]))
                method = "" if kind is None else f"{kind.summary} {kind.source}".strip()
                yield sentence(record, request), method, dict(record["settings"])


def sentence(record: Mapping[str, Any], request: str) -> str:
    """What was done, from the record of a fit and what its method says; of an unknown method, that it was fitted."""
    settings, data, kind = record["settings"], record["data"], METHODS.get(str(record["method"]))
    told = {key: listed(value) if key.endswith("layers") else value for key, value in settings.items()}
    reports = () if kind is None else (kind.report,) if isinstance(kind.report, str) else kind.report
    known = (words for words in reports if words and set(_names(words)) <= told.keys())
    done = next(known, OTHERWISE).format_map(told)
    sides = {side: sum(part["documents"] for part in data[side]) for side in ("forget", "retain")}
    about = f" (request {request})" if request else ""
    return (
        f"{record['method']}{about}: {done}; {record['steps_done']} steps, {sides['forget']} documents to forget, "
        f"{sides['retain']} to keep, seed {record['seed']}"
    )


def _names(words: str) -> list[str]:
    """The names in the braces of a template."""
    return [name for _, name, _, _ in Formatter().parse(words) if name]


def listed(values: Any) -> str:
    """3, 5 and 7."""
    items = [str(value) for value in values] if isinstance(values, list | tuple) else [str(values)]
    return ", ".join(items) if len(items) < 2 else f"{', '.join(items[:-1])} and {items[-1]}"
