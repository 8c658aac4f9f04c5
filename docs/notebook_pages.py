"""What mkdocs adds to the site when it builds it: a page for each notebook, with what its cells put out.

The notebooks lie in git without outputs. Here each is run on the demo model; the one on a pretrained model where MRP_LENS_MODEL names a
checkpoint, and else it is shown as it is. What came out is kept in `.docs_cache`, for as long as notebook and library are the same.
"""

import html
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hooks import ROOT, as_html, cached, filled, place_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = ROOT / "notebooks"
REAL_MODEL, NAMED = "6_real_model", "MRP_LENS_MODEL"
KIND = "output"  # of the places, and their class
FIGURE = "application/vnd.plotly.v1+json"
INSTALLS = "find_spec("  # in the cell that installs mrp_lens where it is not there
PANDAS = re.compile(r'<style.*?</style>| border="1" class="dataframe"', re.DOTALL)  # how it makes a table look
SECONDS = 600  # for a cell
SHOWN = """
This page is [{name}]({name}) as it ran when the site was built; `make notebooks` opens it, and two lines point it at a model of yours.
"""
NOT_RUN = """
This page is [{name}]({name}), which needs a pretrained model on disk: `make notebooks` opens it. Its cells are shown without what they
put out.
"""

COLAB = "\n[Open it in Colab](https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}){{ .md-button }}\n"

Cell = Mapping[str, Any]

logger = logging.getLogger("mkdocs.notebook_pages")
outputs: dict[str, list[str]] = {}  # of a page, in its places


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for each notebook, and the notebook beside it."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells, ran = cells_of(path)
        place = f"notebooks/{path.stem}.md"
        note = SHOWN if ran else NOT_RUN
        if config.extra["repository"]:
            note += COLAB
        text, outputs[place] = markdown_of(cells, note.format(name=path.name, repository=config.extra["repository"]))
        files.append(File.generated(config, place, content=text))
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_bytes()))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put what the cells put out into its places."""
    return filled(content, page, outputs.get(page.file.src_uri, []), KIND)


def cells_of(path: Path) -> tuple[list[Cell], bool]:
    """The cells with what they put out, from the cache or newly run; and whether they were run."""
    source = path.read_text(encoding="utf-8")
    if path.stem == REAL_MODEL and NAMED not in os.environ:
        return json.loads(source)["cells"], False
    return json.loads(cached([source, os.environ.get(NAMED)], lambda: run(source, path.name)))["cells"], True


def run(source: str, name: str) -> str:
    """The notebook with what its cells put out, in an empty folder."""
    import nbclient
    import nbformat

    logger.info("running: %s", name)
    os.environ["TQDM_DISABLE"] = "1"
    notebook = nbformat.reads(source, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    text: str = nbformat.writes(notebook)
    return text


def markdown_of(cells: Sequence[Cell], note: str) -> tuple[str, list[str]]:
    """The page, with places for what its cells put out; and that, as HTML."""
    parts: list[str] = []
    found: list[str] = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif INSTALLS not in source:
            parts.append(f"```python\n{source}\n```")
            shown = list(html_of(cell["outputs"], len(found)))
            parts += [place_of(len(found) + number, KIND) for number in range(len(shown))]
            found += shown
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, note.strip(), rest.strip(), *parts[1:]]), found


def html_of(put_out: Sequence[Cell], number: int) -> Iterator[str]:
    """What a cell put out, numbered from there on: its figures, tables and texts, but no warnings and progress bars."""
    from plotly import io

    for place, output in enumerate((each for each in put_out if each.get("name") != "stderr"), number):
        data = output.get("data", {})
        if FIGURE in data:
            yield as_html(io.from_json(json.dumps(data[FIGURE]), skip_invalid=True), f"output-{place}")
        elif "text/html" in data:
            yield f'<div class="{KIND}">{PANDAS.sub("", "".join(data["text/html"]))}</div>'
        else:
            text = "".join(output.get("text") or data.get("text/plain") or "")
            yield f'<pre class="{KIND}">{html.escape(text)}</pre>'
