"""What a sweep varies: one key of a recipe and its values, or the range that they are drawn from."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from adapters.errors import RequestError, message
from adapters.yamltext import parse_yaml

NUMBER: Final = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE: Final = re.compile(rf"^\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*$")
WIDE: Final = 10  # a range whose ends are at least this far apart is drawn from on a logarithmic scale


@final
@dataclass(frozen=True)
class Axis:
    """One key of a recipe, and what it is to be.

    Attributes:
        key: as `--set` has it: "strategy", "options.r", "train.learning_rate".
        values: one after another; empty for a range.
        low, high: the ends of a range, both of it.
        whole: a range of whole numbers.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    @property
    def ranges(self) -> bool:
        """Whether values are drawn from between two ends."""
        return not self.values

    @property
    def log(self) -> bool:
        """Whether a range is drawn from on a logarithmic scale: both ends above 0, one ten times the other."""
        return self.ranges and self.low > 0 and self.high / self.low >= WIDE

    @property
    def first(self) -> Any:
        """One value that it can have."""
        return (int(self.low) if self.whole else self.low) if self.ranges else self.values[0]

    def draw(self, generator: random.Random) -> Any:
        """One value."""
        if not self.ranges:
            return generator.choice(self.values)
        if self.log:
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = generator.uniform(self.low, self.high)
        return min(max(round(drawn), int(self.low)), int(self.high)) if self.whole else float(f"{drawn:.3g}")

    def __str__(self) -> str:
        if not self.ranges:
            return f"{self.key} {', '.join(map(shown, self.values))}"
        scale = "logarithmic" if self.log else "even"
        return f"{self.key} from {self.low:g} to {self.high:g} ({scale})"


def shown(value: Any) -> str:
    """A value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def axis(key: str, given: Any) -> Axis:
    """An axis from plain data: a list of values, one value, or "low..high".

    Raises:
        RequestError: no value at all, values twice, a range that is none.
    """
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        given = given[0]
    ends = RANGE.match(given) if isinstance(given, str) else None
    if ends is not None:
        low, high = float(ends[1]), float(ends[2])
        if not low < high:
            raise RequestError(
                message("a range without an inside", where=f"over {key}", expected="low..high", found=given)
            )
        return Axis(key, (), low, high, all(re.fullmatch(r"[-+]?\d+", end) for end in ends.groups()))
    if isinstance(given, str) and ".." in given:
        raise RequestError(
            message("not a range", where=f"over {key}", expected="two numbers, as in 1e-5..1e-3", found=repr(given))
        )
    values = tuple(given) if isinstance(given, list | tuple) else (given,)
    values = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    if not values or values == (None,):
        raise RequestError(
            message("nothing to try", where=f"over {key}", expected=f"values, as in --over {key}=A,B", found="none")
        )
    if any(isinstance(value, str) and RANGE.match(value) for value in values):
        raise RequestError(message("a range beside other values", where=f"over {key}", found=list(values)))
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise RequestError(message("a value stands twice", where=f"over {key}", found=shown(twice[0])))
    return Axis(key, values)


def parse(entry: str) -> tuple[str, Any]:
    """Key and values of "key=value,value" or "key=low..high"; values are read as YAML.

    Raises:
        RequestError: not of this form.
    """
    key, sign, text = entry.partition("=")
    if not sign or not key.strip():
        raise RequestError(message(f"{entry!r} is not key=value,value", where="--over"))
    key = key.strip()
    if RANGE.match(text):
        return key, text.strip()
    return key, parse_yaml(f"[{text}]", f"--over {key}")


def product(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values, the last axis moving fastest.

    Raises:
        RequestError: a range, which has no end of values.
    """
    for one in axes:
        if one.ranges:
            raise RequestError(
                message(
                    "a grid has no place for a range",
                    where=f"over {one.key}",
                    found=f"{one.low:g}..{one.high:g}",
                    remedy="List its values, or say --search random --trials N.",
                )
            )
    for values in itertools.product(*(one.values for one in axes)):
        yield dict(zip((one.key for one in axes), values, strict=True))


def drawn(axes: Sequence[Axis], generator: random.Random) -> dict[str, Any]:
    """One combination at random."""
    return {one.key: one.draw(generator) for one in axes}


def told(setting: Mapping[str, Any]) -> str:
    """A setting in a few words: strategy first, then `name=value` by the last part of each key."""
    names = [key.rpartition(".")[2] for key in setting]
    parts = [shown(setting["strategy"])] if "strategy" in setting else []
    for key, name in zip(setting, names, strict=True):
        if key != "strategy":
            parts.append(f"{name if names.count(name) == 1 else key}={shown(setting[key])}")
    return " ".join(parts) or "as the recipe says"
