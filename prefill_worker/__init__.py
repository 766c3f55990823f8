"""Computes prompts and offers their KV blocks. Its own file is handoff.py; all else it shares with decode (worker/)."""
