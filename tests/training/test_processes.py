"""Processes that train together end as one does, and end together."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from mrp_lens.attacks.finetuning import Attacker
from mrp_lens.data import Corpus
from mrp_lens.methods import (
    MRP,
    NPO,
    RMU,
    UNDIAL,
    AdaptiveRMU,
    Coverage,
    GradientDifference,
    IdkPreference,
    NoisyRMU,
    SimNPO,
)
from mrp_lens.models import load_model
from mrp_lens.training import Callback, Checkpoint, train
from mrp_lens.training.loop import TrainingRun
from mrp_lens.training.optim import MasterAdamW, Trainable
from mrp_lens.utils.interrupts import Interruption, deferred
from mrp_lens.utils.processes import shares
from tests.support.processes import in_processes

STEPS, BATCH = 7, 5
KINDS = ("shares", "whole", "both", "list")


class LeastSquares:
    """A regression that is trained on batches of 5, in parts that the processes share, one by one or as a list, as a whole in
    each, or partly so.

    Args:
        kind: of these.
        broken: 2: in the second process the loss is NaN from step 2 on; "draws": random numbers are drawn for a part.
    """

    def __init__(self, kind: str, broken: Any = None) -> None:
        self.kind, self.broken = kind, broken
        self.generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(12, 4, generator=self.generator)
        self.wanted = torch.randn(12, generator=self.generator)
        self.parameter = torch.nn.Parameter(torch.zeros(4))  # which follows a master
        self.offset = torch.zeros(1, requires_grad=True)
        self.unused = torch.zeros(1, requires_grad=True)  # by some steps

    def __call__(self, step: int) -> Iterable[dict[str, Tensor]]:
        return list(self._terms_of(step)) if self.kind == "list" else self._terms_of(step)

    def _terms_of(self, step: int) -> Iterator[dict[str, Tensor]]:
        chosen = torch.randperm(12, generator=self.generator)[:BATCH]
        inputs, wanted = self.inputs[chosen], self.wanted[chosen]
        if self.kind == "whole":
            yield self._terms(step, inputs, wanted)
        else:
            for rows in shares(BATCH, 2):
                yield self._terms(step, inputs[rows], wanted[rows])
        if self.kind == "both":
            size = self.offset.square().sum() + 0.1 * self.parameter.square().sum()
            yield {"loss": size, "size": size}

    def _terms(self, step: int, inputs: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        if self.broken == "draws":
            torch.rand(len(inputs) + 1 if dist.get_rank() else 1, generator=self.generator)
        nan = self.broken == 2 and step == 2 and dist.get_rank() == 1
        bias = self.offset + (self.unused if step > 3 else 0.0)
        errors = inputs @ self.parameter + bias - wanted
        return {"loss": errors.square().sum() / BATCH * (torch.nan if nan else 1.0)}

    def trained(self, **options: Any) -> TrainingRun:
        """Train it."""
        master = Trainable(self.parameter.detach().clone().requires_grad_(), (self.parameter,))
        tensors = [master, Trainable(self.offset), Trainable(self.unused)]
        return train(
            self,
            MasterAdamW(tensors, lr=0.1),
            steps=STEPS,
            description="squares",
            progress=False,
            generator=self.generator,
            **options,
        )

    def state(self) -> Tensor:
        """All of its numbers."""
        return torch.cat([self.parameter.detach(), self.offset.detach(), self.unused.detach()])


class SignalTo(Callback):
    """Sends SIGTERM to one process of the group."""

    def __init__(self, rank: int, after: int) -> None:
        self.rank, self.after = rank, after

    @override
    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        if step == self.after and dist.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def outcomes(folder: Path) -> dict[str, Any]:
    """Of everything that a process can go through here."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        squares = LeastSquares(kind)
        run = squares.trained()
        found[kind] = (squares.state(), run.log["loss"].tolist())
    for broken in (2, "draws"):
        try:
            LeastSquares("shares", broken).trained()
        except Exception as error:
            found[f"broken {broken}"] = f"{type(error).__name__}: {error}"
    stopped = LeastSquares("both")
    kept = {"checkpoint": Checkpoint(folder, every=100)}
    try:
        stopped.trained(**kept, callbacks=[SignalTo(1, 2)])
    except SystemExit as ended:
        found["ended"] = (ended.code, len((kept["checkpoint"].load() or {})["rows"]))
    dist.barrier()
    again = LeastSquares("both")
    run = again.trained(**kept)
    found["again"] = (again.state(), run.log["loss"].tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_loop_of_several_processes_ends_as_that_of_one(count: int, tmp_path: Path) -> None:
    (tmp_path / "fit").mkdir()
    found = in_processes(outcomes, tmp_path / "group", tmp_path / "fit", count=count)
    for kind in KINDS:
        alone = LeastSquares(kind)
        log = alone.trained().log
        for process in found:
            state, losses = process[kind]
            torch.testing.assert_close(state, alone.state(), rtol=0, atol=1e-6)
            assert losses == pytest.approx(log["loss"].tolist(), rel=1e-5)
            assert torch.equal(state, found[0][kind][0])
    for process in found:
        assert process["broken 2"].startswith("NonFiniteLossError: squares: the loss is nan at step 2")
        assert "draw for the whole batch before it is parted" in process["broken draws"]
        assert process["ended"] == (128 + signal.SIGTERM, 4)  # the step after the one at whose end it came
        assert torch.equal(process["again"][0], found[0]["both"][0])
        assert process["again"][1] == found[0]["both"][1]
    assert [path.name for path in (tmp_path / "fit").iterdir()] == ["training.safetensors"]


def test_a_signal_that_another_process_had_is_not_the_first_of_two() -> None:
    with deferred(terminate=True) as asked:
        asked.follow([None, None])
        assert not asked
        asked.follow([None, signal.SIGINT, signal.SIGTERM])
        assert asked.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)  # torchrun sends it to one after the other
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    own = Interruption(signal.SIGINT)
    own.follow([signal.SIGINT])
    assert not own.elsewhere


