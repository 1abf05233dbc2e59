"""What a criterion of `make evidence` is, and the list of all measurements."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """One measured value: of what, how it compares, and over how many trials."""

    criterion: str
    value: float
    bound: str  # ">= 0.95", "<= 10"
    n: int

    @property
    def passed(self) -> bool:
        relation, number = self.bound.split()
        return bool(self.value >= float(number) if relation == ">=" else self.value <= float(number))


Measure = Callable[[], Iterator[Found]]


@dataclass(frozen=True)
class Entry:
    """A registered measurement; it may yield several criteria."""

    name: str
    long: bool
    measure: Measure
    needs_gpu: bool = False


REGISTRY: list[Entry] = []


def measures(long: bool = False, needs_gpu: bool = False) -> Callable[[Measure], Measure]:
    """Register a measurement under its function's name."""

    def register(function: Measure) -> Measure:
        REGISTRY.append(Entry(function.__name__, long, function, needs_gpu))
        return function

    return register
