"""Runs one seed, or one scenario that was made of it."""

from __future__ import annotations

import gc

from sim.planted import planted
from sim.planted.plant import Plant
from sim.randomness import drawn_from
from sim.scenario import Scenario
from sim.seed import make_scenario
from sim.world import Outcome, World


def run_seed(seed: int, *, story: bool = False, plant: Plant | None = None) -> Outcome:
    return run_scenario(make_scenario(seed), story=story, plant=plant)


def run_scenario(scenario: Scenario, *, story: bool = False, plant: Plant | None = None) -> Outcome:
    with drawn_from(scenario.seed), planted(plant):
        gc.disable()  # its moments are not the seed's
        try:
            return World(scenario, story=story).run()
        finally:
            gc.enable()
