"""What prefill and decode workers share: sessions with routers, the bridge to the engine's thread, start and drain.

A worker is this package with a `Role` put in: prefill_worker/handoff.py or decode_worker/admission.py.
"""
