"""The rows of a projection while they are trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from mrp_lens.edit import ProjectionEdit
from mrp_lens.methods.start import Rows, orthonormal, without
from mrp_lens.stream import HookFunction
from mrp_lens.subspace import Subspace


@dataclass
class LearnedRows:
    """The rows under training: W at each hook, with the earlier requests' rows that they stay orthogonal to."""

    rows: dict[str, Rows]
    taken: Mapping[str, Rows]
    on: bool = True
    alone: bool = False

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """Hook functions that remove the earlier requests' rows and what W spans, in float32."""
        return [(hook, self._hook(hook)) for hook in dict.fromkeys([*self.rows, *self.taken])]

    def _hook(self, name: str) -> HookFunction:
        def project(activation: Tensor, hook: Any) -> Tensor:
            if not self.on:
                return activation
            left = rearrange(activation.float(), "batch seq d -> (batch seq) d")
            taken = self.taken.get(name)
            if not self.alone:
                left = without(left, taken)
            if name in self.rows:
                left = without(left, orthonormal(self.rows[name], taken))
            return left.view_as(activation).type_as(activation)

        return project

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without any projection, so that what later requests keep is measured against it, not against what
        earlier requests left."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def edit(self, request: str, record: Mapping[str, Any]) -> ProjectionEdit:
        """The rows as they are now."""
        subspaces = {
            hook: Subspace(orthonormal(rows.detach(), self.taken.get(hook)).cpu()) for hook, rows in self.rows.items()
        }
        return ProjectionEdit(subspaces, request=request, provenance=record)
