"""What `tune` may vary of a method: ranges relative to the model, which the method declares beside itself.

    @register("mine", ..., space={"layer": Depth(0.2, 0.6), "lr": Factor(0.1, 10.0), "rank": Range(1, 32, log=True, whole=True)})

A setting of the model, such as a layer, is drawn as a whole number; one that the method derives, as a factor on what it derives.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from typing_extensions import override

from mrp_lens.models import LensModel
from mrp_lens.utils.sequences import spread_over

DIGITS = 4  # of a drawn number, so that a table and a file can show it whole

Number = float | int


class Dimension(ABC):
    """One setting of a method that is searched."""

    @abstractmethod
    def draws(self, model: LensModel) -> "Mapping[str, Range | Options]":
        """What is drawn for it: ending of the name -> from what. "" is the setting's own name."""

    @abstractmethod
    def value(self, drawn: Mapping[str, Any], default: Any) -> Any:
        """The setting.

        Args:
            drawn: by the same endings.
            default: what the method derives from the model, with the rest of what was drawn.
        """

    @abstractmethod
    def nearest(self, default: Any, model: LensModel) -> Mapping[str, Any]:
        """What to draw for the setting that comes nearest to what the method has by default: by the endings of `draws`; nothing
        where no value of the space is anything like it.

        Args:
            default: what the method has, or derives from the model.
            model: that it is to be fitted to.
        """

    @property
    def needs_default(self) -> bool:
        """Whether its value depends on the derived default."""
        return False


@dataclass(frozen=True)
class Range(Dimension):
    """A number from `low` to `high`, both included.

    Attributes:
        low, high: the ends.
        log: drawn evenly in the logarithm.
        whole: a whole number.
    """

    low: Number
    high: Number
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high or (self.log and not self.low > 0):
            raise ValueError(
                f"a range needs low <= high, and low above 0 where log=True; got {self.low} to {self.high}"
            )
        if self.whole and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ValueError(f"a range of whole numbers needs whole ends; got {self.low} to {self.high}")

    @override
    def draws(self, model: LensModel) -> "Mapping[str, Range | Options]":
        return {"": self}

    @override
    def value(self, drawn: Mapping[str, Any], default: Any) -> Number:
        return int(drawn[""]) if self.whole else rounded(drawn[""])

    @override
    def nearest(self, default: Any, model: LensModel) -> Mapping[str, Any]:
        within = min(self.high, max(self.low, default))
        return {"": round(within) if self.whole else float(within)}


@dataclass(frozen=True)
class Options(Dimension):
    """One of several values: text, numbers or truth values.

    Attributes:
        values: to choose among.
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values or not all(isinstance(value, str | int | float | bool) for value in self.values):
            raise ValueError(f"options are at least one text, number or truth value, got {self.values}")

    @override
    def draws(self, model: LensModel) -> "Mapping[str, Range | Options]":
        return {"": self}

    @override
    def value(self, drawn: Mapping[str, Any], default: Any) -> Any:
        return drawn[""]

    @override
    def nearest(self, default: Any, model: LensModel) -> Mapping[str, Any]:
        return {"": default} if default in self.values else {}


@dataclass(frozen=True)
class Factor(Dimension):
    """A factor on what the method derives from the model, drawn evenly in the logarithm.

    Attributes:
        low, high: the ends of the factor.
        whole: the setting is a whole number, at least 1.
    """

    low: float
    high: float
    whole: bool = False

    @override
    def draws(self, model: LensModel) -> "Mapping[str, Range | Options]":
        return {".factor": Range(self.low, self.high, log=True)}

    @override
    def value(self, drawn: Mapping[str, Any], default: Any) -> Number:
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise ValueError(f"a factor needs a number to multiply, and the method derives {default!r}; use a Range")
        found = rounded(drawn[".factor"] * default)
        return max(1, round(found)) if self.whole else found

    @override
    def nearest(self, default: Any, model: LensModel) -> Mapping[str, Any]:
        (what,) = self.draws(model).values()
        return {".factor": what.nearest(1.0, model)[""]}

    @property
    @override
    def needs_default(self) -> bool:
        return True


@dataclass(frozen=True)
class Depth(Dimension):
    """A layer, by its share of the depth: 0 is the first, 1 the last.

    Attributes:
        low, high: the ends.
        lowest: no layer below this is drawn, whatever its share.
    """

    low: float = 0.0
    high: float = 1.0
    lowest: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"shares of the depth are from 0 to 1, low <= high; got {self.low} to {self.high}")
        if not self.lowest >= 0:
            raise ValueError(f"lowest is a layer, and the first one is 0; got {self.lowest}")

    @override
    def draws(self, model: LensModel) -> "Mapping[str, Range | Options]":
        last = int(model.cfg.n_layers) - 1
        low, high = (max(self.lowest, round(share * last)) for share in (self.low, self.high))
        return {"": Range(low, high, whole=True)}

    @override
    def value(self, drawn: Mapping[str, Any], default: Any) -> int:
        return int(drawn[""])

    @override
    def nearest(self, default: Any, model: LensModel) -> Mapping[str, Any]:
        return self.draws(model)[""].nearest(default, model)


@dataclass(frozen=True)
class Block(Dimension):
    """Several layers: the last by its share of the depth, and how many, one behind the other or spread.

    Attributes:
        low, high: the ends of the last one's share.
        least, most: how many, as far as there are so many below.
        spread: the first is drawn, too, and the others lie evenly between the two.
    """

    low: float = 0.0
    high: float = 1.0
    least: int = 1
    most: int = 4
    spread: bool = False

    def __post_init__(self) -> None:
        Depth(self.low, self.high)
        if not 1 <= self.least <= self.most:
            raise ValueError(f"a block needs 1 <= least <= most layers; got {self.least} to {self.most}")

    @override
    def draws(self, model: LensModel) -> "Mapping[str, Range | Options]":
        last = Depth(self.low, self.high).draws(model)[""]
        counts = {".count": Range(self.least, self.most, whole=True)} if self.least < self.most else {}
        first = {".first": Depth(0.0, self.high).draws(model)[""]} if self.spread else {}
        return {".last": last, **counts, **first}

    @override
    def value(self, drawn: Mapping[str, Any], default: Any) -> tuple[int, ...]:
        last, count = int(drawn[".last"]), int(drawn.get(".count", self.least))
        behind = max(0, last - count + 1)
        if count == 1 or ".first" not in drawn:  # as of a search that was begun without
            return tuple(range(behind, last + 1))
        first, last = sorted((int(drawn[".first"]), last))
        return spread_over(first, last, count)

    @override
    def nearest(self, default: Any, model: LensModel) -> Mapping[str, Any]:
        numbers = {".first": min(default), ".last": max(default), ".count": len(default)}
        return {end: what.nearest(numbers[end], model)[""] for end, what in self.draws(model).items()}


Space = Mapping[str, Dimension]


def rounded(number: float) -> float:
    """To four significant digits."""
    return float(f"{number:.{DIGITS}g}")


def check_space(space: Space, kind: type) -> None:
    """Refuse a space that names what the method does not have.

    Raises:
        TypeError: an entry is no dimension.
        ValueError: names the settings that are none.
    """
    known = [field.name for field in fields(kind)]
    unknown = [name for name in space if name not in known]
    if unknown or not space:
        raise ValueError(f"the search space names {unknown or 'nothing'}; the settings of {kind.__name__} are {known}")
    for name, dimension in space.items():
        if not isinstance(dimension, Dimension):
            raise TypeError(
                f"the search space of {name} must be a Range, Options, Factor, Depth or Block, got {dimension!r}"
            )
