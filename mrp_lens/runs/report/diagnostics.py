"""What each edit did to the model, layer by layer: the frames that a report draws."""

from collections.abc import Mapping
from functools import partial

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens import metrics
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import Edit, edit_on, projection_in
from mrp_lens.edits.subspace import random_units
from mrp_lens.models import LensModel
from mrp_lens.utils.store import ResultStore
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for

DOCUMENTS = 100  # a side, from which states are read
QUESTIONS = 100  # a side, on which confidence is measured
POINTS = 100  # a side, in the plane


@ordinary_torch(gradients=False)
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
    """Alignment, confidence, displacement, the principal plane and the way of what was removed, for each edit.

    Args:
        model: HookedTransformer or TransformerBridge, without any edit.
        case: the data: states are read from at most 100 documents a side, confidence from 100 questions a side (where
            there is no quiz, from the texts).
        edits: by method; None is the unedited model.
        directions: method -> its u, [d_model]. The other rows of the alignment have the first of these, and with none
            at all an unrelated one.
        seed: of that one, and of the choice of documents.
        pieces: where the frames of each edit are kept, and read from if they are there.
        progress: show a progress bar.

    Returns:
        Name of a function of `mrp_lens.plots` -> the frame that it takes, with a column `method`.
    """
    texts = task.texts(limit=DOCUMENTS)
    questions = task.asked(limit=QUESTIONS)
    unrelated = random_units(1, model.cfg.d_model, "uniform", generator_for(seed))[0]
    usual = next(iter(directions.values()), unrelated)
    last = int(model.cfg.n_layers) - 1

    def look(method: str, edit: Edit | None) -> dict[str, pd.DataFrame]:
        with edit_on(model, edit):
            aligned = metrics.alignment(model, texts, directions.get(method, usual), seed=seed)
            frames = {
                "alignment_by_layer": aligned,
                "norms": aligned,
                "confidence_by_method": metrics.confidence(model, questions, mode="forced", seed=seed),
            }
        if edit is not None:
            frames["displacement"] = metrics.geometry(model, texts, edit, seed=seed)
            frames["principal_plane"] = metrics.principal_plane(
                model, texts, edit, layer=last, points=POINTS, seed=seed
            )
        if edit is not None and projection_in(edit) is not None:
            frames["propagation"] = metrics.propagation(model, texts, edit, seed=seed)
        return frames

    parts: dict[str, list[pd.DataFrame]] = {}
    with tqdm(edits.items(), desc="looking at each layer", disable=not progress) as bar:
        for method, edit in bar:
            bar.set_postfix_str(method)
            found = look(method, edit) if store is None else store.frames(f"look-{method}", partial(look, method, edit))
            for name, frame in found.items():
                parts.setdefault(name, []).append(frame.assign(method=method))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
