"""LSTM: torch.nn.LSTM's module on the kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.backend import Backend, chosen_backend, why_not_triton, why_torch_is_faster
from triton_lstm.functional import lstm


class LSTM(nn.RNNBase):
    """torch.nn.LSTM with its arguments, parameters, state_dict and results, run by the Triton kernels where they can.

    Subclasses nn.RNNBase, not nn.LSTM: torch.compile refuses every nn.LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            torch.nn.LSTM's, checked as it checks them.
        backend: "auto" (kernels where they can run, else PyTorch's own LSTM), "triton" (kernels, or RuntimeError) or
            "torch"; None reads the environment variable TRITON_LSTM_BACKEND at every call ("auto" if unset).
    """

    # Every attribute that nn.LSTM has not, and its default; each is an argument of the same name
    OPTIONS: ClassVar[dict[str, Any]] = {"backend": None}

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
        self.backend = backend

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read every weight where it lies, and PyTorch's path is looked after."""

    def _flatten_for_cudnn(self) -> None:
        """Before PyTorch's own path on a GPU: cuDNN copies weights that do not share one buffer at every call."""
        weights = self._params
        if weights[0].is_cuda and len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:
            with torch.inference_mode(False):  # or the weights would become inference tensors for good
                super().flatten_parameters()

    @property
    def _params(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _why_not_triton(self, input: Any, params: list[torch.Tensor], hx: Any = None) -> str | None:
        """Why a call goes to PyTorch's own LSTM; None if the kernels take it."""
        if isinstance(input, PackedSequence):
            return why_not_triton(input.data, self.backend, True)
        batch = 1 if input.dim() < 3 else input.shape[0 if self.batch_first else 1]
        reason = why_not_triton(input, self.backend)
        return reason or why_torch_is_faster(None, input, self.backend, batch, params, self.bias, hx)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Runs the stack.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: (h0 (L*D, B, P or H), c0 (L*D, B, H)), without B if unbatched; zeros if None.

        Returns:
            output of the input's kind, D*(P or H) features; (h_n, c_n) shaped as hx.

        Raises:
            ValueError, RuntimeError: as torch.nn.LSTM does, with its texts.
        """
        self._update_flat_weights()  # functional_call and parametrizations change weights behind RNNBase's back
        packed = isinstance(input, PackedSequence)
        params = self._params
        fallback = self._why_not_triton(input, params, hx) is not None
        if fallback:
            self._flatten_for_cudnn()
        if packed:
            forward: Any = nn.LSTM.forward
            return forward(self, input, hx)
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
            if len(hx) != 2:
                raise RuntimeError("lstm expects two hidden states")
            hx = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            self.check_forward_args(input, hx, None)
        else:
            self.check_input(input, None)
        output, h_n, c_n = lstm(
            input,
            hx,
            params,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            backend="torch" if fallback else "triton",
        )
        if not batched:
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
        return output, (h_n, c_n)
