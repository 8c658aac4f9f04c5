"""Which attacks there are, and what each says of itself to the suite, the command line, the report page and the leaderboard."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from mrp_lens.attacks.base import Attack
from mrp_lens.utils.registry import Registry

ATTACKS: Registry[type[Attack]] = Registry("attack", "mrp_lens.attacks")
TAKEN = ("attacks", "model", "edit", "reference", "data", "split", "questions", "seed")

Class = TypeVar("Class", bound=type[Any])

_owners: dict[str, str] = dict.fromkeys(TAKEN, "the suite")


def register(name: str, *, summary: str, source: str) -> Callable[[Class], Class]:
    """Make an attack known by its name.

        @register("mine", summary="Does what I want.", source="arXiv 0000.00000")
        @dataclass(frozen=True, kw_only=True)
        class Mine(Attack): ...

    A budget's name is its own: the command line offers the budgets of all attacks side by side.

    Raises:
        TypeError: it is no dataclass, or a budget has no default.
        ValueError: the name is taken or ill-formed, or another attack has a budget of the same name.
    """

    def registered(kind: Class) -> Class:
        if "__dataclass_fields__" not in vars(kind):
            raise TypeError(
                f"{kind.__name__} is no dataclass of its own; put @dataclass(frozen=True, kw_only=True) under @register"
            )
        for budget in fields(kind):
            if budget.default is MISSING and budget.default_factory is MISSING:
                raise TypeError(f"the budget {budget.name} of the attack {name!r} has no default; give it one")
            owner = _owners.get(budget.name, name)
            if owner != name:
                raise ValueError(
                    f"the attack {name!r} has a budget {budget.name}, which is one of {owner}; choose another name for it"
                )
        kind.name, kind.summary, kind.source = name, summary, source
        ATTACKS.add(name, kind)
        _owners.update((budget.name, name) for budget in fields(kind))
        return kind

    return registered
