"""Recurrent PPO (https://arxiv.org/abs/1707.06347): a policy with an LSTM, whose state begins anew with every episode.

    pip install gymnasium
    python examples/recurrent_ppo.py --iterations 20

Episodes begin at any step of a rollout. With resets= one call of the LSTM runs all steps of all environments.
"""

import argparse
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import triton_lstm
from triton_lstm.settings import device_for

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
    from gymnasium.wrappers.vector import RecordEpisodeStatistics
except ImportError:
    sys.exit("recurrent_ppo.py needs gymnasium >= 1.1: pip install gymnasium")

SYMBOLS, LONGEST = 3, 4
STEPS, ENVS, HIDDEN = 8, 64, 16  # tiny: off a GPU the kernels run in Triton's interpreter
EPOCHS, CLIP, GAMMA, LAMBDA = 4, 0.2, 0.99, 0.95

State = tuple[torch.Tensor, torch.Tensor]


class Recall(gymnasium.Env[np.ndarray, np.int64]):
    """Shows a symbol and asks for it up to LONGEST steps later; returns 1 for the answer, 1 / SYMBOLS by guessing."""

    observation_space = gymnasium.spaces.Box(0, 1, (SYMBOLS + 1,))  # the symbol, then 1 in the last place to ask for it
    action_space = gymnasium.spaces.Discrete(SYMBOLS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.symbol, self.wait = self.np_random.integers(SYMBOLS), self.np_random.integers(1, LONGEST + 1)
        return np.eye(SYMBOLS + 1, dtype=np.float32)[self.symbol], {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        asked = bool(self.wait == 0)
        self.wait -= 1
        observation = np.zeros(SYMBOLS + 1, dtype=np.float32)
        observation[-1] = self.wait == 0
        return observation, float(asked and action == self.symbol), asked, False, {}


class Policy(nn.Module):
    """The distribution of actions and the values (T, B) of observations (T, B, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = triton_lstm.LSTM(SYMBOLS + 1, HIDDEN)
        self.actor, self.critic = nn.Linear(HIDDEN, SYMBOLS), nn.Linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor, state: State, resets: torch.Tensor) -> tuple[Categorical, torch.Tensor, State]:
        h, state = self.lstm(x, state, resets=resets)
        return Categorical(logits=self.actor(h)), self.critic(h).squeeze(-1), state


class Rollout(NamedTuple):
    """What the update needs: the state before the first step, and all steps, (T, B) or (T, B, features)."""

    state: State
    observations: torch.Tensor
    resets: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class Collector:
    """Acts in all environments. Episodes go on from one rollout to the next, and so does the state of the LSTM."""

    def __init__(self, envs: VectorEnv, device: torch.device) -> None:
        self.envs, self.device = envs, device
        self.x = torch.tensor(envs.reset(seed=0)[0], device=device)
        self.resets = torch.ones(ENVS, dtype=torch.bool, device=device)
        self.state = (torch.zeros(1, ENVS, HIDDEN, device=device), torch.zeros(1, ENVS, HIDDEN, device=device))

    @torch.no_grad()  # so the state is a constant of the next update: BPTT is truncated there
    def rollout(self, policy: Policy) -> Rollout:
        before, steps = self.state, []
        for _ in range(STEPS):
            pi, value, self.state = policy(self.x[None], self.state, self.resets[None])
            action = pi.sample()
            x, reward, terminated, truncated, _ = self.envs.step(action[0].cpu().numpy())
            reward = torch.tensor(reward, dtype=torch.float32, device=self.device)
            steps.append((self.x, self.resets, action[0], pi.log_prob(action)[0], value[0], reward))
            self.x = torch.tensor(x, device=self.device)
            # The next step is the first of a new episode where this one was the last
            self.resets = torch.tensor(terminated | truncated, device=self.device)
        xs, resets, actions, log_probs, values, rewards = map(torch.stack, zip(*steps, strict=True))
        # The state after this call is dropped: the next rollout begins with the same observation
        value = policy(self.x[None], self.state, self.resets[None])[1]
        # A truncated episode would need the value of its last observation; there is none here
        goes_on = ~torch.cat([resets[1:], self.resets[None]])
        deltas = rewards + GAMMA * goes_on * torch.cat([values[1:], value]) - values
        advantages = torch.empty_like(deltas)
        advantage = torch.zeros_like(deltas[0])
        for t in reversed(range(STEPS)):
            advantages[t] = advantage = deltas[t] + GAMMA * LAMBDA * goes_on[t] * advantage
        return Rollout(before, xs, resets, actions, log_probs, advantages, advantages + values)


def loss_of(policy: Policy, batch: Rollout) -> torch.Tensor:
    """PPO's clipped loss; the LSTM is called once, for all steps of all environments."""
    pi, values, _ = policy(batch.observations, batch.state, batch.resets)
    ratio = (pi.log_prob(batch.actions) - batch.log_probs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    return 0.5 * (values - batch.returns).square().mean() - gain - 0.01 * pi.entropy().mean()


def environments() -> RecordEpisodeStatistics:
    # SAME_STEP: the observation that an episode's last step returns is the first one of the next episode
    return RecordEpisodeStatistics(SyncVectorEnv([Recall] * ENVS, autoreset_mode=AutoresetMode.SAME_STEP))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a policy with an LSTM to remember what it saw.")
    parser.add_argument("--iterations", type=int, default=20, help="of rollout and update (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    args = parser.parse_args()
    device = device_for(args.device)
    torch.manual_seed(0)
    envs, policy = environments(), Policy().to(device)
    collector, adam = Collector(envs, device), torch.optim.Adam(policy.parameters(), lr=2e-2)
    for iteration in range(1, args.iterations + 1):
        batch = collector.rollout(policy)
        for _ in range(EPOCHS):
            loss = loss_of(policy, batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
        print(f"iteration {iteration}: return {np.mean(envs.return_queue):.2f}, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
