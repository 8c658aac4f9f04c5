"""Options from settings dataclasses: name, type, default and help are those of a field and its docstring.

`jsonargparse` converts and checks the values by the fields' types. What stands here is what it does not do: dashes in names, flags
without a value, `3,5` and repeated options for lists, several fields that a docstring describes together.
"""

import logging
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from mrp_lens.utils.validation import meant

logger = logging.getLogger(__name__)

FLAG = True  # what an option without a value was given
NONE = ("none", "null")


class Repeated(list[Any]):
    """What an option was given that stands several times."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: with underscores; `distillation.steps` is an option inside another.
        field: of the settings, that it sets.
        type: of its value.
        default: MISSING: there is none.
        help: what the docstring says.
        part: the title it stands under in `--help`.
        separator: between several names; None: they are told apart by repeating the option.
    """

    name: str
    field: str
    type: Any
    default: Any
    help: str
    part: str
    separator: str | None = None

    @property
    def spelled(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    @cached_property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that its value may have, None left out."""
        several = get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)
        return tuple(kind for kind in several if kind is not NoneType)

    @property
    def settings(self) -> type | None:
        """The dataclass, if its value is one."""
        return next((kind for kind in self.alternatives if is_dataclass(kind) and isinstance(kind, type)), None)

    @property
    def element(self) -> Any:
        """What its value is a list of; None: it is no list."""
        if str in self.alternatives:
            return None
        lists = [kind for kind in self.alternatives if get_origin(kind) in (list, tuple, Sequence)]
        return get_args(lists[0])[0] if lists else None

    @property
    def is_flag(self) -> bool:
        """Whether it may stand without a value."""
        return bool in self.alternatives or self.settings is not None

    @property
    def has_negative(self) -> bool:
        """Whether it is on by default, and has to be turned off."""
        return self.is_flag and self.default not in (None, False, MISSING)

    @property
    def negative(self) -> str:
        """As it is typed to turn it off."""
        return f"--no-{self.name.replace('_', '-')}"

    @property
    def metavar(self) -> str | None:
        """What `--help` shows for its value."""
        if self.is_flag:
            return None
        kind = self.element or self.alternatives[0]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        shown = "|".join(map(str, choices)) or {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
        return f"{shown},..." if self.element in (int, float) or self.separator else shown

    @property
    def shows_default(self) -> bool:
        """Whether `--help` shows its default: None is explained by the text, and no flag stands at the start."""
        empty = self.default in ((), {}) or is_dataclass(self.default)
        return not empty and self.default is not None and self.default is not False

    def prepared(self, given: Any) -> Any:
        """What was given, as `jsonargparse` takes it: lists taken apart, flags given their value.

        Args:
            given: text, FLAG or False, what an option was given that stands several times, or a value from a file.

        Raises:
            ValueError: numbers that are none, or a value that is missing or makes no sense.
        """
        if isinstance(given, Repeated) and (self.element is not str or self.separator is not None):
            if any(one != given[-1] for one in given):  # only names that are told apart by repeating the option add up
                together = f" (several of them: {self.spelled} {','.join(map(str, given))})" if self.element else ""
                logger.warning(
                    "%s is given %d times; the last one counts, %s%s", self.spelled, len(given), given[-1], together
                )
            given = given[-1]
        if given is FLAG and not self.is_flag:
            raise ValueError(f"{self.spelled} needs a value")
        if isinstance(given, str) and given.lower() in NONE and NoneType in get_args(self.type):
            return None
        if self.settings is not None:
            return {} if given in (FLAG, "true") else None if given in (False, "false") else given
        return self._listed(given) if self.element is not None and given is not None else given

    def _listed(self, given: Any) -> list[Any]:
        texts = given if isinstance(given, list | tuple) else [given]
        separator = self.separator if self.element is str else ","
        parts = [
            part
            for text in texts
            for part in (text.split(separator) if isinstance(text, str) and separator else [text])
        ]
        if self.element in (int, float):
            try:
                return [self.element(part) if isinstance(part, str) else part for part in parts]
            except ValueError as error:
                raise ValueError(f"{self.spelled} takes numbers separated by commas, got {given!r}") from error
        return parts


def options_of(kind: type, part: str, *, prefix: str = "") -> Iterator[Option]:
    """The options of a settings dataclass, those of dataclasses inside it behind them."""
    hints, helps = get_type_hints(kind), described(kind)
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        option = Option(
            prefix + field.name,
            field.name,
            hints[field.name],
            default,
            helps.get(field.name, ""),
            part,
            field.metadata.get("separator"),
        )
        yield option
        if option.settings is not None:
            yield from options_of(option.settings, f"{part}: {option.spelled}", prefix=f"{option.name}.")


def described(kind: type) -> dict[str, str]:
    """Field -> what the `Args:` or `Attributes:` of the docstring say of it, or those of a base class, or of the class whose
    arguments the docstring says they are."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        text = base.__doc__ or ""
        section = re.search(r"\n\s*(?:Args|Attributes):\n(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL)
        for names, meaning in _entries(section[1]) if section is not None else ():
            for name in names.split(","):
                found.setdefault(name.strip(), meaning)
        for other in re.findall(r"arguments are those of `(\w+)`", text):
            found = described(getattr(sys.modules[base.__module__], other)) | found
    return found


def _entries(section: str) -> Iterator[tuple[str, str]]:
    """The names and the text of each entry, which begins at the margin."""
    lines = section.splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip())
    entries: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == margin or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += f" {line.strip()}"
    for entry in entries:
        names, _, text = entry.partition(":")
        yield names, text.strip()


def read(words: Sequence[str], options: Mapping[str, Option], *, positional: str | None, where: str) -> dict[str, Any]:
    """What was typed, by name.

    Args:
        words: the command line behind the command's name.
        options: by name.
        positional: the option that a word without a name is for.
        where: what has these options, for errors.

    Raises:
        ValueError: there is no such option, or its value is missing.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        value: Any = word
        if word.startswith("--"):
            typed, equals, value = word[2:].partition("=")
            name = typed.replace("-", "_")
            positive = options.get(name.removeprefix("no_"))
            if name not in options and name.startswith("no_") and positive is not None and positive.is_flag:
                name, value = positive.name, False
            elif name not in options:
                hint = meant(f"--{typed}", [option.spelled for option in options.values()])
                raise ValueError(f"{where} has no --{typed}; {hint}`mrp-lens {where} --help` shows what it has")
            elif not equals:
                bare = not rest or (options[name].is_flag and rest[0] not in ("true", "false"))
                value = FLAG if bare else rest.pop(0)
        elif positional is not None and (positional not in found or options[positional].element is not None):
            name = positional
        else:
            before = options.get(next(reversed(found), ""))
            meaning = ""
            if before is not None and before.is_flag and word.lower() in (*NONE, "off", "no"):
                meaning = f"did you mean {before.negative}? "
            elif before is not None and before.element is not None:
                separated = before.separator or ("," if before.element is not str else None)
                meaning = f"several of them are {before.spelled} " + (
                    f"A{separated}B; " if separated else f"A {before.spelled} B; "
                )
            raise ValueError(f"{where} takes no {word!r}; {meaning}options begin with --")
        found[name] = value if name not in found else Repeated([*_several(found[name]), value])
    return found


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def converted(given: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """The values by name, as the fields' types have them; only what was given.

    Raises:
        ValueError: one is not of its type.
    """
    nested: dict[str, Any] = {}
    for name in sorted(given, key=lambda name: name.count(".")):  # the outer ones first
        value = options[name].prepared(given[name])
        place, (*outer, last) = nested, name.split(".")
        for key in outer:
            place[key] = place.get(key) or {}
            place = place[key]
        place[last] = value
    texts = {name for name, value in nested.items() if isinstance(value, str) and str in options[name].alternatives}
    # `jsonargparse` reads a text as YAML where it may also be something else: "#1" as nothing, "[a]" as a list.
    others = {name: value for name, value in nested.items() if name not in texts}
    parser = ArgumentParser(exit_on_error=False)
    for name in others:
        parser.add_argument(f"--{name}", type=options[name].type)
    try:
        values = parser.instantiate(parser.parse_object(others))
    except ArgumentError as error:
        raise ValueError(_refusal(str(error), nested, options)) from error
    return {name: nested[name] if name in texts else values[name] for name in nested}


def _refusal(message: str, given: Mapping[str, Any], options: Mapping[str, Option]) -> str:
    """In one line, what `jsonargparse` says in several."""
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    name = key[1] if key else ""
    if name not in options or name not in given:
        return " ".join(message.split())
    option, value = options[name], given[name]
    choices = get_args(option.element or option.alternatives[0])
    if get_origin(option.element or option.alternatives[0]) is Literal:
        wrong = [one for one in _several(value) if one not in choices]
        return f"unknown {name.replace('_', ' ')} {wrong[0]!r}; {meant(str(wrong[0]), map(str, choices))}choose one of {', '.join(map(str, choices))}"
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(option.alternatives[0])
    return f"{option.spelled} must be {wanted or option.alternatives[0]}, got {value!r}"
