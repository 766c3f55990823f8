"""Paged attention in C: its source, how it is compiled and found, and the batch that calls it."""
