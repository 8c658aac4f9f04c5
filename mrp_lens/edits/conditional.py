"""A projection that acts on some states only: at each hook a gate looks at the state and says how much is removed."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.exported_hooks import ConditionalProjection
from mrp_lens.edits.gate import Gate
from mrp_lens.edits.merging import not_mergeable
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.serialization import setting
from mrp_lens.edits.subspace import ORTHONORMAL_TOLERANCE, Subspace
from mrp_lens.models import Layout, LensModel


class Gated(NamedTuple):
    """What one request removes at a hook, behind its gate; or all requests that have no gate there, as one subspace."""

    requests: tuple[str, ...]
    subspace: Subspace
    gate: Gate | None


class ConditionalProjectionEdit(ProjectionEdit):
    """h <- h - g(h) (h Q^T) Q at each hook, with g(h) = sigmoid(sharpness * (cos(h, w) - threshold)), all in float32.

    Where several requests sit on one hook every gate looks at the state that comes in, and h <- h - sum_i g_i(h) (h Q_i^T) Q_i:
    the order does not matter, and where all gates are open nothing is left of the joint subspace. For that the rows of
    different requests must be orthogonal, as those of a fit with `after=` are. A request without a gate at a hook is
    removed there always.

    Args:
        subspaces: hook name -> what to remove there.
        gates: hook name -> when. At hooks without one all states are projected.
        request: the name under which `without` finds it again.
        provenance: how it came about.

    Raises:
        TypeError: a value is not a Subspace, or not a Gate.
        ValueError: as `ProjectionEdit`; no gate at all, a gate at a hook that is not projected, or of another width.

    Example:
        >>> import torch
        >>> hook = "blocks.3.hook_resid_post"
        >>> gate = Gate(torch.ones(8), threshold=0.2)
        >>> ConditionalProjectionEdit({hook: Subspace(torch.eye(2, 8))}, {hook: gate}, request="mine").requests
        ('mine',)
    """

    kind = "conditional-projection"

    def __init__(
        self,
        subspaces: Mapping[str, Subspace],
        gates: Mapping[str, Gate],
        *,
        request: str = "edit",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(subspaces, request=request, provenance=provenance)
        self._put_behind({request: gates})

    @classmethod
    @override
    def from_requests(
        cls,
        requests: Mapping[str, Mapping[str, Subspace]],
        gates: Mapping[str, Mapping[str, Gate]] = ProjectionEdit._gates,
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> "ConditionalProjectionEdit":
        """Several requests at once, in order: request -> hook name -> what to remove there, and likewise when.

        Raises:
            ValueError: also where the rows of two requests at one hook are not orthogonal.
        """
        edit = cls.__new__(cls)
        edit._set({name: dict(subspaces) for name, subspaces in requests.items()}, dict(provenance or {}))
        edit._put_behind(gates)
        return edit

    def _put_behind(self, gates: Mapping[str, Mapping[str, Gate]]) -> None:
        for request, by_hook in gates.items():
            self._check_known(request)
            for hook, gate in by_hook.items():
                if not isinstance(gate, Gate):
                    raise TypeError(
                        f"{hook}: expected a Gate, got {type(gate).__name__}; Gate(direction, threshold) is one"
                    )
                if hook not in self._requests[request]:
                    raise ValueError(
                        f"request {request!r} has a gate at {hook} and no subspace there; it has some at "
                        f"{', '.join(self._requests[request])}"
                    )
                if gate.d_model != self._joined[hook].d_model:
                    raise ValueError(
                        f"{hook}: the gate's direction has d_model {gate.d_model}, the subspace {self._joined[hook].d_model}"
                    )
        self._gates = {request: dict(by_hook) for request, by_hook in gates.items() if by_hook}
        if not self._gates:
            raise ValueError("a conditional projection needs a gate at least; without any it is a ProjectionEdit")
        for hook in self._joined:
            rows = torch.cat([part.subspace.basis.cpu().double() for part in self.gated_at(hook)])
            off = float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max())
            if off > ORTHONORMAL_TOLERANCE:
                names = [name for name, subspaces in self._requests.items() if hook in subspaces]
                raise ValueError(
                    f"the rows of the requests {', '.join(map(repr, names))} overlap at {hook} (off from orthogonal by {off:.2g}), and each "
                    "behind a gate of its own they could not be removed whole; fit the later request with after=EARLIER_EDIT"
                )

    def gated_at(self, hook: str) -> list[Gated]:
        """What is removed at a hook: first what always is, if anything, then what each gate decides on."""
        always: Gated | None = None
        gated: list[Gated] = []
        for request, subspaces in self._requests.items():
            gate = self._gates.get(request, {}).get(hook)
            if hook not in subspaces:
                continue
            if gate is not None:
                gated.append(Gated((request,), subspaces[hook], gate))
            elif always is None:
                always = Gated((request,), subspaces[hook], None)
            else:
                always = Gated((*always.requests, request), always.subspace.join(subspaces[hook]), None)
        return gated if always is None else [always, *gated]

    @override
    def change_at(self, hook: str) -> ConditionalProjection:
        parts = self.gated_at(hook)
        values = [part.subspace.basis for part in parts]
        values += [part.gate.rows for part in parts if part.gate is not None]
        gates = [
            {"rank": part.subspace.rank, "gate": None if part.gate is None else dict(part.gate.numbers)}
            for part in parts
        ]
        return ConditionalProjection(torch.cat([rows.to(values[0].device) for rows in values]), gates)

    @override
    def random_like(self, *, seed: int = 0) -> ProjectionEdit:
        """The control: random subspaces of the same ranks behind the same gates, in requests named "random NAME", and "random"
        for what has no gate."""
        requests: dict[str, dict[str, Subspace]] = {}
        gates: dict[str, dict[str, Gate]] = {}
        for hook, drawn in super().random_like(seed=seed).subspaces().items():
            rows = drawn.basis
            for owners, subspace, gate in self.gated_at(hook):
                name = "random" if gate is None else f"random {owners[0]}"
                requests.setdefault(name, {})[hook] = Subspace(rows[: subspace.rank])
                rows = rows[subspace.rank :]
                if gate is not None:
                    gates.setdefault(name, {})[hook] = gate
        return self._made_of(requests, gates, {})

    @override
    def _made_of(
        self,
        requests: Mapping[str, Mapping[str, Subspace]],
        gates: Mapping[str, Mapping[str, Gate]],
        provenance: Mapping[str, Any],
    ) -> ProjectionEdit:
        """An edit of this kind with other requests; one without a gate left is a plain projection."""
        if not any(gates.values()):
            return super()._made_of(requests, gates, provenance)
        return ConditionalProjectionEdit.from_requests(requests, gates, provenance=provenance)

    @override
    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        return "its gate looks at each state and decides how much of it is removed, which no matrix of the model does"

    @override
    def merge_targets(self, model: LensModel) -> list[torch.nn.Parameter]:
        return []

    @override
    def write_over(self, model: LensModel) -> None:
        raise not_mergeable(str(self.why_not_mergeable(None)))

    @override
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_parts()
        for entry in settings["hooks"]:
            gate = self.gates(entry["request"]).get(entry["hook"])
            entry["gate"] = None if gate is None else {**gate.numbers, "tensor": f"gate.{entry['tensor']}"}
            if gate is not None:
                tensors[entry["gate"]["tensor"]] = gate.direction
        return settings, tensors

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ConditionalProjectionEdit":
        plain = ProjectionEdit.from_parts(settings, tensors)
        gates: dict[str, dict[str, Gate]] = {request: {} for request in plain.requests}
        for entry in setting(settings, "hooks", list):
            stored = setting(entry, "gate", (dict, NoneType))
            if stored is not None:
                gates[entry["request"]][entry["hook"]] = Gate(
                    tensors[setting(stored, "tensor", str)],
                    setting(stored, "threshold", (int, float, list)),
                    setting(stored, "sharpness", (int, float, list)),
                    setting(stored, "hard", bool),
                )
        return cls.from_requests({name: plain.subspaces(name) for name in plain.requests}, gates)

    def __repr__(self) -> str:
        return f"Conditional{super().__repr__()}"
