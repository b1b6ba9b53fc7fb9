"""Third-party LSTMs as modules with nn.LSTM's weights; each package is imported when its module is created.

All support one layer and direction; none is installed with this project. All include the input projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from triton_lstm.perf.cases import Case


class _Peer(nn.Module):
    """Layout (B, T, features); the parameters are those of the nn.LSTM, so that gradients can be compared."""

    batch_first = True

    def __init__(self, case: Case, twin: nn.LSTM) -> None:
        super().__init__()
        self.inner: Any = twin
        self.swap = case.batch_first != self.batch_first

    def forward(self, x: torch.Tensor) -> Any:
        y = self.run(x.transpose(0, 1) if self.swap else x)
        return y.transpose(0, 1) if self.swap else y, None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The output for x, in the peer's layout."""
        raise NotImplementedError


class FlashRNN(_Peer):
    """flashrnn(Wx (B, T, 4, heads, D), R (4, heads, D new, D before), b (4, heads, D)), one head of width H."""

    def __init__(self, case: Case, twin: nn.LSTM) -> None:
        super().__init__(case, twin)
        from flashrnn import flashrnn

        self.flashrnn, self.dtype = flashrnn, {"fp16": "float16", "bf16": "bfloat16"}[case.precision]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        w: Any = self.inner
        hidden = w.hidden_size
        wx = torch.nn.functional.linear(x, w.weight_ih_l0).view(*x.shape[:2], 4, 1, hidden)
        bias = (w.bias_ih_l0 + w.bias_hh_l0).view(4, 1, hidden)
        states, _ = self.flashrnn(
            wx, w.weight_hh_l0.view(4, 1, hidden, hidden), bias, function="lstm", backend="cuda_fused", dtype=self.dtype
        )
        output: torch.Tensor = states[0].reshape(*x.shape[:2], hidden)  # states (h and c, B, T, heads, D)
        return output


class TorchRL(_Peer):
    """lstm_triton(x (B, T, I), hidden, cell (B, T, H), w_ih, w_hh, b_ih, b_hh, is_init (B, T)), from zero states."""

    def __init__(self, case: Case, twin: nn.LSTM) -> None:
        super().__init__(case, twin)
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        self.lstm_triton = lstm_triton
        rows = case.reset_rows() if case.batch_first else case.reset_rows().t().contiguous()
        self.is_init: torch.Tensor
        self.register_buffer("is_init", rows.to(next(twin.parameters()).device))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        w: Any = self.inner
        state = x.new_zeros(*x.shape[:2], w.hidden_size)
        weights = (w.weight_ih_l0, w.weight_hh_l0, w.bias_ih_l0, w.bias_hh_l0)
        output: torch.Tensor = self.lstm_triton(x.contiguous(), state, state, *weights, self.is_init)[0]
        return output


class Haste(_Peer):
    """haste_pytorch.LSTM. Its weights have another layout: only output and input gradient can be compared."""

    batch_first = False

    def __init__(self, case: Case, twin: nn.LSTM) -> None:
        super().__init__(case, twin)
        import haste_pytorch

        w: Any = twin
        self.inner = haste_pytorch.LSTM(case.I, case.H)
        self.inner.from_native_weights(w.weight_ih_l0, w.weight_hh_l0, w.bias_ih_l0, w.bias_hh_l0)
        self.inner.to(w.weight_hh_l0.device)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x.contiguous())[0]
        return output
