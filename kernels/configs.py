"""Plans as configs of Triton's autotuner, which measures the most promising ones on a kernel's own arguments."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

from triton_lstm.kernels.autotuner import TileAutotuner
from triton_lstm.kernels.exchange import make_ready
from triton_lstm.kernels.launch import Layer, device_facts, launching, options, signals_for, sizes_of
from triton_lstm.kernels.parts import parts_for
from triton_lstm.planning.cost import cost
from triton_lstm.planning.limits import why_not
from triton_lstm.planning.plan import EXCHANGES, Exchange, Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import space, with_groups
from triton_lstm.settings import precision_name, product_precision

# How many configs are measured of the planned exchange, with split sums or without as planned; and of each other kind
BEST, BEST_OF_OTHERS = 6, 2
Clock = Callable[..., list[float]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of a plan.

    predicted_us: by the cost model; nan if it cannot run. us: measured; nan if not, with the reason.
    failed: it was chosen to be measured, and failed or gave a wrong answer.
    """

    plan: Plan
    predicted_us: float
    us: float = math.nan
    reason: str = ""
    failed: bool = False


class _MeasuredError(Exception):
    """Ends the autotuner's run before it launches the config it has chosen."""


class _RefusedError(Exception):
    """A config that is not to be run."""


class _NoneLeftError(Exception):
    """No config can run; Triton 3.5 would fail, later ones raise an error that 3.5 does not have."""


class Trials:
    """To be called as `launch`: measures, instead of the one plan, the best plans of the whole space.

    clock: as triton.testing.do_bench with `quantiles`. wrong: the reason why the answer in the arguments is wrong, or
    None. begin: called with every plan before its first run; a reason that it returns drops the plan.
    again: measure what Triton's cache on disk has times of.
    trials: every plan of the space, the planned one first, the others in the order of prediction.
    """

    def __init__(
        self,
        clock: Clock,
        wrong: Callable[[dict[str, Any]], str | None],
        begin: Callable[[Plan], str | None] = lambda plan: None,
        again: bool = False,
    ) -> None:
        self.clock, self.wrong, self.begin, self.again = clock, wrong, begin, again
        self.trials: list[Trial] = []

    def __call__(self, kernel: Any, plan: Plan, exchanged: torch.Tensor, arguments: dict[str, Any]) -> None:
        arguments = dict(arguments)
        if arguments.get("xg_ptr") is not None and arguments["gates_ptr"] is arguments["xg_ptr"]:
            arguments["gates_ptr"] = torch.empty_like(arguments["xg_ptr"])  # else a trial would find the gates in xg
        for kind, best in _measured(plan).items():
            self.trials += _Group(self, kernel, *kind, exchanged, arguments).run(best)
        planned = dataclasses.replace(plan, groups=1)

        def order(trial: Trial) -> tuple[bool, bool, float]:
            is_planned = dataclasses.replace(trial.plan, groups=1) == planned
            return not is_planned, math.isnan(trial.predicted_us), trial.predicted_us

        self.trials.sort(key=order)


def compile_best(kernel: Any, plan: Plan, exchanged: torch.Tensor, arguments: dict[str, Any]) -> None:
    """To be called as `launch`: compiles, instead of the one plan, what `Trials` would measure, and runs nothing."""
    owner = Trials(lambda call, quantiles: [], lambda arguments: None)
    for kind, best in _measured(plan).items():
        _Group(owner, kernel, *kind, exchanged, arguments).compile(best)


def _measured(plan: Plan) -> dict[tuple[Exchange, bool], int]:
    """How many configs of every exchange, with one axis or two, are measured where `plan` is the planned one."""
    kinds: list[tuple[Exchange, bool]] = [("none", False), *itertools.product(EXCHANGES, (False, True))]
    return {kind: BEST if kind == (plan.exchange, plan.splits > 1) else BEST_OF_OTHERS for kind in kinds}


