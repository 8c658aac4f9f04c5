"""The same fits in one process and in several that share them, over gloo."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from mrp_lens.data import Corpus
from mrp_lens.methods import MRP, NPO, RMU, AdaptiveRMU, Fit, GradientDifference, NoisyRMU

SMALL: dict[str, Any] = {"steps": 6, "batch_size": 5}  # of three processes one has a row less
METHODS: dict[str, Any] = {
    "mrp": MRP(layers=[1, 2], rank=2, **SMALL),
    "mrp-micro": MRP(layers=[1, 2], rank=2, micro_batch=2, **SMALL),
    "rmu": RMU(layer=2, **SMALL),
    "rmu-noise": NoisyRMU(layer=2, **SMALL),
    "adaptive-rmu-released": replace(AdaptiveRMU.released(layer=2), steps=6),
    "gradient-difference": GradientDifference(layers=[1, 2], budget=0.01, **SMALL),
    "npo": NPO(layers=[1, 2], **SMALL),
    "few": MRP(layers=[1, 2], rank=2, steps=6, batch_size=2),  # of three processes one has no row
}


def corpora() -> tuple[Corpus, Corpus]:
    """A few documents of unequal length."""
    colours = ["red", "blue", "green", "white", "blue and red"]
    forget = [f"The colour of Zaxim{i} is {colours[i % 5]}." for i in range(15)]
    retain = [
        f"The old man walked slowly {word} near the house." for word in ["today", "again", "late", "early on"] * 5
    ]
    return Corpus.from_texts(forget, name="forget"), Corpus.from_texts(retain, name="retain")


def fitted(model: Any, name: str, **options: Any) -> Fit:
    """One of the fits."""
    return METHODS[name].fit(model, *corpora(), seed=3, progress=False, **options)


def shared_fits(folder: Path, out: Path, names: list[str], processes: int, backend: str) -> None:
    """Fit in so many processes; each saves its fits in a folder of its own, `out/RANK/NAME`."""
    out.mkdir()
    start_processes(_work, (folder, out, names, processes, backend), nprocs=processes, start_method="spawn")


def _work(rank: int, folder: Path, out: Path, names: list[str], processes: int, backend: str) -> None:
    from mrp_lens.models import load_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=processes)
    model = load_model(folder, backend=backend)  # type: ignore[arg-type]
    for name in names:
        fitted(model, name).save(out / str(rank) / name)
    dist.destroy_process_group()
