"""A call of the module with packed rows, or with a padded batch and lengths, which is packed for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from triton_lstm.core.call import LayerStates, PackedLayerStates
from triton_lstm.core.checks import check_lengths, check_resets
from triton_lstm.core.layout import Layout
from triton_lstm.core.packing import Rows, refuse_capture
from triton_lstm.core.segments import arranged
from triton_lstm.core.weights import weights_of


def run_packed(
    module: Any, input: PackedSequence, hx: Any, resets: Any, return_states: bool, padded_to: int | None = None
) -> Any:
    """As module.forward; the output's rows and the states' are packed as the input's."""
    params = weights_of(module)
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if sorted_indices is not None and hx is not None:
        hx = hx[0], hx[1]  # nn.LSTM's permute_hidden looks no further either
    module._check(data, hx, params, batch_sizes)
    hx = None if hx is None else module.permute_hidden(hx, sorted_indices)
    indices = sorted_indices, unsorted_indices
    layout = Layout(True, module.batch_first, batch_sizes, *indices, padded_to) if module._recordings else None
    rows = arranged(data, Rows(module.batch_first, batch_sizes), resets, None, known=True)
    output, h_n, c_n, *states = module._run(data, hx, params, rows, return_states, layout)

    def packed(t: torch.Tensor) -> PackedSequence:
        return PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices)

    states = [[PackedLayerStates(*map(packed, layer)) for layer in layers] for layers in states]
    return packed(output), module.permute_hidden((h_n, c_n), unsorted_indices), *states


def run_padded(module: Any, input: Any, hx: Any, resets: Any, return_states: bool, lengths: Any) -> Any:
    """As module.forward with lengths: packs, runs and pads again."""
    if isinstance(input, PackedSequence) or input.dim() != 3:
        raise ValueError("lengths goes with a padded batch, a 3-D tensor; a PackedSequence has its own")
    refuse_capture(input.device)
    batch, steps = input.shape[:2] if module.batch_first else (input.shape[1], input.shape[0])
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("lengths= does not go through torch.func: pack the sequences and transform their data")
    lengths = check_lengths(lengths, batch, steps)
    if batch == 0:
        return module._forward_dense(input, hx, resets, None, return_states)

    def pack(t: torch.Tensor) -> PackedSequence:
        return pack_padded_sequence(t, lengths, module.batch_first, enforce_sorted=False)

    resets = resets if resets is None else pack(check_resets(resets, input)).data
    output, h_c, *states = run_packed(module, pack(input), hx, resets, return_states, padded_to=steps)

    def padded(sequence: PackedSequence) -> torch.Tensor:
        return pad_packed_sequence(sequence, module.batch_first, total_length=steps)[0]

    states = [[LayerStates(*map(padded, layer)) for layer in layers] for layers in states]
    return padded(output), h_c, *states
