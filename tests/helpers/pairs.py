"""Cases that hold every pair of values of every two factors at least once."""

import itertools
import random
from typing import Any


def all_pairs(factors: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Greedy: each case starts from a pair still open and is the best of fifty random completions."""
    rng = random.Random(seed)
    open_pairs = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while open_pairs:
        start = dict(min(open_pairs, key=sorted))
        tries = [{name: rng.randrange(len(values)) for name, values in factors.items()} | start for _ in range(50)]
        covered = [{frozenset(pair) for pair in itertools.combinations(t.items(), 2)} & open_pairs for t in tries]
        best = max(range(50), key=lambda k: len(covered[k]))
        open_pairs -= covered[best]
        cases.append({name: factors[name][index] for name, index in tries[best].items()})
    return cases


def case_id(case: dict[str, Any]) -> str:
    return "-".join(f"{name}{str(value).removeprefix('torch.')}" for name, value in case.items())
