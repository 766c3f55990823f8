"""Runs seeds, one after the other."""

from __future__ import annotations

import gc

from sim.randomness import drawn_from
from sim.scenario import make_scenario
from sim.world import Outcome, World


def run_seed(seed: int, *, story: bool = False) -> Outcome:
    with drawn_from(seed):
        gc.disable()  # its moments are not the seed's
        try:
            return World(make_scenario(seed), story=story).run()
        finally:
            gc.enable()
