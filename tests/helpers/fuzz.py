"""Random calls of an LSTM: what arguments, inputs in memory, modules and losses can be, as one value that prints."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import state_shapes
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from triton_lstm.planning.plan import Plan

Tensor = torch.Tensor
LAYOUTS = ("dense", "unbatched", "packed", "lengths", "cu_seqlens")
SIZES = (1, 2, 3, 5, 8, 17, 33)
TILE = dict(resident=True, block_b=16, block_h=16, block_k=16, slices=1, groups=1, warps=4)
PLANS = {
    "own": None,
    "one program": Plan("none", True, True, 4, 64, 64, 1, groups=1, warps=4),
    "two groups": Plan("none", True, True, 2, 64, 64, 1, groups=2, warps=4),
    "flag": Plan("flag", False, **TILE),
    "barrier": Plan("barrier", False, **TILE | dict(resident=False, slices=2, block_k=32)),
    "flag at once": Plan("flag", True, **TILE),  # in the concurrent interpreter, as the next one
    "barrier at once": Plan("barrier", True, **TILE),
}
# How a tensor lies in memory: the shape of the leaf for a view of shape s, and the view
STRIDES: dict[str, Any] = {
    "contiguous": (lambda s: s, lambda t, s: t),
    "transposed": (lambda s: s[::-1], lambda t, s: t.permute(*reversed(range(t.dim())))),
    "expanded": (lambda s: (1, *s[1:]), lambda t, s: t.expand(s)),
    "sliced": (lambda s: (*s[:-1], s[-1] + 2), lambda t, s: t[..., 1:-1]),
    "stepped": (lambda s: (*s[:-1], 2 * s[-1]), lambda t, s: t[..., ::2]),
    "every other": (lambda s: (2 * s[0], *s[1:]), lambda t, s: t[1::2]),
    "offset": (lambda s: (math.prod(s) + 3,), lambda t, s: t[3:].view(s)),
}
MADE = ("constructed", "converted", "there and back", "loaded", "copied", "pickled")
CALLED = ("module", "lstm()", "functional_call", "recorded", "vjp", "vmap", "no_grad", "inference_mode", "autocast")

REFUSED = {
    "unbatched": ("lstm()",),
    "packed": ("vmap",),
    "lengths": ("lstm()", "vjp", "vmap"),
    "cu_seqlens": ("vmap",),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of nn.LSTM(I, H, **options), in training mode or not, and a loss.

    T, lengths: steps, and how many of them each sequence has. density: of resets, or None.
    frozen: the names of weights, "x", "h0" and "c0" that require no gradient.
    reads: which of "y", "h_n" and "c_n" the loss reads; every_step: and of y whether all rows.
    twice: a second derivative, too. made, called: see fuzz_runs.py. seed: of all numbers.
    """

    layout: str
    T: int
    lengths: tuple[int, ...]
    density: float | None
    I: int  # noqa: E741
    H: int
    options: dict[str, Any]
    training: bool
    recompute: bool
    return_states: bool
    with_hx: bool
    strides: str
    hx_strides: str
    dtype: torch.dtype
    frozen: frozenset[str]
    reads: frozenset[str]
    every_step: bool
    twice: bool
    plan: str
    made: str
    called: str
    sorted: bool
    seed: int

    @property
    def packed(self) -> PackedSequence:
        """Each row's place in a padded batch (T, B), packed."""
        places = torch.arange(self.T * len(self.lengths)).view(self.T, -1)
        return pack_padded_sequence(places, torch.tensor(self.lengths), enforce_sorted=self.sorted)

    def draw(self, of: str, number: int = 0) -> torch.Generator:
        """Random numbers of their own for each purpose, and for each draw of all inputs."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {of} {number}".encode()))

    def give_weights(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Gives it the case's weights, the same ones in every dtype."""
        generator = self.draw("weights")
        for name, weight in module.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) / math.sqrt(self.H)
            weight.data = drawn.to(self.dtype).to(dtype)
            weight.requires_grad_(name not in self.frozen)
        module.train(self.training)

    def shapes(self, module: nn.RNNBase) -> dict[str, tuple[int, ...]]:
        """Of x, h0 and c0."""
        batch = len(self.lengths)
        dims = (batch, self.T) if module.batch_first else (self.T, batch)
        h0, c0 = state_shapes(module, batch)
        if self.layout == "unbatched":
            dims, h0, c0 = (self.T,), h0[::2], c0[::2]
        if self.layout == "packed":
            dims = (sum(self.lengths),)
        return {"x": (*dims, self.I)} | (dict(h0=h0, c0=c0) if self.with_hx else {})

    def leaves(self, module: nn.RNNBase, number: int) -> dict[str, Tensor]:
        """x, h0 and c0 of one draw, without their strides, in the module's dtype."""
        generator, leaves = self.draw("inputs", number), {}
        for name, shape in self.shapes(module).items():
            of_leaf, _ = STRIDES[self.strides if name == "x" else self.hx_strides]
            drawn = torch.randn(of_leaf(shape), generator=generator, dtype=torch.float64)
            leaves[name] = drawn.to(self.dtype).to(module.weight_hh_l0.dtype).requires_grad_(name not in self.frozen)
        return leaves

    def inputs(self, module: nn.RNNBase, leaves: dict[str, Tensor]) -> tuple[Any, Any]:
        """x and hx of a call."""
        views = {
            name: STRIDES[self.strides if name == "x" else self.hx_strides][1](leaves[name], shape)
            for name, shape in self.shapes(module).items()
        }
        x: Any = self.packed._replace(data=views["x"]) if self.layout == "packed" else views["x"]
        return x, (views["h0"], views["c0"]) if self.with_hx else None

    def resets(self, module: nn.RNNBase) -> Tensor | None:
        """As the module takes them."""
        if self.density is None:
            return None
        resets = torch.rand(self.T, len(self.lengths), generator=self.draw("resets")) < self.density
        if self.layout == "cu_seqlens":
            resets[0] = False  # documents have h0 and c0
        if self.layout == "packed":
            return resets.flatten()[self.packed.data]
        if self.layout == "unbatched":
            return resets[:, 0]
        return resets.t() if module.batch_first else resets

    def cotangents(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what the loss reads."""
        generator = self.draw("cotangents")
        found = {}
        for name, output in outputs.items():
            drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            if name == "y" and not self.every_step:
                drawn *= (torch.rand(output.shape[:-1], generator=generator) < 0.3).unsqueeze(-1)
            found[name] = drawn
        return {name: found[name] for name in found if name in self.reads}


@st.composite
def cases(draw: Any, layout: str) -> Case:
    """Calls of one layout."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    dtype = one_of(*[torch.float64] * 3, torch.float32, torch.bfloat16, torch.float16)
    exact = dtype == torch.float64  # most say more in float64
    called = one_of(*CALLED)
    if called == "autocast":
        dtype, exact = torch.float32, False
    if called in REFUSED.get(layout, ()):
        called = "module"
    plan = one_of(*PLANS)
    T = draw(st.integers(1, 3 if plan.endswith("at once") else 7))
    batch = 1 if layout in ("unbatched", "cu_seqlens") else one_of(1, 2, 3, 5, 18)
    density = 0.3 if layout == "cu_seqlens" else one_of(None, None, 0.2, 0.7, 1.0)
    if layout == "dense" and exact and density is None and called != "vmap" and draw(st.integers(0, 15)) == 15:
        batch = 0
    several = "flag" in plan or "barrier" in plan  # programs, of 16 units each
    I, H = one_of(*SIZES), one_of(*SIZES[-2:] if several else SIZES)  # noqa: E741
    options = dict(
        num_layers=draw(st.integers(1, 3 if H < 9 else 2)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=one_of(0, draw(st.integers(0, H - 1))),
    )
    training = draw(st.booleans())
    if options["num_layers"] > 1 and exact:
        masked = density is None and layout != "lengths" and called != "vmap"
        options["dropout"] = one_of(0.0, 1.0, 0.5 if masked or not training else 0.0)
    lengths = (T,) * batch
    ordered = False
    if layout in ("packed", "lengths"):
        lengths = tuple(draw(st.lists(st.integers(1, T), min_size=batch, max_size=batch)))
        ordered = layout == "packed" and draw(st.booleans())
        lengths = tuple(sorted(lengths, reverse=True)) if ordered else lengths
        T = max(lengths) if layout == "packed" else T
    with_hx = draw(st.booleans())
    names = [name for name, _ in nn.LSTM(I, H, **options | dict(dropout=0.0)).named_parameters()]
    names += ["x", *(["h0", "c0"] if with_hx else [])]
    return Case(
        layout=layout,
        T=T,
        lengths=lengths,
        density=density,
        I=I,
        H=H,
        options=options,
        training=training,
        recompute=draw(st.booleans()),
        return_states=exact
        and called in ("module", "lstm()", "functional_call")
        and not (training and options.get("dropout"))
        and draw(st.booleans()),
        with_hx=with_hx,
        strides=one_of(*STRIDES),
        hx_strides=one_of(*STRIDES),
        dtype=dtype,
        frozen=draw(st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(names)))),
        reads=frozenset(one_of(("y", "h_n", "c_n"), ("y",), ("h_n",), ("c_n",), ("y", "c_n"))),
        every_step=draw(st.booleans()),
        twice=exact and called in ("module", "functional_call") and draw(st.booleans()),
        plan=plan,
        made=one_of(*MADE),
        called=called,
        sorted=ordered,
        seed=draw(st.integers(0, 999)),
    )
