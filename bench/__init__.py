"""Measurements: `baton bench engine` (offline) and `baton bench serve` (online). bench/README.md repeats every figure.

Needs nothing itself, so that a peer's own Python can run what is in bench/peers.
"""
