"""A folder of results computed one by one, each whole or not at all, so that a killed run goes on where it stopped."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.files import PARTIAL, write_json
from mrp_lens.runs import rows_of

POINTS = "points"


@dataclass(frozen=True)
class Pieces:
    """The folder of a run whose settings are fixed: `<kind>.json` holds these, `points/` one file a result."""

    folder: Path

    @classmethod
    def claim(cls, folder: str | Path, kind: str, settings: Mapping[str, Any]) -> "Pieces":
        """Make the folder, or go on in one of the same settings.

        Args:
            folder: of the run.
            kind: what it is called in errors, such as "sweep".
            settings: everything that the results depend on; JSON.

        Raises:
            ValueError: the folder holds such a run with other settings (which differ is said).
            FileExistsError: it holds something else.
        """
        target = Path(folder)
        path = target / f"{kind}.json"
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            differing = [
                f"{key} ({_short(known.get(key))} there, {_short(value)} now)"
                for key, value in plain.items()
                if known.get(key) != value
            ]
            if differing:
                raise ValueError(
                    f"{target} holds a {kind} with other settings: {'; '.join(differing)}. Choose another folder, or the same settings"
                )
            return cls(target)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and holds no {kind}; choose another folder")
        (target / POINTS).mkdir(parents=True, exist_ok=True)
        write_json(path, plain)
        return cls(target)

    def stored(self, name: str) -> dict[str, Any] | None:
        """The result of that name, if it is there."""
        path = self.folder / POINTS / f"{name}.json"
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def keep(self, name: str, content: dict[str, Any]) -> dict[str, Any]:
        """Write a result; returns it."""
        (self.folder / POINTS).mkdir(exist_ok=True)
        write_json(self.folder / POINTS / f"{name}.json", content)
        return content

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that name, computed and written unless it is there already."""
        known = self.stored(name)
        return self.keep(name, compute()) if known is None else known

    def frame(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The frame of that name, likewise."""
        return pd.DataFrame(self.once(name, lambda: {"rows": rows_of(compute())})["rows"])

    def tidy(self) -> None:
        """Remove what processes left that were killed while they wrote; call it once nobody writes any more."""
        for leftover in (self.folder / POINTS).glob(f".*{PARTIAL}"):
            leftover.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
