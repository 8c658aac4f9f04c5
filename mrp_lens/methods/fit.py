"""The result of fitting a method, in memory and in a folder."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.edits import Edit, load_edit
from mrp_lens.methods.outcome import Outcome
from mrp_lens.utils.frames import frame_of, rows_of
from mrp_lens.utils.interrupts import complete
from mrp_lens.utils.io import make_folder, read_json, write_json, write_text
from mrp_lens.utils.processes import computed_once, together

EDIT, LOG, FIT = "edit", "log.csv", "fit.json"  # what a saved fit consists of
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Fit:
    """The result of fitting a method.

    Attributes:
        edit: apply it, save it, stack it.
        log: one row a step: `step`, `loss` and its parts, `seconds`; with a budget also `left`, `target`, `damage`, `budget`, `retain_factor`
            (see `plots.budget`).
        settings: every hyperparameter as it was used, derived defaults included.
        interrupted: Ctrl-C ended the fit early; the edit holds what was learned until then.
        directions: RMU and Adaptive RMU: forget corpus -> its unit direction u, [d_model].
        outcome: whether it reached its target within its budget of damage; None: it had no budget.
    """

    edit: Edit
    log: pd.DataFrame
    settings: Mapping[str, Any]
    interrupted: bool = False
    directions: Mapping[str, Float[Tensor, " d_model"]] = field(default_factory=dict)
    outcome: Outcome | None = None

    def save(self, folder: str | Path) -> None:
        """Write `edit/`, `log.csv` and, last of all, `fit.json` into a folder: once that is there, the fit is whole. (The log
        is in both: in CSV for people, in JSON to the last bit.)"""
        target = make_folder(folder)
        (target / FIT).unlink(missing_ok=True)  # of an earlier fit, of which nothing is whole any more from here on
        self.edit.save_pretrained(target / EDIT, overwrite=True)
        write_text(target / LOG, self.log.to_csv(index=False))
        write_json(
            target / FIT,
            {
                "settings": dict(self.settings),
                "interrupted": self.interrupted,
                "directions": {name: direction.tolist() for name, direction in self.directions.items()},
                "log": rows_of(self.log),
                "outcome": None if self.outcome is None else self.outcome.to_json(),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Fit":
        """What `save` wrote; tensors come back bit-identical.

        Raises:
            FileNotFoundError: the folder holds no fit, or a part of it is missing.
            ValueError: a file is damaged.
        """
        target = Path(folder)
        if not (target / FIT).is_file():
            raise FileNotFoundError(f"{target} holds no {FIT}; give a folder that a fit was saved into")
        try:
            content = read_json(target / FIT, "fit again")
            directions = {
                name: torch.tensor(values, dtype=torch.float32) for name, values in content["directions"].items()
            }
            log = frame_of(content["log"])
            settings, interrupted = dict(content["settings"]), bool(content["interrupted"])
            outcome = Outcome.from_json(content.get("outcome"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the fit in {target} is damaged ({error!r}); fit again") from error
        return cls(load_edit(target / EDIT), log, settings, interrupted, directions, outcome)

    @classmethod
    @together()
    def once(cls, folder: str | Path, make: Callable[[Path], "Fit"]) -> "Fit":
        """The fit that a folder holds, or a new one, saved there before anything else is done with it. Of several processes the
        first saves it.

        Args:
            folder: of this fit.
            make: called with a folder for the checkpoint, which is removed once the fit is saved.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the fit; the checkpoint stays, and the next call goes on with it.
        """
        target = Path(folder)
        if not computed_once((target / FIT).is_file):
            fit = complete(make(target / CHECKPOINT))
            computed_once(lambda: fit.save(target))
        computed_once(lambda: shutil.rmtree(target / CHECKPOINT, ignore_errors=True))
        return cls.load(target)

    @property
    def ended(self) -> str | None:
        """How it ended, in a word; None: it had no budget."""
        return None if self.outcome is None else self.outcome.ended

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The direction u of a fit with one forget corpus.

        Raises:
            ValueError: the method has no direction, or several.
        """
        if len(self.directions) != 1:
            raise ValueError(
                f"this fit has {len(self.directions)} directions {list(self.directions)}; use fit.directions[name]"
            )
        return next(iter(self.directions.values()))