class _Group:
    """The configs with one exchange, and split sums or none: they are launched with the same but for their tile."""

    def __init__(
        self,
        owner: Trials,
        kernel: Any,
        exchange: Exchange,
        split: bool,
        exchanged: torch.Tensor,
        arguments: dict[str, Any],
    ) -> None:
        self.owner, self.kernel, self.exchange = owner, kernel, exchange
        self.exchanged, self.arguments = exchanged, arguments
        D, self.steps, self.batch, self.hidden_size = sizes_of(exchanged, arguments)
        self.backward = "dgates_ptr" in arguments
        self.device = device_facts(exchanged.device)
        precision = precision_name(exchanged.dtype, exchanged.device)
        self.problem = Problem(self.device, precision, self.batch, self.hidden_size, self.backward)
        self.signals = signals_for(exchange, 0, D, self.batch, 16, exchanged.device)
        precision = product_precision(exchanged.dtype, exchanged.device)
        self.layer = Layer.of(
            exchange, exchanged.dtype, self.hidden_size, D, precision, 0, self.backward, self.device.backend
        )
        self.plans = [p for p in space(self.problem) if (p.exchange, p.splits > 1) == (exchange, split)]
        # Of the parts, as many as any plan needs; a trial takes the first ones
        sizes = [self._words(p) for p in self.plans if why_not(self.problem, p) is None]
        most = max(sizes, default=0)
        self.parts = torch.empty(most, dtype=torch.int64, device=exchanged.device) if most else None
        self.reasons: dict[Plan, str] = {}
        self.times: dict[Plan, float] = {}
        self.current: dict[str, Any] = {}  # what the running trial is launched with
        self.begun: set[Plan] = set()
        self.measuring = False

    def run(self, best: int) -> list[Trial]:
        if not self.plans:
            return []
        tuner = self._tuner(best)
        with launching(self.exchanged.device), contextlib.suppress(_MeasuredError, _NoneLeftError):
            tuner[self._grid](**self._launched_with)
        if not self.begun:  # they come from the cache on disk
            for config, (ms, *_) in getattr(tuner, "configs_timings", {}).items():
                self.times[self._plan(config.all_kwargs())] = ms * 1e3 / self.steps
        return [self._trial(plan) for plan in self.plans]

    def compile(self, best: int) -> None:
        if not self.plans:
            return
        with contextlib.suppress(_NoneLeftError):
            self._tuner(best).warmup(grid=(1,), **self._launched_with)

    def _tuner(self, best: int) -> TileAutotuner:
        tuner = TileAutotuner(
            self.kernel,
            self.kernel.arg_names,
            [self._config(plan) for plan in self.plans],
            key=["B", "LAYER"],
            reset_to_zero=None,
            restore_value=None,
            pre_hook=self._before,
            prune_configs_by=dict(early_config_prune=self._prune, perf_model=self._predict, top_k=best),
            do_bench=self._bench,
            cache_results=isinstance(tl.cdiv, JITFunction) and not self.owner.again,
        )
        tuner.where = self.device.name, self.steps
        return tuner

    def _config(self, plan: Plan) -> triton.Config:
        chosen = options(plan, self.device.backend)
        fusion = chosen.pop("enable_fp_fusion")  # which triton.Config does not know
        return triton.Config(dict(TILE=plan.tile, enable_fp_fusion=fusion), **chosen)

    @property
    def _launched_with(self) -> dict[str, Any]:
        return dict(
            **self.arguments,
            signals_ptr=self.signals,
            **(dict(parts_ptr=self.parts) if self.backward else {}),
            step_begin=0,
            step_end=self.steps,
            FIRST_DIRECTION=0,
            T=self.steps,
            B=self.batch,
            launch_cooperative_grid=self.exchange != "none",
            LAYER=self.layer,
        )

    def _words(self, plan: Plan) -> int:
        D = self.layer.D
        parts = parts_for(plan, D, self.batch, self.hidden_size, torch.device("meta"))
        return 0 if parts is None else parts.numel()

    def _trial(self, plan: Plan) -> Trial:
        can_run = why_not(self.problem, plan) is None
        sized = with_groups(self.problem, plan)
        predicted = cost(self.problem, sized).us if can_run else math.nan
        us = self.times.get(plan, math.nan)
        if math.isfinite(us):
            return Trial(sized, predicted, us)
        reason = self.reasons.get(plan, "not measured: others are predicted faster")
        return Trial(sized, predicted, math.nan, reason, failed=can_run and plan in self.reasons)

    def _plan(self, meta: dict[str, Any]) -> Plan:
        tile = meta["TILE"]
        return Plan(
            self.exchange,
            True,
            tile.RESIDENT,
            tile.BLOCK_B,
            tile.BLOCK_H,
            tile.BLOCK_K,
            tile.SLICES,
            1,
            meta["num_warps"],
            tile.SPLITS,
        )

    def _grid(self, meta: dict[str, Any]) -> tuple[int, int]:
        if not self.measuring:
            raise _MeasuredError
        plan = self._plan({"num_warps": self.current["num_warps"], **meta})
        return with_groups(self.problem, plan).grid(self.hidden_size)

    def _before(self, kwargs: dict[str, Any], reset_only: bool = False) -> None:
        """Triton calls this before every launch of a trial."""
        if reset_only:  # all is measured
            if self.reasons.keys() & self.begun:  # kept for the next run are only times, not failures that may pass
                raise _MeasuredError
            return
        self.current = kwargs
        if (plan := self._plan(kwargs)) not in self.begun:
            self.begun.add(plan)
            if reason := self.owner.begin(plan):
                raise _RefusedError(reason)
        parts = None if self.parts is None else self.parts[: self._words(plan)]
        make_ready(self.exchange, self.exchanged, self.signals, parts)

    def _prune(self, configs: list[Any], named: dict[str, Any], **kwargs: Any) -> list[Any]:
        kept = []
        for config in configs:
            plan = self._plan(config.all_kwargs())
            reason = why_not(self.problem, plan)
            if reason:
                self.reasons[plan] = reason
            else:
                kept.append(config)
        if not kept:
            raise _NoneLeftError
        return kept

    def _predict(self, **kwargs: Any) -> float:
        return cost(self.problem, with_groups(self.problem, self._plan(kwargs))).us

    def _bench(self, call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        """Triton's do_bench: inf for a config that fails or gives a wrong answer, with the reason."""
        self.measuring = True
        try:
            # Or the right answer of the trial before would pass for this one's
            for name in ("dgates_ptr",) if self.backward else ("y_ptr", "gates_ptr", "c_all_ptr"):
                self.arguments[name].fill_(math.nan)
            call()
            reason = self.owner.wrong(self.arguments)
            if reason is None:
                times = self.owner.clock(call, quantiles=quantiles)
                self.times[self._plan(self.current)] = times[0] * 1e3 / self.steps
                return times
        except _RefusedError as refusal:
            reason = str(refusal)
        except Exception as error:
            if not _still_works(self.exchanged.device):
                raise
            lines = str(error).strip().splitlines() or ["no message"]
            reason = f"{type(error).__name__}: {lines[0]}"[:200]
        finally:
            self.measuring = False
        self.reasons[self._plan(self.current)] = reason
        return [math.inf] * len(quantiles)


def _still_works(device: torch.device) -> bool:
    """False after an illegal access, say: nothing runs on the GPU any more in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
