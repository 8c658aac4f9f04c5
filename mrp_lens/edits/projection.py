"""MRP's edit: at chosen hook points, a subspace is removed from every state."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.base import Edit, Wrapper, as_it_is, check_width
from mrp_lens.edits.exported_hooks import Change, Projection
from mrp_lens.edits.gate import Gate
from mrp_lens.edits.merging import OUTPUTS, project_writers, writers
from mrp_lens.edits.provenance import of_model_alone
from mrp_lens.edits.serialization import setting
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import Layout, LensModel, device_at
from mrp_lens.models.attachments import AppliedEdit, entries_on
from mrp_lens.models.hooks import (
    HookFunction,
    add_hooks,
    check_hook_names,
    hook_points,
    layer_of,
    place_in_block,
    site_of,
)
from mrp_lens.models.weights import joint_description


class Direction(NamedTuple):
    """One row of what a request removes at a hook; `row` counts from 0. Another basis of the same subspace has other rows."""

    request: str
    hook: str
    row: int


class ProjectionEdit(Edit):
    """h <- h - (h Q^T) Q at each hook, Q in float32, the result cast back (MRP, arXiv 2508.15449).

    The rows are kept per request, in order, so that one request can be taken back. Where several requests sit on
    one hook their subspaces are *joined*: the product of two projections would leave a part of each (0.13 in an
    example), the projection off the join leaves nothing.

    Args:
        subspaces: hook name -> what to remove there.
        request: the name under which `without` finds it again.
        provenance: how it came about.

    Raises:
        TypeError: a value is not a Subspace.
        ValueError: no hooks, names that are not inside a block, or subspaces of different width.

    Example:
        >>> import torch
        >>> edit = ProjectionEdit({"blocks.3.hook_resid_post": Subspace(torch.eye(2, 8))}, request="mine")
        >>> edit.requests
        ('mine',)
    """

    kind = "projection"

    _gates: Mapping[str, Mapping[str, Gate]] = MappingProxyType({})  # of a conditional projection: by request and hook

    def __init__(
        self, subspaces: Mapping[str, Subspace], *, request: str = "edit", provenance: Mapping[str, Any] | None = None
    ) -> None:
        self._set({request: dict(subspaces)}, dict(provenance or {}))

    @classmethod
    def from_requests(
        cls, requests: Mapping[str, Mapping[str, Subspace]], *, provenance: Mapping[str, Any] | None = None
    ) -> "ProjectionEdit":
        """Several requests at once, in order: request -> hook name -> what to remove there."""
        edit = cls.__new__(cls)
        edit._set({name: dict(subspaces) for name, subspaces in requests.items()}, dict(provenance or {}))
        return edit

    def _set(self, requests: dict[str, dict[str, Subspace]], provenance: dict[str, Any]) -> None:
        if not requests or not all(requests.values()):
            raise ValueError("a projection needs at least one hook: {'blocks.3.hook_resid_post': Subspace(Q)}")
        joined: dict[str, Subspace] = {}
        for subspaces in requests.values():
            for name, subspace in subspaces.items():
                layer_of(name)
                if not isinstance(subspace, Subspace):
                    raise TypeError(
                        f"{name}: expected a Subspace, got {type(subspace).__name__}; wrap orthonormal rows as Subspace(Q)"
                    )
                joined[name] = joined[name].join(subspace) if name in joined else subspace
        if len({subspace.d_model for subspace in joined.values()}) > 1:
            raise ValueError("the subspaces of one edit must share one d_model")
        self._requests = requests
        self._joined = joined
        self.provenance = provenance

    @property
    def requests(self) -> tuple[str, ...]:
        """The names of the requests, in order."""
        return tuple(self._requests)

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hook points that are projected, by layer."""
        return tuple(sorted(self._joined, key=layer_of))

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer_of(name) for name in self._joined}))

    def subspaces(self, request: str | None = None) -> dict[str, Subspace]:
        """What is removed at each hook: by one request, or (None) by all of them together.

        Raises:
            ValueError: there is no such request.
        """
        if request is None:
            return dict(self._joined)
        self._check_known(request)
        return dict(self._requests[request])

    def gates(self, request: str) -> dict[str, Gate]:
        """What says, at each hook, of which states a request's rows are removed; hooks that are not named have no gate, and
        a plain projection has none at all.

        Raises:
            ValueError: there is no such request.
        """
        self._check_known(request)
        return dict(self._gates.get(request, {}))

    def change_at(self, hook: str) -> Change:
        """What is done to the states at one of its hooks, as a module of torch."""
        return Projection(self._joined[hook].basis)

    def random_like(self, *, seed: int = 0) -> "ProjectionEdit":
        """The control: random subspaces of the same rank at the same hooks, in one request named "random"."""
        return ProjectionEdit(
            {
                hook: Subspace.random(subspace.rank, subspace.d_model, seed=seed + number)
                for number, (hook, subspace) in enumerate(self._joined.items())
            },
            request="random",
        )

    def without(self, *requests: str) -> "ProjectionEdit":
        """The edit with some requests taken back.

        Raises:
            ValueError: there is no such request, or none would be left.
        """
        for request in requests:
            self._check_known(request)
        left = {name: subspaces for name, subspaces in self._requests.items() if name not in requests}
        if not left:
            raise ValueError(
                f"nothing would be left without {', '.join(map(repr, requests))}; do not apply the edit at all instead"
            )
        gates = {name: self.gates(name) for name in left}
        return self._made_of(left, gates, _of_requests(self.provenance, left))

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Every single direction that is removed: by request, then hook, then row of its subspace's basis."""
        return tuple(
            Direction(request, hook, row)
            for request, subspaces in self._requests.items()
            for hook in sorted(subspaces, key=place_in_block)
            for row in range(subspaces[hook].rank)
        )

    def with_directions(self, directions: Iterable[Direction]) -> "ProjectionEdit":
        """A projection off some of these directions alone, behind the gates that they have.

        What a plain request no longer removes may still be removed by another whose rows overlap with it. Of the provenance
        the model alone is kept: no fit made this edit.

        Raises:
            ValueError: no direction, or one that this edit has not.

        Example:
            >>> first, *others = fit.edit.directions
            >>> alone, without = fit.edit.with_directions([first]), fit.edit.with_directions(others)
        """
        known, chosen = self.directions, set(directions)
        unknown = next((each for each in chosen if each not in known), None)
        if unknown is not None:
            raise ValueError(f"no direction {tuple(unknown)} in this edit; edit.directions lists its {len(known)}")
        if not chosen:
            raise ValueError("a projection needs a direction at least; do not apply the edit at all instead")
        rows: dict[str, dict[str, list[int]]] = {}
        for request, hook, row in known:
            if (request, hook, row) in chosen:
                rows.setdefault(request, {}).setdefault(hook, []).append(row)
        requests = {
            request: {hook: Subspace(self._requests[request][hook].basis[kept]) for hook, kept in by_hook.items()}
            for request, by_hook in rows.items()
        }
        gates = {
            request: {hook: gate for hook, gate in self.gates(request).items() if hook in by_hook}
            for request, by_hook in requests.items()
        }
        return self._made_of(requests, gates, of_model_alone(self.provenance))

    def join(self, other: "ProjectionEdit") -> "ProjectionEdit":
        """The requests of both; what each removes is removed together.

        Raises:
            ValueError: one request name stands for two different sets of rows or gates, rows behind gates overlap, or the two were
                made for different models.
        """
        requests = {name: dict(subspaces) for name, subspaces in self._requests.items()}
        for name, subspaces in other._requests.items():
            if name in requests and not (_same(requests[name], subspaces) and self.gates(name) == other.gates(name)):
                what = "rows" if not self._gates and not other._gates else "rows or gates"
                raise ValueError(
                    f"both edits have a request {name!r}, with different {what}; give each its own name (fit(..., request=...))"
                )
            requests.setdefault(name, dict(subspaces))
        mine, theirs = dict(self.provenance), dict(other.provenance)
        merged = {**theirs, **mine, "requests": {**mine.get("requests", {}), **theirs.get("requests", {})}}
        model = joint_description(self.made_for, other.made_for)
        if model is not None:
            merged["model"] = model
        gates = {name: edit.gates(name) for edit in (other, self) for name in edit.requests}
        kind = other if other._gates else self  # with a gate on either side the join has one
        return kind._made_of(requests, gates, merged if mine or theirs else {})

    def _made_of(
        self,
        requests: Mapping[str, Mapping[str, Subspace]],
        gates: Mapping[str, Mapping[str, Gate]],
        provenance: Mapping[str, Any],
    ) -> "ProjectionEdit":
        """An edit of this kind with other requests."""
        return ProjectionEdit.from_requests(requests, provenance=provenance)

    @override
    def _put_on(self, model: LensModel, entry: AppliedEdit, *, check: bool, wrapped: Wrapper = as_it_is) -> None:
        points = hook_points(model, self._joined)
        check_width(model, next(iter(self._joined.values())).d_model, "the projection")
        if len(set(points)) < len(points):
            raise ValueError(
                f"some of {', '.join(self._joined)} are names of one hook, and two projections after one another do not remove both subspaces; "
                "give both subspaces under one name"
            )
        if any(point in other.places for other in entries_on(model) for point in points):
            raise ValueError(
                "another projection is on at one of these hooks; two projections after one another do not remove both subspaces. "
                "Join them: (edit_a + edit_b).applied(model)"
            )
        entry.places += points
        with torch.inference_mode(False):  # what is made inside of it is never differentiated through
            hooks = [
                (name, wrapped(self, name, _hook_of(self.change_at(name).to(device_at(model, layer_of(name))))))
                for name in sorted(self._joined, key=place_in_block)
            ]
        entry.hooks += add_hooks(model, hooks)

    @property
    @override
    def sole_hooks(self) -> tuple[str, ...]:
        return self.hook_names

    @override
    def joined_with(self, other: Edit) -> Edit | None:
        return self.join(other) if isinstance(other, ProjectionEdit) else None

    @override
    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        for hook in self.hook_names:
            layer, site = layer_of(hook), site_of(hook)
            if site in OUTPUTS and layout is not None and not layout.foldable:
                return f"in this architecture a norm stands between the matrix and {hook}"
            if site not in OUTPUTS and (site, layer) != ("resid_pre", 0):
                return (
                    f"at {hook} the stream is a sum of many layers' outputs, and the norm behind it divides by the length of that sum; "
                    "exact are mlp_out, attn_out, and resid_pre of layer 0"
                )
        return None

    @override
    def merge_targets(self, model: LensModel) -> list[torch.nn.Parameter]:
        check_hook_names(model, self.hook_names)
        return [parameter for hook in self.hook_names for parameter, _ in writers(model, hook)]

    @override
    def write_over(self, model: LensModel) -> None:
        for hook, subspace in self._joined.items():
            project_writers(writers(model, hook), subspace)

    @override
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        hooks: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for number, (request, subspaces) in enumerate(self._requests.items()):
            for name, subspace in subspaces.items():
                tensor = f"rows.{number}.{name}"
                hooks.append({"request": request, "hook": name, "rank": subspace.rank, "tensor": tensor})
                tensors[tensor] = subspace.basis
        return {"requests": list(self._requests), "hooks": hooks}, tensors

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ProjectionEdit":
        requests: dict[str, dict[str, Subspace]] = {}
        for request in setting(settings, "requests", list):
            if not isinstance(request, str) or request in requests:
                raise ValueError(f"requests must be different names, got {request!r}")
            requests[request] = {}
        for entry in setting(settings, "hooks", list):
            request, hook, tensor = (setting(entry, name, str) for name in ("request", "hook", "tensor"))
            if request not in requests or hook in requests[request]:
                raise ValueError(f"{hook!r} belongs to no request, or stands twice in {request!r}")
            basis = tensors[tensor]
            if basis.ndim != 2 or basis.shape[0] != setting(entry, "rank", int):
                raise ValueError(
                    f"{tensor!r} has shape {list(basis.shape)}, the configuration says rank {entry['rank']}"
                )
            requests[request][hook] = Subspace(basis)
        return cls.from_requests(requests)

    def _check_known(self, request: str) -> None:
        if request not in self._requests:
            raise ValueError(f"no request {request!r} in this edit; it has {', '.join(map(repr, self._requests))}")

    def __repr__(self) -> str:
        ranks = {name: self._joined[name].rank for name in self.hook_names}
        return f"ProjectionEdit(requests={list(self.requests)}, rank per hook={ranks})"


def projection_hook(subspace: Subspace) -> HookFunction:
    """A hook function that removes the subspace from the states passing through."""
    return _hook_of(Projection(subspace.basis))


def _hook_of(change: Change) -> HookFunction:
    def hook(activation: Tensor, hook: Any) -> Tensor:
        changed: Tensor = change(activation)
        return changed

    return hook


def _same(a: Mapping[str, Subspace], b: Mapping[str, Subspace]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].basis.shape == b[name].basis.shape and bool((a[name].basis == b[name].basis).all()) for name in a
    )


def _of_requests(provenance: Mapping[str, Any], left: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: entry for name, entry in provenance.get("requests", {}).items() if name in left}
    return {**provenance, "requests": kept} if provenance else {}