SMALL: dict[str, Any] = {"steps": 6, "batch_size": 5}
READ: dict[str, Any] = {**SMALL, "coverage": Coverage(about_names=4, questions=4, free=4, new_tokens=6)}
METHODS: dict[str, Any] = {
    "mrp": MRP(layers=[1, 2], rank=2, **READ),
    "mrp-micro": MRP(layers=[1, 2], rank=2, micro_batch=2, **READ),
    "mrp-two-rows": MRP(layers=[1, 2], rank=2, **{**READ, "batch_size": 2}),  # of three processes one has none
    "rmu": RMU(layer=2, **READ),
    "rmu-noise": NoisyRMU(layer=2, **READ),
    "adaptive-rmu-first-batch": AdaptiveRMU(layer=2, coefficient="first_batch", **READ),
    "gradient-difference": GradientDifference(layers=[1, 2], budget=0.01, **SMALL),
    "npo": NPO(layers=[1, 2], **SMALL),
    "simnpo": SimNPO(layers=[1, 2], **SMALL),
    "idk-preference": IdkPreference(layers=[1, 2], **READ),
    "undial-micro": UNDIAL(layers=[1, 2], micro_batch=2, **SMALL),
}


def corpora() -> tuple[Corpus, Corpus]:
    """Documents of unequal length."""
    colours = ["red", "blue", "green", "white", "blue and red"]
    forget = [f"The colour of Zaxim{i} is {colours[i % 5]}." for i in range(15)]
    retain = [
        f"The old man walked slowly {word} near the house." for word in ["today", "again", "late", "early on"] * 5
    ]
    return Corpus.from_texts(forget, name="forget"), Corpus.from_texts(retain, name="retain")


def learned(folder: Path, backend: str) -> dict[str, Any]:
    """The tensors of each edit and of a retrained model, the losses on the way, and how it ended."""
    model = load_model(folder, backend=backend)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        fit = method.fit(model, *corpora(), seed=3, progress=False)
        losses = fit.log.drop(columns=["step", "seconds"]).to_numpy()
        found[name] = {"tensors": dict(fit.edit.to_parts()[1]), "losses": torch.tensor(losses), "ended": fit.ended}
    with Attacker(steps=3, batch_size=5).retrained(model, None, corpora()[0], lr=1e-3, progress=False) as ended:
        tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    found["retrained"] = {"tensors": tensors, "losses": torch.zeros(0), "ended": ended}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_a_fit_and_hold_the_edit_of_one(
    count: int, backend: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shared = in_processes(learned, tmp_path, tiny_folder, backend, count=count)
    for name, alone in learned(tiny_folder, backend).items():
        for process in shared:
            assert process[name]["ended"] == alone["ended"]
            torch.testing.assert_close(process[name]["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(process[name]["tensors"], alone["tensors"], rtol=0, atol=1e-6)
            for key, values in process[name]["tensors"].items():
                assert torch.equal(values, shared[0][name]["tensors"][key]), f"{name}: the processes hold other {key}"
