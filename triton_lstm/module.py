"""LSTM: torch.nn.LSTM's module on the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from triton_lstm.backend import Backend, chosen_backend, exports_by_tracing, why_not_triton, why_torch_is_faster
from triton_lstm.call import Call, LayerStates, PackedLayerStates
from triton_lstm.checks import check_lengths, check_pair, refuse_opacus, tell_opacus
from triton_lstm.layout import Layout
from triton_lstm.packing import refuse_capture
from triton_lstm.record import Recording, begin
from triton_lstm.stack import stack


def _typed(forward: Any) -> Call:
    """The same function, with the types of Call."""
    return forward


class LSTM(nn.RNNBase):
    """torch.nn.LSTM with its arguments, parameters, state_dict and results, run by the Triton kernels where they can.

    Subclasses nn.RNNBase, not nn.LSTM: torch.compile refuses every nn.LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            torch.nn.LSTM's, checked as it checks them.
        backend: "auto" (kernels where they can run, else PyTorch's own LSTM), "triton" (kernels, or RuntimeError) or
            "torch"; None reads the environment variable TRITON_LSTM_BACKEND at every call ("auto" if unset), and under
            torch.compile when a graph is made: another backend makes another graph, another value does not.
        recompute: keep only the output and c for the backward pass, which makes the gates again in one product.
    """

    backend: Backend | None = None  # of a module from a checkpoint of nn.LSTM, which has neither
    recompute: bool = False
    _recordings: tuple[tuple[Recording, str], ...] = ()  # of record_gradients, each with this module's name there
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
        """Does nothing: the kernels read every weight where it lies, and PyTorch's path is looked after."""

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """nn.Module's, but for the hooks of opacus, which cannot take this module's gradients of each sample."""
        refuse_opacus(hook)
        return super().register_forward_hook(hook, **options)

    def _flatten_for_cudnn(self) -> None:
        """Before PyTorch's own path on a GPU: cuDNN copies weights that do not share one buffer at every call."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return  # the weights have no memory to look at
        weights: Any = self._flat_weights
        if weights[0].is_cuda and len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:
            jit: Any = torch._C
            tracing = jit._get_tracing_state()
            jit._set_tracing_state(None)  # no part of the trace, which would be another one the next time
            try:
                with torch.inference_mode(False):  # or the weights would become inference tensors for good
                    super().flatten_parameters()
            finally:
                jit._set_tracing_state(tracing)

    @property
    def _params(self) -> list[torch.Tensor]:
        """This call's weights, looked at as often as nn.LSTM does: a parametrization may draw numbers at every look."""
        if torch.compiler.is_compiling():  # RNNBase's weak references cannot be compiled
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()  # functional_call and parametrizations change weights behind RNNBase's back
        weights: Any = self._flat_weights
        return weights

    def _why_not_triton(
        self, input: torch.Tensor, params: list[torch.Tensor], hx: Any = None, kernels_only: bool = False
    ) -> str | None:
        """Why a call goes to PyTorch's own LSTM; None if the kernels take it.

        kernels_only: nobody asks which is faster, for packed rows or a call that returns states.
        """
        reason = why_not_triton(input, self.backend, *params, *(() if hx is None else hx))
        if reason or kernels_only or torch.compiler.is_compiling():
            return reason
        batch = 1 if input.dim() < 3 else input.shape[0 if self.batch_first else 1]
        return why_torch_is_faster(None, input, self.backend, batch, params, self.bias, hx)

    @_typed
    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None, return_states: bool = False) -> Any:
        """Runs the stack.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: (h0 (L*D, B, P or H), c0 (L*D, B, H)), without B if unbatched; zeros if None.
            lengths: how many of the T steps of each sequence of a padded batch count, B numbers from 1 to T in any
                order: the same as packing, with nothing to pack or sort. Past its end a sequence's output is zero.
            return_states: also return a list with every layer's LayerStates, c and the gates i, f, g, o of all steps.

        Returns:
            output of the input's kind, D*(P or H) features; (h_n, c_n) shaped as hx; with return_states also those.

        Raises:
            ValueError, RuntimeError: as torch.nn.LSTM does, with its texts; for a PackedSequence too.
        """
        if lengths is not None or isinstance(input, PackedSequence):
            run: Any = LSTM._forward_packed if lengths is None else LSTM._forward_padded
            arguments = (
                (self, input, hx, return_states) if lengths is None else (self, input, hx, lengths, return_states)
            )
            if torch.compiler.is_compiling():
                from triton_lstm.compiled import eagerly

                return eagerly(run, *arguments)
            return run(*arguments)
        params = self._params
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is not None:
            dims = 3 if batched else 2
            if hx[0].dim() != dims or hx[1].dim() != dims:
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be {dims}-D "
                    f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self._check(input, hx, None)
        layout = Layout(batched, self.batch_first) if self._recordings else None
        output, h_n, c_n, *states = self._run(input, hx, params, None, return_states, layout)
        if not batched:
            if torch.compiler.is_compiling() and output.requires_grad:
                from triton_lstm.ops import fresh

                output = fresh(output)
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
            states = [[LayerStates(*(t.squeeze(batch_dim) for t in layer)) for layer in layers] for layers in states]
        return output, (h_n, c_n), *states

    if TYPE_CHECKING:
        __call__: Call  # nn.Module's takes and returns Any

    def _slow_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """nn.Module's, of a traced call: torch.onnx.export(dynamo=False) gives what goes by keyword by position."""
        if exports_by_tracing() and type(self).forward is LSTM.forward:
            kwargs |= zip(("lengths", "return_states"), inputs[2:], strict=False)
            inputs = inputs[:2]
        return super()._slow_forward(*inputs, **kwargs)

    def _forward_packed(self, input: PackedSequence, hx: Any, return_states: bool, padded_to: int | None = None) -> Any:
        """As forward; the output's rows and the states' are packed as the input's."""
        params = self._params
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if sorted_indices is not None and hx is not None:
            hx = hx[0], hx[1]  # nn.LSTM's permute_hidden looks no further either
        self._check(data, hx, batch_sizes)
        hx = None if hx is None else self.permute_hidden(hx, sorted_indices)
        indices = sorted_indices, unsorted_indices
        layout = Layout(True, self.batch_first, batch_sizes, *indices, padded_to) if self._recordings else None
        output, h_n, c_n, *states = self._run(data, hx, params, batch_sizes, return_states, layout)

        def packed(t: torch.Tensor) -> PackedSequence:
            return PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices)

        states = [[PackedLayerStates(*map(packed, layer)) for layer in layers] for layers in states]
        return packed(output), self.permute_hidden((h_n, c_n), unsorted_indices), *states

    def _forward_padded(self, input: Any, hx: Any, lengths: Any, return_states: bool) -> Any:
        """As forward with lengths: packs, runs and pads again."""
        if isinstance(input, PackedSequence) or input.dim() != 3:
            raise ValueError("lengths goes with a padded batch, a 3-D tensor; a PackedSequence has its own")
        refuse_capture(input.device)
        batch, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("lengths= does not go through torch.func: pack the sequences and transform their data")
        lengths = check_lengths(lengths, batch, steps)
        if batch == 0:
            run: Any = LSTM.forward
            return run(self, input, hx, return_states=return_states)
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
        output, h_c, *states = self._forward_packed(packed, hx, return_states, padded_to=steps)

        def padded(sequence: PackedSequence) -> torch.Tensor:
            return pad_packed_sequence(sequence, self.batch_first, total_length=steps)[0]

        states = [[LayerStates(*map(padded, layer)) for layer in layers] for layers in states]
        return padded(output), h_c, *states

    def _check(self, input: torch.Tensor, hx: Any, batch_sizes: torch.Tensor | None) -> None:
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
        batch_sizes: torch.Tensor | None,
        return_states: bool,
        layout: Layout | None,
    ) -> Any:
        fallback = self._why_not_triton(input, params, hx, batch_sizes is not None or return_states) is not None
        if fallback and not return_states:
            self._flatten_for_cudnn()
        taps: Any = ()
        if layout is not None:
            taps = self._begin_recording(input, layout)
        return stack(
            input,
            hx,
            params,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes=batch_sizes,
            recompute=self.recompute,
            return_states=return_states,
            backend="torch" if fallback else "triton",
            taps=taps,
        )

    def _begin_recording(self, input: torch.Tensor, layout: Layout) -> Any:
        if torch.compiler.is_compiling():
            from triton_lstm.compiled import refuse_recording

            refuse_recording()
        sizes = layout.batch_sizes
        steps = input.shape[1 if self.batch_first else 0] if sizes is None else len(sizes)
        return begin(self._recordings, input, layout, steps, self.num_layers)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks every module for. Raises RuntimeError."""
        raise RuntimeError(
            "torch.jit.script knows nn.LSTM only. Use torch.jit.trace(model, inputs), which takes PyTorch's path, or "
            "triton_lstm.convert(model, back=True) before torch.jit.script"
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_recordings", None)  # a copy belongs to no recording
        return state
