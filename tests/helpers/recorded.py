"""An LSTM and an input for it, for test_record_calls.py and test_record_refused.py."""

import pytest
import torch

import triton_lstm

T, B = 4, 2


@pytest.fixture
def lstm(device):
    torch.manual_seed(0)
    return triton_lstm.LSTM(3, 4, backend="triton").to(device)


@pytest.fixture
def x(device):
    return torch.randn(T, B, 3, device=device)
