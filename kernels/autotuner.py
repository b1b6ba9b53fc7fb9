"""Triton's autotuner, with a cache on disk that is right for tiles and for more than one GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import triton
from triton.runtime.autotuner import Autotuner

from triton_lstm.planning.plan import Tile


class TileAutotuner(Autotuner):
    """Triton's cache on disk identifies a GPU by its architecture, which does not tell an H100 from an H200.

    And it is JSON, which has no dataclasses: a key is kept as text, a tile in parts.
    """

    where: tuple[Any, ...] = ()  # what times are of, besides the kernel's key

    def check_disk_cache(self, tuning_key: Any, configs: Any, bench_fn: Any) -> bool:
        key = (*map(str, tuning_key), *self.where)

        def bench() -> None:
            bench_fn()
            self._map_timed(lambda kwargs: dataclasses.asdict(kwargs["TILE"]))

        found: bool = super().check_disk_cache(key, configs, bench)
        self._map_timed(lambda kwargs: dict(TILE=Tile(**kwargs)))
        if found:
            self.cache[tuning_key] = min(self.configs_timings, key=self.configs_timings.__getitem__)
        return found

    def _map_timed(self, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Gives the configs that have a time other keyword arguments."""
        self.configs_timings: dict[Any, Any] = {
            triton.Config(**(vars(config) | dict(kwargs=convert(config.kwargs)))): times
            for config, times in self.configs_timings.items()
        }
