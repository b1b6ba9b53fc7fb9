"""LSTM: torch.nn.LSTM's module on the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.core.call import Call, LayerStates
from triton_lstm.core.checks import (
    by_layer,
    check_pair,
    check_resets,
    check_shapes,
    check_states,
    refuse_opacus,
    tell_opacus,
)
from triton_lstm.core.layout import Layout
from triton_lstm.core.packing import DENSE, DENSE_BATCH_FIRST, Rows
from triton_lstm.core.segments import arranged
from triton_lstm.core.weights import flatten_for_cudnn, weights_of
from triton_lstm.dispatch import Route, decide, has_no_values
from triton_lstm.operator.hooks import CallHook, begin_call
from triton_lstm.packed import run_packed, run_padded
from triton_lstm.settings import Backend, chosen_backend, exports_by_tracing
from triton_lstm.stack import Options, stack


def _typed(forward: Any) -> Call:
    """The same function, with the types of Call."""
    return forward


class LSTM(nn.RNNBase):
    """torch.nn.LSTM with its arguments, parameters, state_dict and results, run by the Triton kernels where they can.

    Each layer computes, for every step t of each direction::

        i = sigmoid(W_ii x[t] + b_ii + W_hi h[t-1] + b_hi)
        f = sigmoid(W_if x[t] + b_if + W_hf h[t-1] + b_hf)
        g = tanh(W_ig x[t] + b_ig + W_hg h[t-1] + b_hg)
        o = sigmoid(W_io x[t] + b_io + W_ho h[t-1] + b_ho)
        c[t] = f * c[t-1] + i * g
        h[t] = o * tanh(c[t]), or W_hr (o * tanh(c[t])) with proj_size

    Subclasses nn.RNNBase, not nn.LSTM: torch.compile refuses every nn.LSTM. Arguments are checked as it
    checks them.

    Args:
        input_size: features I of the input.
        hidden_size: hidden units H.
        num_layers: layers; each takes the output of the one below. Default: 1.
        bias: False for layers without b_ih and b_hh. Default: True.
        batch_first: input and output are (B, T, features) instead of (T, B, features); h and c are not affected.
            Default: False.
        dropout: probability of zeroing an element of every layer's output but the last one's, in training. Default: 0.
        bidirectional: also a direction that runs from the last step to the first. Default: False.
        proj_size: projects h to P features by a learned matrix W_hr, if > 0. Default: 0.
        device, dtype: of the weights. The kernels run in float32, bfloat16 and float16.
        backend: "auto" (kernels where they can run, else PyTorch's own LSTM), "triton" (kernels, or RuntimeError) or
            "torch"; None reads the environment variable TRITON_LSTM_BACKEND at every call ("auto" if unset), and under
            torch.compile when a graph is made: another backend makes another graph, another value does not.
        recompute: keep only the output and c for the backward pass, which recomputes the gates in one matmul.

    Raises:
        TypeError, ValueError: for arguments that torch.nn.LSTM refuses, an unknown backend, or a recompute that is no
            bool.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(input_size=10, hidden_size=20, num_layers=2)
        x = torch.randn(5, 3, 10)  # (T, B, I)
        output, (h_n, c_n) = lstm(x)  # (T, B, H), (L, B, H), (L, B, H)
    """

    backend: Backend | None = None  # of a module from a checkpoint of nn.LSTM, which has neither
    recompute: bool = False
    _recordings: tuple[tuple[CallHook, str], ...] = ()  # of record_gradients, each with this module's name there
    # Every attribute that nn.LSTM has not; each is an argument of the same name and default
    OPTIONS: ClassVar[tuple[str, ...]] = ("backend", "recompute")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        if backend is not None:
            chosen_backend(backend)  # a wrong one is named here, not at the first call
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute should be of type bool, got: {type(recompute).__name__}")
        self.backend = backend
        self.recompute = recompute
        tell_opacus(LSTM)

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read weights where they are, and PyTorch's path flattens them when it has to."""

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """nn.Module's, but for the hooks of opacus, which cannot take this module's gradients of each sample."""
        refuse_opacus(hook)
        return super().register_forward_hook(hook, **options)

    def _route(self, input: torch.Tensor, params: list[torch.Tensor], hx: Any, batch: int, kernels_only: bool) -> Route:
        """Which way a call goes: see dispatch.decide."""
        return decide(input, params, hx, self.backend, batch=batch, has_biases=self.bias, kernels_only=kernels_only)

    @_typed
    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        cu_seqlens: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the stack.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence; of the parameters'
                dtype, or any that autocast casts.
            hx: (h0 (L*D, B, P or H), c0 (L*D, B, H)), without B if unbatched; zeros if None.
            lengths: how many of the T steps of each sequence of a padded batch count, B numbers from 1 to T in any
                order: the same as packing, without packing or sorting by hand. After its end a sequence's output is 0.
            resets: bool, with the input's shape without its features; of a PackedSequence its data's rows. Where it
                is True, the state of every layer is zero before that step: a segment begins there. Results are those of
                each segment run alone, in both directions of time, and no gradient crosses from one to another. A
                direction has h0 and c0 in the segment that it processes first, h_n and c_n from the last one. At the
                first step True puts zeros in the place of h0 and c0, in the forward direction.
            cu_seqlens: (documents + 1,) int32, of one sequence of packed documents, a batch of 1: 0, then where each of
                them ends. Each is a segment; the first one has h0 and c0. On the CPU they run side by side, as a packed
                batch; on the GPU, and under torch.compile and torch.func, they are resets, and are not looked at.
            return_states: also return a list with every layer's LayerStates: c and the gates i, f, g, o of all steps.

        Returns:
            output of the input's kind, D*(P or H) features; (h_n, c_n) shaped as hx; with return_states also those. All
            have the dtype in which the layers compute, that of the parameters or autocast's.

        Raises:
            ValueError, RuntimeError: as torch.nn.LSTM does, with its texts; for a PackedSequence too.
            TypeError, ValueError: for lengths, resets or cu_seqlens that do not fit the input.

        Example::

            import torch
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16)
            output, (h_n, c_n) = lstm(torch.randn(5, 2, 8), lengths=[5, 3])
            print(output.shape, h_n.shape)  # (5, 2, 16), (1, 2, 16); output[3:, 1] is 0
        """
        if lengths is not None or isinstance(input, PackedSequence):
            if cu_seqlens is not None:
                raise ValueError(
                    "cu_seqlens goes with a dense batch of one sequence, and not with packed rows or lengths"
                )
            run: Any = run_packed if lengths is None else run_padded
            arguments = (self, input, hx, resets, return_states, *(() if lengths is None else (lengths,)))
            if torch.compiler.is_compiling():
                from triton_lstm.operator.compiled import eagerly

                return eagerly(run, *arguments)
            return run(*arguments)
        return self._forward_dense(input, hx, resets, cu_seqlens, return_states)

    def _forward_dense(self, input: Any, hx: Any, resets: Any, cu_seqlens: Any, return_states: bool) -> Any:
        params = weights_of(self)
        dims = input.dim()
        if dims not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dims}D instead")
        batched = dims == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            resets = resets if resets is None else check_resets(resets, input.squeeze(batch_dim)).unsqueeze(batch_dim)
        if hx is not None:
            dims = 3 if batched else 2
            if hx[0].dim() != dims or hx[1].dim() != dims:
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be {dims}-D "
                    f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self._check(input, hx, params, None)
        layout = Layout(batched, self.batch_first) if self._recordings else None
        rows = DENSE_BATCH_FIRST if self.batch_first else DENSE
        if resets is not None or cu_seqlens is not None:
            stream = bool(self._recordings)  # whose steps are recorded
            rows = arranged(input, rows, resets, cu_seqlens, known=not has_no_values(input), side_by_side=not stream)
        output, h_n, c_n, *states = self._run(input, hx, params, rows, return_states, layout)
        if not batched:
            if torch.compiler.is_compiling() and output.requires_grad:
                from triton_lstm.operator.library import fresh

                output = fresh(output)
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
            states = [[LayerStates(*(t.squeeze(batch_dim) for t in layer)) for layer in layers] for layers in states]
        return output, (h_n, c_n), *states

    if TYPE_CHECKING:
        __call__: Call  # nn.Module's takes and returns Any

    def _slow_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """nn.Module's, of a traced call: torch.onnx.export(dynamo=False) gives what goes by keyword by position."""
        if exports_by_tracing() and type(self).forward is LSTM.forward:
            kwargs |= zip(("lengths", "resets", "cu_seqlens", "return_states"), inputs[2:], strict=False)
            inputs = inputs[:2]
        return super()._slow_forward(*inputs, **kwargs)

    def _check(
        self, input: torch.Tensor, hx: Any, params: list[torch.Tensor], batch_sizes: torch.Tensor | None
    ) -> None:
        """nn.LSTM's own checks, with its texts."""
        kind = type(self)
        if hx is None and kind.check_input is nn.RNNBase.check_input:
            dims = 3 if batch_sizes is None else 2
            if input.dtype == params[0].dtype and input.dim() == dims and input.shape[-1] == self.input_size:
                return
        if hx is None:
            self.check_input(input, batch_sizes)
            return
        if batch_sizes is not None:  # nn.LSTM looks at these first where rows are packed, and last where they are not
            check_pair(hx)
        self.check_forward_args(input, hx, batch_sizes)
        check_pair(hx)

    def _run(
        self,
        input: torch.Tensor,
        hx: Any,
        params: list[torch.Tensor],
        rows: Rows,
        return_states: bool,
        layout: Layout | None,
    ) -> Any:
        batch_first, batch_sizes, kernels_only = self.batch_first, rows.batch_sizes, return_states or not rows.plain
        batch = 1 if batch_sizes is not None else input.shape[0 if batch_first else 1]
        route = self._route(input, params, hx, batch, kernels_only)  # first: it rejects what has no dim(), say
        options = Options(self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        directions = 2 if self.bidirectional else 1
        weights = by_layer(params, self.num_layers * directions, self.bias)
        shapes = check_shapes(input, weights, directions, batch_first, batch_sizes)
        if hx is not None:
            check_states(input, hx[0], hx[1], *shapes)
        if not route.kernels and not return_states:
            flatten_for_cudnn(self, params)
        return stack(
            input,
            hx,
            params,
            weights,
            shapes,
            options,
            rows,
            route,
            recompute=self.recompute,
            return_states=return_states,
            hooks=() if layout is None else self._begin_recording(input, layout),
        )

    def _begin_recording(self, input: torch.Tensor, layout: Layout) -> Any:
        if torch.compiler.is_compiling():
            from triton_lstm.operator.compiled import refuse_recording

            refuse_recording()
        sizes = layout.batch_sizes
        steps = input.shape[1 if self.batch_first else 0] if sizes is None else len(sizes)
        return begin_call(self._recordings, input, layout, steps, self.num_layers)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks every module for. Raises RuntimeError."""
        raise RuntimeError(
            "torch.jit.script supports nn.LSTM only. Use torch.jit.trace(model, inputs), which takes PyTorch's path, "
            "or triton_lstm.convert(model, back=True) before torch.jit.script"
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_recordings", None)  # a copy belongs to no recording
        return state
