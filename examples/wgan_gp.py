"""WGAN-GP on sequences: a critic with an LSTM, and a penalty on the gradient of its score (https://arxiv.org/abs/1704.00028).

The penalty is differentiated once more, which cuDNN's LSTM cannot do.

    python examples/wgan_gp.py --steps 200
"""

import argparse
import math

import torch
from torch import nn

import triton_lstm
from triton_lstm.settings import device_for

LENGTH, BATCH, NOISE, HIDDEN = 6, 4, 2, 8  # tiny: off a GPU the kernels run in Triton's interpreter
CRITIC_TURNS, PENALTY = 2, 10.0


class OverTime(nn.Module):
    """(T, B, features) -> (T, B, 1): an LSTM and a linear layer at every step."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.lstm = triton_lstm.LSTM(features, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def waves(device: torch.device) -> torch.Tensor:
    """Real data (T, B, 1): sines of random phase."""
    phase = 2 * math.pi * torch.rand(BATCH, 1, device=device)
    return torch.sin(0.7 * torch.arange(LENGTH, device=device)[:, None, None] + phase)


def noise(device: torch.device) -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, NOISE, device=device)


def penalty(critic: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """How far the norm of the critic's gradient is from 1, between real and fake sequences."""
    share = torch.rand(1, BATCH, 1, device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between)[-1].sum(), between, create_graph=True)
    return (gradient.norm(dim=(0, 2)) - 1).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small WGAN-GP with LSTMs on sine waves.")
    parser.add_argument("--steps", type=int, default=10, help="of the generator (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    args = parser.parse_args()
    device = device_for(args.device)
    torch.manual_seed(0)
    generator, critic = OverTime(NOISE).to(device), OverTime(1).to(device)
    adam = [torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.5, 0.9)) for model in (generator, critic)]
    for step in range(1, args.steps + 1):
        for _ in range(CRITIC_TURNS):
            real, fake = waves(device), generator(noise(device)).detach()
            distance = critic(real)[-1].mean() - critic(fake)[-1].mean()
            extra = penalty(critic, real, fake)
            adam[1].zero_grad()
            (PENALTY * extra - distance).backward()
            adam[1].step()
        adam[0].zero_grad()
        (-critic(generator(noise(device)))[-1].mean()).backward()
        adam[0].step()
        if step % 5 == 0 or step in (1, args.steps):
            print(f"step {step}: critic loss {PENALTY * extra - distance:.4f}, penalty {extra:.4f}", flush=True)


if __name__ == "__main__":
    main()
