"""Drivers of other engines, each run by the Python that has that engine. They import nothing of Baton's but
bench/peers/protocol.py, which needs nothing; `baton` alone drives our own engine in a process of its own.
"""
