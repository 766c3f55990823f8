"""Decoders: their specs, the tensors of their checkpoints, and the one forward pass that all families share."""
