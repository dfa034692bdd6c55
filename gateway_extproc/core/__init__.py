"""Decides. Pure: no I/O, no await, no clock and no randomness of its own (they are arguments).

Imports the standard library, msgspec, xxhash and itself; nothing upward.
"""
