"""c and the gates of every step by PyTorch's equations."""

import torch

from triton_lstm.core.reference import lstm_steps


def by_hand(module, x, hx, resets=None):
    """Every layer's c, i, f, g, o; sequences of x (T, B, features) all of full length, hx of all layers.

    resets: (T,), the same for all sequences. Differentiable.
    """
    weights = dict(module.named_parameters())
    begins = [False] * len(x) if resets is None else resets.tolist()
    states = []
    for layer in range(module.num_layers):
        rows, outputs = [], []
        for d, suffix in enumerate(["", "_reverse"][: 2 if module.bidirectional else 1]):
            names = [f"{name}_l{layer}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            w_ih, w_hh, b_ih, b_hh = (weights.get(name) for name in names)
            w_hr = weights.get(f"weight_hr_l{layer}{suffix}")
            h, c = (state[layer * (2 if module.bidirectional else 1) + d] for state in hx)
            steps = []
            first_of_segment = [False, *begins[:0:-1]] if d else begins
            for x_t, first in zip(x.flip(0) if d else x, first_of_segment, strict=True):
                h, c = (h * 0, c * 0) if first else (h, c)
                [(gates, c, h)] = lstm_steps([x_t], h, c, w_ih, w_hh, b_ih, b_hh)
                h = h if w_hr is None else h @ w_hr.t()
                steps.append((c, *gates.chunk(4, -1), h))
            columns = [torch.stack(column[::-1] if d else column) for column in zip(*steps, strict=True)]
            rows.append(columns[:5])
            outputs.append(columns[5])
        states.append(tuple(torch.cat(parts, -1) for parts in zip(*rows, strict=True)))
        x = torch.cat(outputs, -1)
    return states
