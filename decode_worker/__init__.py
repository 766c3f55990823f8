"""Decodes, from blocks that landed or from a prompt that it prefills itself. Its own file is admission.py; all else it
shares with prefill (worker/)."""
