"""Bugs that others had, planted into production code for the length of a run: can the simulator find them?

Nothing in production knows of this: a plant puts other functions in the place of a class's own, and takes them away.
Where one mistake alone is caught by a second guard, the plant takes that guard away too, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from baton.errors import ConfigError
from sim.planted import destination, engine, routing, source
from sim.planted.plant import Plant

PLANTS: dict[str, Plant] = {
    plant.name: plant for plant in (*destination.PLANTS, *source.PLANTS, *engine.PLANTS, *routing.PLANTS)
}


def find(name: str) -> Plant:
    """Raises ConfigError."""
    if name not in PLANTS:
        raise ConfigError(f"there is no planted bug {name!r}; --list-planted lists those that are")
    return PLANTS[name]


@contextmanager
def planted(plant: Plant | None) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in plant.changes if plant is not None else ():
            stack.enter_context(patch.object(owner, name, value))
        yield
