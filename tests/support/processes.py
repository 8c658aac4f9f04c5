"""A function in several processes that are a gloo group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def in_processes(work: Callable[..., Any], folder: Path, *arguments: Any, count: int) -> list[Any]:
    """What `work(*arguments)`, a function of a module, returns in each of so many processes.

    Args:
        work: returns what `torch.save` can write and `torch.load` reads without pickled code.
        folder: an empty one, for the results and for the processes to meet in.
        arguments: of `work`.
        count: of processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start_processes(_work, (work, folder, count, arguments), nprocs=count, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _work(rank: int, work: Callable[..., Any], folder: Path, count: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder.absolute()}/meeting", rank=rank, world_size=count)
    torch.save(work(*arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
