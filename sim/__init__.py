"""The deterministic simulator: Baton's own state machines in one process and virtual time, under the faults of a seed.

Real are the worker core and both roles, the transfers' ledger, pulls, landings and gates, the engine's scheduler and
pool, and the router's placement, relay and resume. Made here are the event loop, the network below gRPC's stubs, the
model, Redis, and the faults. The same seed gives the same events, in the same order, on any machine.
"""
