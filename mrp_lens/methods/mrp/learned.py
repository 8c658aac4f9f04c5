"""MRP's rows and gates as they learn."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from mrp_lens.edits import ConditionalProjectionEdit, ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods.mrp.gates import LearnedGate
from mrp_lens.methods.mrp.initialization import Rows, orthonormal
from mrp_lens.models.hooks import HookFunction


@dataclass
class LearnedRows:
    """The rows under training: W at each hook, orthogonal to the rows of earlier requests, and the gates before them.

    Attributes:
        rows: hook name -> W.
        taken: hook name -> the rows of earlier requests there.
        earlier: hook name -> what the earlier requests do there.
        gates: hook name -> when the rows are removed. Hooks without one: always.
        on: False: no projection at all.
        alone: without the earlier requests.
        skipped: hook names where these rows are left out.
        shares: hook name -> how far the gate was open for each state of the last pass, [batch, seq].
    """

    rows: dict[str, Rows]
    taken: Mapping[str, Rows]
    earlier: Mapping[str, Module]
    gates: dict[str, LearnedGate] = field(default_factory=dict)
    on: bool = True
    alone: bool = False
    skipped: frozenset[str] = frozenset()
    shares: dict[str, Float[Tensor, "batch seq"]] = field(default_factory=dict)

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """Hook functions that remove what the earlier requests remove and what W spans, in float32."""
        return [(hook, self._hook(hook)) for hook in dict.fromkeys([*self.rows, *self.taken])]

    def _hook(self, name: str) -> HookFunction:
        def project(activation: Tensor, hook: Any) -> Tensor:
            if not self.on:
                return activation
            states = rearrange(activation.float(), "batch seq d -> (batch seq) d")
            left = states if self.alone or name not in self.earlier else self.earlier[name](states)
            if name in self.rows and name not in self.skipped:
                rows = orthonormal(self.rows[name], self.taken.get(name)).to(states.device)
                part = (left @ rows.T) @ rows
                if name in self.gates:
                    shares = self.gates[name](states)
                    self.shares[name] = shares.view(activation.shape[:-1])
                    part = shares[:, None] * part
                left = left - part
            return left.view_as(activation).type_as(activation)

        return project

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without any projection."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @contextmanager
    def before(self) -> Iterator[None]:
        """The model as it was before this fit: with the earlier requests, if the step under way trains with them."""
        self.skipped = frozenset(self.rows)
        try:
            yield
        finally:
            self.skipped = frozenset()

    @contextmanager
    def without(self, hooks: Iterable[str]) -> Iterator[None]:
        """The model with the rows of other hooks only; their shares are not kept."""
        self.skipped = frozenset(hooks)
        self.shares.clear()
        try:
            yield
        finally:
            self.skipped = frozenset()

    @contextmanager
    def with_all(self) -> Iterator[None]:
        """The model as the edit makes it, whichever requests the step under way trains with."""
        alone, self.alone = self.alone, False
        try:
            yield
        finally:
            self.alone = alone

    def parameters(self, *, lr: float, gate_lr: float) -> list[dict[str, Any]]:
        """For an optimizer: the rows, and the gates with a learning rate of their own."""
        groups: list[dict[str, Any]] = [{"params": list(self.rows.values()), "lr": lr}]
        if self.gates:
            groups.append({"params": [each for gate in self.gates.values() for each in gate.parameters], "lr": gate_lr})
        return groups

    def edit(self, request: str, record: Mapping[str, Any]) -> ProjectionEdit:
        """The rows and gates as they are now."""
        subspaces = {
            hook: Subspace(orthonormal(rows.detach(), self.taken.get(hook)).cpu()) for hook, rows in self.rows.items()
        }
        if not self.gates:
            return ProjectionEdit(subspaces, request=request, provenance=record)
        gates = {hook: gate.gate() for hook, gate in self.gates.items()}
        return ConditionalProjectionEdit(subspaces, gates, request=request, provenance=record)
