"""Games, collecting, replay, agent: what is stored, what is drawn, and the verbs end to end on real ALE."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vitkit
from vitkit.data import read
from vitkit.data.frames import actions
from vitkit.errors import ConfigError, DataError, TrainingError
from vitkit.rl import collect, imitate, rainbow
from vitkit.rl.agent import Heads, NoisyLinear, project
from vitkit.rl.games import Game, area
from vitkit.rl.replay import Replay

TINY = {
    "model": "vit_tiny_patch16_224", "pretrained": False, "arch_kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    "image_size": 16, "patch_size": 8, "quiet": True,
}  # fmt: skip
PONG = {"env": "ALE/Pong-v5", "size": 20}


# ---- games -----------------------------------------------------------------------------------------------------------


def test_an_environment_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no environment 'ALE/Pongg-v5'\n  fix: did you mean ALE/Pong-v5"):
        Game("ALE/Pongg-v5")
    with pytest.raises(ConfigError, match=r"no environment 'qqq'\n  fix: \d+ Atari games are called"):
        Game("qqq")
    with pytest.raises(ConfigError, match=r"CartPole-v1 shows observations of shape \(4,\), not pictures"):
        Game("CartPole-v1")


def test_frames_repeat_with_the_seed_and_keep_moving_things():
    def play(seed: int) -> np.ndarray:
        game = Game("ALE/Pong-v5", seed=seed, size=30, noops=5)
        frames = [game.reset()] + [game.step(int(game.random.integers(game.actions)))[0] for _ in range(15)]
        assert game.actions == 6 and game.meanings[0] == "NOOP" and len(game.memory) == 128
        return np.stack(frames)

    a, b = play(3), play(3)
    assert a.shape == (16, 30, 30) and a.dtype == np.uint8 and np.array_equal(a, b)
    assert not np.array_equal(a, play(4)) and not np.array_equal(a[0], a[-1])


def test_area_is_the_mean_of_what_a_pixel_covers():
    x = np.random.default_rng(0).uniform(0, 255, (12, 10))
    assert np.allclose(area(x, (6, 5)), x.reshape(6, 2, 5, 2).mean((1, 3)))
    small = area(x, (5, 4))
    assert small.shape == (5, 4) and small.mean() == pytest.approx(x.mean())
    assert area(np.full((210, 160), 7.0), (84, 84)) == pytest.approx(np.full((84, 84), 7.0))


# ---- collecting ------------------------------------------------------------------------------------------------------


def test_collected_streams_hold_what_was_seen_and_done(tmp_path):
    found = vitkit.rl("collect", **PONG, steps=60, out=tmp_path, seed=2, repeat=3)
    assert found["verdict"].startswith("60 frames of ALE/Pong-v5 in 1 episodes") and not list(tmp_path.glob(".*"))
    images = read(tmp_path, kind="frames")
    taken = np.load(tmp_path / "pong-v5-seed2.actions.npy")
    assert actions(images).tolist() == taken[images.store.index[images.rows] + 2].tolist()
    assert all(len(set(taken[i : i + 3])) == 1 for i in range(0, 60, 3))
    again = collect.collect(collect.Settings(**PONG, steps=60, out=str(tmp_path / "b"), seed=2, repeat=3))
    assert np.array_equal(np.load(again), np.load(found["path"]))


def test_a_policy_sees_frames_and_game(tmp_path):
    seen = []

    def policy(frame, game):
        seen.append((frame.shape, len(game.memory)))
        return 1

    path = collect.collect(collect.Settings(**PONG, steps=20, out=str(tmp_path)), policy)
    assert set(seen) == {((20, 20), 128)} and set(np.load(path.with_name("pong-v5-seed0.actions.npy"))) == {1}


@pytest.mark.parametrize(
    "wrong,message",
    [({"steps": 3}, "steps is 3\n  fix: 9 or more"), ({"sticky": 2.0}, "sticky is 2\n"), ({"skip": 0}, "skip is 0")],
)
def test_wrong_settings_of_collect(wrong, message):
    with pytest.raises(ConfigError, match=message):
        collect.Settings(**wrong)


# ---- replay ----------------------------------------------------------------------------------------------------------


def filled(count: int, capacity: int, ends: tuple[int, ...] = (), stack: int = 3, steps: int = 4) -> Replay:
    replay = Replay(capacity, (1,), np.float32, stack=stack, steps=steps, gamma=0.5)
    for i in range(count):
        replay.add(np.array([i]), i % 7, float(i), i in ends)
    return replay


def test_n_step_rewards_stop_at_the_end_of_an_episode():
    replay = filled(30, 50, ends=(12,))
    drawn = replay.sample(400, 0.5)
    assert set(drawn.rows) <= set(range(26))  # the last four wait for their rewards
    for row, reward, discount, later in zip(drawn.rows, drawn.rewards, drawn.discount, drawn.later, strict=True):
        last = min(row + 3, 12) if row <= 12 else row + 3
        assert reward == pytest.approx(sum(0.5 ** (k - row) * k for k in range(row, last + 1)))
        assert discount == (0.0 if row <= 12 <= row + 3 else 0.5**4)
        assert later[-1, 0] == row + 4


def test_stacks_never_reach_into_another_episode():
    replay = filled(30, 50, ends=(12,))
    assert replay.observe(np.array([13, 14, 15, 5])).squeeze(-1).tolist() == [
        [13, 13, 13],
        [13, 13, 14],
        [13, 14, 15],
        [3, 4, 5],
    ]


def test_a_full_ring_draws_only_whole_transitions():
    replay = filled(137, 40)
    drawn = replay.sample(2000, 1.0)
    newest = 136
    for now, later in zip(drawn.now.squeeze(-1), drawn.later.squeeze(-1), strict=True):
        assert now[-1] - now[0] == 2 and later[-1] - now[-1] == 4 and later[-1] <= newest
        assert now[0] > newest - 40


def test_priorities_decide_and_weights_correct():
    replay = filled(60, 100)
    replay.exponent = 1.0
    rows = np.arange(50)
    replay.update(rows, np.where(rows == 7, 100.0, 1e-6))
    drawn = replay.sample(64, 1.0)
    assert (drawn.rows == 7).mean() > 0.8 and drawn.weights[drawn.rows == 7].max() < 0.1


# ---- agent -----------------------------------------------------------------------------------------------------------


def test_projection_is_the_published_algorithm():
    torch.manual_seed(0)
    support = torch.linspace(-3, 3, 7)
    rewards, discount = torch.tensor([0.3, -9.0, 1.0]), torch.tensor([0.7, 0.9, 0.0])
    p = torch.rand(3, 7).softmax(1)
    want = torch.zeros(3, 7)
    for i in range(3):
        for j in range(7):
            b = (float((rewards[i] + discount[i] * support[j]).clamp(-3, 3)) + 3) / 1.0
            low, high = int(np.floor(b + 1e-9)), int(np.ceil(b - 1e-9))
            want[i, low] += p[i, j] * (1 if low == high else high - b)
            if high != low:
                want[i, high] += p[i, j] * (b - low)
    found = project(rewards, discount, p, support)
    assert torch.allclose(found, want, atol=1e-5) and torch.allclose(found.sum(1), torch.ones(3), atol=1e-5)
    assert found[2, 4] == pytest.approx(1.0)


def test_noise_explores_in_training_only():
    torch.manual_seed(0)
    layer, x = NoisyLinear(5, 4, 0.5), torch.randn(3, 5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    heads = Heads(5, 3, hidden=8, atoms=11, low=-1, high=1, sigma=0.1).eval()
    assert torch.allclose(heads(x).exp().sum(-1), torch.ones(3, 3), atol=1e-5) and heads.returns(x).shape == (3, 3)


def test_the_agent_learns_what_an_action_brings():
    """Two actions, one of them pays: 150 updates on made-up features are enough to prefer it."""
    torch.manual_seed(0)
    settings = rainbow.Settings(
        learn_start=30, n_step=1, batch_size=32, lr=3e-3, atoms=11, returns=(-1.0, 2.0), hidden=16
    )
    heads = Heads(4, 2, hidden=16, atoms=11, low=-1.0, high=2.0, sigma=0.1)
    agent = type("Player", (), {"heads": heads, "encoder": torch.nn.Identity()})()
    replay, random = Replay(200, (4,), np.float32, steps=1), np.random.default_rng(0)
    for _ in range(200):
        action = int(random.integers(2))
        replay.add(random.normal(size=4).astype(np.float32), action, float(action), True)
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    losses = [rainbow.learn(agent, (agent.encoder, heads), replay, optimizer, settings, 0.4) for _ in range(150)]
    found = heads.eval().returns(torch.randn(50, 4))
    assert losses[-1] < losses[0] and bool((found[:, 1] > found[:, 0] + 0.5).all())
    with torch.no_grad():
        heads.value[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="non-finite loss of the agent, before the optimiser step"):
        rainbow.learn(agent, (agent.encoder, heads), replay, optimizer, settings, 0.4)


@pytest.mark.parametrize("frozen", [True, False])
def test_rainbow_end_to_end(tmp_path, frozen):
    own = {**PONG, **TINY, "steps": 40, "learn_start": 20, "n_step": 3, "batch_size": 4, "hidden": 8, "longest": 10}
    found = vitkit.rl("rainbow", **own, frozen=frozen, evaluate=2, out=tmp_path / "run")
    assert found["verdict"].startswith("After 40 steps the agent's return is")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 40
    assert "Evaluation episodes" in (tmp_path / "run" / "report.html").read_text()
    if frozen:  # the player that was left collects frames, and the same ones again
        vitkit.rl("collect", **PONG, steps=12, agent=tmp_path / "run", out=tmp_path / "own")
        assert len(np.load(tmp_path / "own" / "pong-v5-seed0.npy")) == 12


def test_the_cnn_of_data_efficient_rainbow(tmp_path):
    own = {**PONG, "size": 40, "steps": 30, "learn_start": 24, "n_step": 3, "batch_size": 4, "hidden": 8, "evaluate": 0}
    found = vitkit.rl("rainbow", **own, model="cnn", frozen=False, out=tmp_path, quiet=True)
    assert "not evaluated" in found["verdict"] and found["mean"] is None
    assert rainbow.load_agent(str(tmp_path)).encoder.dim == 64
    with pytest.raises(ConfigError, match="the cnn has no weights before the agent trains it\n  fix: --frozen false"):
        rainbow.Settings(model="cnn")
    with pytest.raises(ConfigError, match="is no run of vitkit rl rainbow"):
        rainbow.load_agent(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="learn_start 10 and capacity 100000 with n_step 20"):
        rainbow.Settings(learn_start=10)


# ---- probes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path):
    """A bright half says which action follows."""
    random = np.random.default_rng(0)
    side = random.integers(2, size=200)
    frames = np.full((200, 16, 16), 60, np.uint8)
    frames[side == 1, :, :8] = 200
    np.savez(tmp_path / "logged.npz", frames=frames, actions=side)
    return tmp_path / "logged.npz"


@pytest.mark.parametrize("protocol", ["solved", "sgd"])
def test_imitation_probe(logged, tmp_path, protocol):
    found = vitkit.rl("imitate", **TINY, data=logged, out=tmp_path / "out", protocol=protocol)
    assert found["actions"] == 2 and found["test"] == 38 and found["constant"] < 0.6
    assert protocol == "sgd" or found["weighted_f1"] > 0.95
    assert json.loads((tmp_path / "out" / "results.json").read_text())["weighted_f1"] == found["weighted_f1"]


def test_what_cannot_be_probed_is_said(logged, tmp_path):
    np.savez(tmp_path / "idle.npz", frames=np.full((60, 16, 16), 50, np.uint8), actions=np.zeros(60, np.int64))
    with pytest.raises(DataError, match=r"all \d+ logged actions are 0\n  fix: a policy that acts"):
        vitkit.rl("imitate", **TINY, data=tmp_path / "idle.npz")
    with pytest.raises(ConfigError, match="the encoder takes 3 channels, an observation has 2 grey frames"):
        vitkit.rl("imitate", **TINY, data=logged, frames=2)
    with pytest.raises(ConfigError, match="protocol is 'ridge'\n  fix: one of: solved, sgd"):
        imitate.Settings(protocol="ridge")
    assert imitate.weighted_f1(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == pytest.approx(
        0.75 * 0.8 + 0.25 * 2 / 3
    )


def test_look_writes_a_page(logged, tmp_path):
    np.savez(tmp_path / "two.npz", a=np.load(logged)["frames"], b=np.load(logged)["frames"][::-1] // 2)
    found = vitkit.rl("look", **TINY, data=tmp_path / "two.npz", out=tmp_path / "look", map=False)
    page = (tmp_path / "look" / "look.html").read_text()
    assert "Singular values of the covariance" in page and "head 1" in page
    assert found["this encoder"]["effective_rank"] >= 1 and len(found["this encoder"]["sparsity"]) == 1
    with pytest.raises(ConfigError, match=r"observations 3, threshold 0\.1"):
        vitkit.rl("look", **TINY, data=logged, out=tmp_path / "look", observations=3)


def test_the_verb_names_its_methods(capsys):
    from vitkit.run.cli import main

    assert main(["rl"]) == 0 and "rainbow" in capsys.readouterr().out
    assert main(["rl", "--env", "x"]) == 2 and "needs a method before its settings" in capsys.readouterr().err
    assert main(["rl", "rainbw"]) == 2 and "did you mean rainbow?" in capsys.readouterr().err
    assert main(["rl", "collect"]) == 2 and "needs env, out" in capsys.readouterr().err
