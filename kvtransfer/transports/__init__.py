"""The ways to another worker's blocks. `base` says what a transport is; one contract test suite holds for all."""
