"""examples/recurrent_ppo.py, and resets= in place of the loop over steps in stable-baselines3-contrib's policy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium", minversion="1.1")
pytest.importorskip("sb3_contrib")
import gymnasium
import recurrent_ppo
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer

import triton_lstm

# Of three sequences: at the first step, twice in a row, never
STARTS = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
SEQUENCES, STEPS = STARTS.shape
FEATURES, HIDDEN, ACTIONS = 5, 8, 3


def run(iterations: int, **environment: str) -> list[float]:
    """The return of every iteration."""
    done = subprocess.run(
        [sys.executable, recurrent_ppo.__file__, "--iterations", str(iterations)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    lines = [re.fullmatch(r"iteration (\d+): return (\S+), loss (\S+)", line) for line in done.stdout.splitlines()]
    assert [int(line[1]) for line in lines] == list(range(1, iterations + 1))
    assert all(abs(float(line[3])) < 10 for line in lines)
    return [float(line[2]) for line in lines]


def test_it_runs():
    assert all(0 < mean < 1 for mean in run(2))


def test_it_learns():
    returns = run(20, TRITON_LSTM_BACKEND="torch", OMP_NUM_THREADS="1")
    assert returns[0] < 0.6 and returns[-1] > 0.9


def test_without_gymnasium_it_says_what_to_install(tmp_path):
    Path(tmp_path, "gymnasium.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, recurrent_ppo.__file__],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr == "recurrent_ppo.py needs gymnasium >= 1.1: pip install gymnasium\n"


@pytest.fixture
def collected(device, monkeypatch):
    """A policy, what collects with it, its second rollout, and the rewards of that one."""
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "triton")
    torch.manual_seed(0)
    policy, envs = recurrent_ppo.Policy().to(device), recurrent_ppo.environments()
    collector = recurrent_ppo.Collector(envs, device)
    collector.rollout(policy)
    rewards = []

    def step(actions, step=envs.step):
        result = step(actions)
        rewards.append(result[1].copy())
        return result

    monkeypatch.setattr(envs, "step", step)
    return policy, collector, collector.rollout(policy), rewards


def test_one_call_gives_the_log_probs_of_the_steps_that_were_acted(collected):
    policy, collector, batch, _ = collected
    shown = batch.observations[..., : recurrent_ppo.SYMBOLS].any(-1)  # at the first step of every episode
    assert torch.equal(batch.resets, shown) and not shown[0].all() and shown[1:].any(0).all()
    tolerance = dict(rtol=1e-4, atol=1e-5)
    pi, values, state = policy(batch.observations, batch.state, batch.resets)
    torch.testing.assert_close(pi.log_prob(batch.actions), batch.log_probs, **tolerance)
    torch.testing.assert_close(values, batch.returns - batch.advantages, **tolerance)
    torch.testing.assert_close(state, collector.state, **tolerance)
    never = torch.zeros_like(batch.resets)
    for state, resets in ((None, batch.resets), (batch.state, never)):
        wrong = policy(batch.observations, state, resets)[0].log_prob(batch.actions)
        assert (wrong - batch.log_probs).abs().max() > 1e-3


def test_advantages_are_those_of_stable_baselines3(collected):
    policy, collector, batch, rewards = collected
    space, sizes = gymnasium.spaces.Discrete(2), (recurrent_ppo.STEPS, recurrent_ppo.ENVS)
    lambdas = dict(gae_lambda=recurrent_ppo.LAMBDA, gamma=recurrent_ppo.GAMMA)
    buffer = RolloutBuffer(sizes[0], space, space, "cpu", **lambdas, n_envs=sizes[1])
    buffer.rewards[:] = rewards
    buffer.values[:] = (batch.returns - batch.advantages).cpu().numpy()
    buffer.episode_starts[:] = batch.resets.cpu().numpy()
    with torch.no_grad():
        last = policy(collector.x[None], collector.state, collector.resets[None])[1][0]
    buffer.compute_returns_and_advantage(last, collector.resets.cpu().numpy())
    for got, expected in ((batch.advantages, buffer.advantages), (batch.returns, buffer.returns)):
        torch.testing.assert_close(got.cpu(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


class OneCall(RecurrentActorCriticPolicy):
    """Its LSTMs are ours, called once for all steps."""

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        sequences = lstm_states[0].shape[1]
        resets = episode_starts.reshape(sequences, -1).T == 1
        x = features.reshape(sequences, -1, lstm.input_size).swapaxes(0, 1)
        output, lstm_states = lstm(x, lstm_states, resets=resets)
        return output.swapaxes(0, 1).flatten(0, 1), lstm_states


def policy_of(kind, kwargs, device, dtype):
    kwargs = dict(net_arch=[HIDDEN], lstm_hidden_size=HIDDEN, ortho_init=False) | kwargs  # its heads are almost 0
    spaces = gymnasium.spaces.Box(-1, 1, (FEATURES,)), gymnasium.spaces.Discrete(ACTIONS)
    policy = kind(*spaces, lambda _: 1e-3, **kwargs).to(device, dtype)
    policy.features_extractor.register_forward_hook(lambda module, args, out: out.to(dtype))  # observations are float32
    return policy


@pytest.mark.parametrize(
    "kwargs", [{}, dict(n_lstm_layers=2), dict(shared_lstm=True, enable_critic_lstm=False)], ids=str
)
def test_one_call_is_the_loop_of_sb3_contrib(kwargs, device, precise):
    dtype, tolerance = precise
    torch.manual_seed(0)
    theirs, ours = (policy_of(kind, kwargs, device, dtype) for kind in (RecurrentActorCriticPolicy, OneCall))
    ours.load_state_dict(theirs.state_dict())
    lstms = [name for name, module in theirs.named_modules() if isinstance(module, torch.nn.LSTM)]
    assert triton_lstm.convert(ours, backend="triton").converted == tuple(lstms)
    rows, layers = SEQUENCES * STEPS, kwargs.get("n_lstm_layers", 1)
    observations = torch.randn(rows, FEATURES, device=device)
    actions = torch.randint(ACTIONS, (rows,), device=device)
    starts = STARTS.flatten().to(device, dtype)
    states = torch.randn(2, 2, layers, SEQUENCES, HIDDEN, dtype=dtype, device=device)
    weights = torch.randn(3, rows, dtype=dtype, device=device)

    def evaluate(policy, starts, states, among=slice(None)):
        pi, vf = map(tuple, states)
        values, log_probs, entropy = policy.evaluate_actions(
            observations[among], actions[among], RNNStates(pi, vf), starts[among]
        )
        return dict(values=values.flatten(), log_probs=log_probs, entropy=entropy)

    def everything(policy):
        leaf = states.clone().requires_grad_()
        results = evaluate(policy, starts, leaf)
        (torch.stack([*results.values()]) * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
        return results | gradients | {"states": leaf.grad}

    got, expected = everything(ours), everything(theirs)
    assert {f"{lstm}.weight_hh_l{layer}" for lstm in lstms for layer in range(layers)} <= set(got)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")

    of_pi = got["states"][0]  # an episode that begins at the first step has nothing from the states before it
    assert not of_pi[..., 0, :].any() and of_pi[..., 1:, :].all()
    episode = slice(3, STEPS)
    alone = evaluate(theirs, torch.zeros_like(starts), torch.zeros_like(states[..., :1, :]), episode)
    never = evaluate(ours, torch.zeros_like(starts), states)
    for name in ("values", "log_probs", "entropy"):
        torch.testing.assert_close(got[name][episode], alone[name], **tolerance)
        assert (got[name] - never[name]).abs().max() > 1e-3
