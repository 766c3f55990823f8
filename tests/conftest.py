"""For all tests: property tests are not timed, since cores are shared, and a failure prints how to see it again."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("baton", deadline=None, print_blob=True)
settings.load_profile("baton")
