"""Pseudo-random numbers that are a pure function of their keys."""

from __future__ import annotations

import numpy as np


def random_numbers(*keys: int) -> np.random.RandomState:
    """A source of numbers with these keys, below 2**32; NumPy's legacy one, since those never change (NEP 19)."""
    return np.random.RandomState(keys)
