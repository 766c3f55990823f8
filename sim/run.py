"""Runs seeds, one after the other."""

from __future__ import annotations

import gc

from sim.planted import planted
from sim.planted.plant import Plant
from sim.randomness import drawn_from
from sim.scenario import make_scenario
from sim.world import Outcome, World


def run_seed(seed: int, *, story: bool = False, plant: Plant | None = None) -> Outcome:
    with drawn_from(seed), planted(plant):
        gc.disable()  # its moments are not the seed's
        try:
            return World(make_scenario(seed), story=story).run()
        finally:
            gc.enable()
