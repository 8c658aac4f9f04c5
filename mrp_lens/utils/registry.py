"""Registries: what a method, an attack, a metric, a figure or a family says of itself, in one place that everything else reads.

A package of yours registers too: name its module under the entry point group `mrp_lens.plugins`, and importing it is enough.

    [project.entry-points."mrp_lens.plugins"]
    mine = "my_package.unlearning"
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from typing_extensions import override

from mrp_lens.utils.validation import meant

GROUP = "mrp_lens.plugins"
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

Entry = TypeVar("Entry")


class UnknownNameError(ValueError, KeyError):
    """A name that nothing is registered under."""

    __str__ = ValueError.__str__


class Registry(Mapping[str, Entry], Generic[Entry]):
    """What is registered under which name, in the order of registration: this library's own, then plugins.

    Args:
        noun: what an entry is called in errors, such as "method".
        home: the package whose import registers this library's own.
        names: what a name looks like.
    """

    def __init__(self, noun: str, home: str, *, names: re.Pattern[str] = NAME) -> None:
        self.noun, self._home, self._names = noun, home, names
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry.

        Raises:
            ValueError: the name is taken, or is not made of lower-case words joined by - or _.
        """
        if not self._names.fullmatch(name):
            allowed = "lower-case words joined by - or _" if self._names is NAME else f"one like {self._names.pattern}"
            raise ValueError(f"{name!r} is no name for a {self.noun}; use {allowed}")
        known = self._entries.get(name)
        if known is not None and known != entry and _place(known) != _place(entry):
            raise ValueError(
                f"a {self.noun} named {name!r} is registered already, by {_place(known)}; choose another name"
            )
        self._entries[name] = entry

    @override
    def __getitem__(self, name: str) -> Entry:
        self._load()
        if name not in self._entries:
            raise UnknownNameError(
                f"unknown {self.noun} {name!r}; {meant(str(name), self._entries)}choose one of {', '.join(self._entries)}"
            )
        return self._entries[name]

    @override
    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    @override
    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(tuple(self._entries))

    @override
    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        import_module(self._home)
        load_plugins()


@cache
def load_plugins() -> tuple[str, ...]:
    """Import the modules that installed packages name as plugins, once; one that fails is told of and left out."""
    loaded = []
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            warnings.warn(f"the plugin {point.name!r} ({point.value}) was left out: {error!r}", stacklevel=2)
        else:
            loaded.append(point.name)
    return tuple(loaded)


def _place(entry: object) -> str:
    """Where an entry was defined: importing its module a second time registers it again."""
    name = getattr(entry, "__qualname__", None)
    return repr(entry) if name is None else f"{getattr(entry, '__module__', '')}.{name}"
