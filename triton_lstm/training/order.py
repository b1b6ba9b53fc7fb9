"""Pseudo-random numbers and orders that are a pure function of their keys, the same with every version of NumPy."""

from __future__ import annotations

import numpy as np


def numbers(count: int, *keys: int) -> np.ndarray:
    """(count) uint64: the first numbers of SplitMix64, seeded with the keys."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mixed(state + np.array([key], np.uint64))
    return _mixed(state + np.arange(count, dtype=np.uint64))


def shuffled(count: int, *keys: int) -> np.ndarray:
    """(count) int64: a permutation of the numbers below `count`."""
    return np.argsort(numbers(count, *keys), kind="stable")


def _mixed(state: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 for each state: arrays of uint64 wrap around."""
    state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
