"""What each edit did to the model, layer by layer: the frames that a report draws."""

from collections.abc import Mapping
from functools import partial

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import UnlearningTask
from mrp_lens.edits import Edit
from mrp_lens.metrics import Measured, frames_for
from mrp_lens.metrics.shared_states import states_shared
from mrp_lens.models import LensModel
from mrp_lens.utils.frames import by_figure
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.result_store import ResultStore

DOCUMENTS = 50  # a side, from which states are read
QUESTIONS = 100  # a side, on which confidence is measured


def diagnostics(
    model: LensModel,
    task: UnlearningTask,
    edits: Mapping[str, Edit | None],
    directions: Mapping[str, Float[Tensor, " d_model"]],
    *,
    seed: int = 0,
    store: ResultStore | None = None,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """The frames of every metric that has a figure on the report page, for each edit.

    Args:
        model: HookedTransformer or TransformerBridge, without any edit.
        task: the data: states are read from at most 50 documents a side, confidence from 100 questions a side (where
            there is no quiz, from the texts).
        edits: by method; None is the unedited model.
        directions: method -> its u, [d_model]. The other rows of the alignment have the first of these, and with none
            at all an unrelated one.
        seed: of that one, and of the choice of documents.
        store: where the frames of each edit are kept, and read from if they are there.
        progress: show a progress bar.

    Returns:
        Name of a figure of `mrp_lens.plots` -> the frame that it takes, with a column `method`.
    """
    usual = next(iter(directions.values()), None)
    parts: dict[str, Mapping[str, pd.DataFrame]] = {}
    with states_shared(), progress_bar(edits.items(), desc="looking at each layer", progress=progress) as bar:
        for method, edit in bar:
            bar.set_postfix_str(method, refresh=False)
            measured = Measured(
                model=model,
                task=task,
                edit=edit,
                direction=directions.get(method, usual),
                limit=QUESTIONS,
                documents=DOCUMENTS,
                seed=seed,
                progress=False,
            )
            look = partial(frames_for, measured)
            parts[method] = look() if store is None else store.frames(f"look-{method}", look)
    return by_figure(parts)
