"""What mkdocs adds to the pages when it builds them: pictures of the demo model, and the commands' help.

A page draws with the code that it shows. Where `<!-- figure: caption -->` stands, all Python blocks above it have been run, and
the last line of the last one is the plotly figure that is put there. `<!-- help: unlearn --method rmu -->` becomes what that
command says with --help, and `<!-- public names -->` a table of what `import mrp_lens` offers.

Figures are kept in `.docs_cache`, for as long as the code of the page and of the library is the same.
"""

import ast
import hashlib
import html
import io
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
PACKAGE, CACHE = ROOT / "mrp_lens", ROOT / ".docs_cache"
PLOTLY = "assets/javascripts/plotly.min.js"
PART = re.compile(r"^```python\n(?P<code>.*?)^```$|^<!-- figure: (?P<caption>.*?) -->$", re.DOTALL | re.MULTILINE)
HELP = re.compile(r"^<!-- help: ?(?P<words>.*?) -->$", re.MULTILINE)
PUBLIC_NAMES = "<!-- public names -->"
PUBLIC = re.compile(r"^from \.(?P<room>\S*) import (?P<name>\w+) as", re.MULTILINE)
REFERENCE = Path(__file__).parent / "reference"
COLUMNS = 96  # of a command's help

logger = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Plotly's script comes from the Python package, so that no page asks for one elsewhere."""
    from plotly.offline import get_plotlyjs

    files.append(File.generated(config, PLOTLY, content=get_plotlyjs()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in commands' help, and make places for the figures."""
    markdown = HELP.sub(lambda match: f"```text\n{help_of(shlex.split(match['words']))}\n```", markdown)
    if PUBLIC_NAMES in markdown:
        markdown = markdown.replace(PUBLIC_NAMES, public_names())
    page.meta["figures"] = figures = figures_of(markdown)
    numbers = iter(range(len(figures)))
    return PART.sub(lambda match: match[0] if match["caption"] is None else place_of(next(numbers)), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the figures into their places."""
    return filled(content, page, page.meta["figures"])


def on_post_build(config: MkDocsConfig) -> None:
    """In the site, llms.txt leads to the site's pages."""
    path = Path(config.site_dir) / "llms.txt"
    path.write_text(re.sub(r"\.md\)", ".html)", path.read_text(encoding="utf-8")), encoding="utf-8")


def place_of(number: int, kind: str = "figure") -> str:
    """Where the markdown has what is no markdown itself, such as a figure."""
    return f'<div class="{kind}" data-number="{number}"></div>'


def filled(content: str, page: Page, pieces: Sequence[str], kind: str = "figure") -> str:
    """A page with pieces of HTML in their places, before the first of which it loads the script that draws figures."""
    script = f'<script src="{get_relative_url(PLOTLY, page.url)}"></script>'
    for number, piece in enumerate(pieces):
        content = content.replace(place_of(number, kind), (script if number == 0 else "") + piece)
    return content


def as_html(figure: Any, name: str) -> str:
    """A figure that the page's script draws."""
    shown: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False})
    return f'<div class="figure">{shown}</div>'


def cached(what: object, make: Callable[[], str]) -> str:
    """What was made of the same thing, as JSON has it, by the same library; or is made now."""
    kept = CACHE / f"{hashlib.sha256(json.dumps([what, sources()]).encode()).hexdigest()}.json"
    if not kept.is_file():
        CACHE.mkdir(exist_ok=True)
        kept.write_text(make(), encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def figures_of(markdown: str) -> list[str]:
    """The figures of a page as HTML, from the cache or newly drawn."""
    parts = [(match["code"], match["caption"]) for match in PART.finditer(markdown)]
    if not any(caption for _, caption in parts):
        return []
    figures: list[str] = json.loads(cached(parts, lambda: json.dumps(list(drawn(parts)))))
    return figures


def drawn(parts: list[tuple[str | None, str | None]]) -> Iterator[str]:
    """Run the code of a page from top to bottom; each caption takes the figure that the code above it ends with."""
    os.environ["TQDM_DISABLE"] = "1"
    namespace: dict[str, Any] = {}
    value: Any = None
    for number, (code, caption) in enumerate(parts):
        if code is not None:
            value = run(code, namespace)
            continue
        logger.info("drawing: %s", caption)
        yield f"<figure>{as_html(value, f'figure-{number}')}<figcaption>{html.escape(str(caption))}</figcaption></figure>"


def run(code: str, namespace: dict[str, Any]) -> Any:
    """The value of the last line, where that is an expression."""
    *statements, last = ast.parse(code).body
    exec(compile(ast.Module(statements, []), "<page>", "exec"), namespace)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "<page>", "eval"), namespace)
    exec(compile(ast.Module([last], []), "<page>", "exec"), namespace)
    return None


def sources() -> str:
    """A hash of the library, this file included."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def help_of(words: list[str]) -> str:
    """What a command says with --help."""
    from mrp_lens.cli.app import run as command

    os.environ["COLUMNS"] = str(COLUMNS)
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            command([*words, "--help"])
    except SystemExit as end:
        if end.code:
            raise
    return said.getvalue().strip()


def public_names() -> str:
    """A table of the public names, each with the first line of its docstring; modules first."""
    import mrp_lens

    names = PUBLIC.findall((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    rows = ["| name | what it is |", "|---|---|"]
    for room, name in sorted(names, key=lambda pair: (bool(pair[0]), pair[1].casefold())):
        found = getattr(mrp_lens, name)
        said = str(found.__doc__).strip().split("\n\n")[0]
        target = f"[{found.__module__}.{found.__qualname__}]" if room else f"({page_of_module(name)})"
        rows.append(f"| [`ml.{name}`]{target} | {' '.join(said.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def page_of_module(name: str) -> str:
    """The reference page of a public module: its own, or the one that describes it among others."""
    described = [
        path.name
        for path in sorted(REFERENCE.glob("*.md"))
        if f"::: mrp_lens.{name}\n" in path.read_text(encoding="utf-8")
    ]
    return f"{name}.md" if (REFERENCE / f"{name}.md").is_file() else described[0]
