"""Collect frames: play a game and keep its frames, actions, rewards and episodes as a stream to pre-train on.

Source: the Atari preprocessing of `vitkit.rl.games`; the random policy is ALE's usual one, `repeat` holds an action for some
steps as people do, and a finished `vitkit rl rainbow` run plays by itself.

What happens, and where: frame i is what the player saw, `actions[i]` what it then did and `rewards[i]` what that brought
(`collect`). Files are written as they fill (`GAME.npy` and `GAME.actions.npy`, ... beside it) and mapped when read, so any
number of frames needs no memory.

Differs from the paper: there is none; DQN-replay's own frames are read as they are (docs/systems/tov_vicreg.md).

Cost: about 700 frames a second and core (most of it the emulator's); 100,000 frames of 84 x 84 take 0.7 GB.

    vitkit rl collect --env ALE/Pong-v5 --steps 20000 --out streams/
    vitkit.rl("collect", env="ALE/Pong-v5", steps=20_000, out="streams/")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What is played, by whom, and where frames go."""

    env: str = ""
    """environment of gymnasium that shows pictures, e.g. ALE/Pong-v5"""
    out: str = ""
    """folder of streams; a file a game and seed"""
    steps: int = 10_000
    """frames to keep"""
    agent: str | None = None
    """run of `vitkit rl rainbow` that plays; by default actions are drawn at random"""
    epsilon: float = 0.0
    """share of random actions of the agent"""
    repeat: int = 1
    """steps for which a random action is held"""
    size: int = 84
    """pixels of a frame's sides (DQN: 84)"""
    skip: int = 4
    """emulator frames an action (DQN: 4)"""
    sticky: float = 0.25
    """probability that the emulator repeats the last action (ALE v5: 0.25)"""
    seed: int = 0
    """of the emulator and of random actions"""
    quiet: bool = False
    """no words on the terminal"""

    def __post_init__(self) -> None:
        for name, least in (("steps", 9), ("repeat", 1), ("size", 8), ("skip", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"{least} or more")
        for name in ("epsilon", "sticky"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name):g}", fix="a probability from 0 to 1")


def collect(settings: Settings, policy: Callable[[np.ndarray, Any], int] | None = None) -> Path:
    """Play and write; the path of the frames. `policy(frame, game)` picks actions instead of the settings' player."""
    from vitkit.rl.games import Game

    game = Game(settings.env, seed=settings.seed, size=settings.size, skip=settings.skip, sticky=settings.sticky)
    act: Callable[[Any, Any], int] = policy or (_random(settings, game) if settings.agent is None else _agent(settings))
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{settings.env.rpartition('/')[2].lower()}-seed{settings.seed}"
    count = settings.steps
    # Frames go to a mapped file under another name, which is given its own once it is whole.
    part = folder / f".{name}.part"
    frames = np.lib.format.open_memmap(part, "w+", np.uint8, (count, settings.size, settings.size))
    actions, rewards = np.zeros(count, np.int16), np.zeros(count, np.float32)
    episodes, episode, over, frame = np.zeros(count, np.int32), -1, True, None
    for i in range(count):
        if over:
            frame, episode = game.reset(), episode + 1
        frames[i], episodes[i] = frame, episode
        actions[i] = action = int(act(frame, game))
        frame, rewards[i], _, over = game.step(action)
    game.close()
    frames.flush()
    del frames
    for what, values in (("actions", actions), ("rewards", rewards), ("episodes", episodes)):
        np.save(folder / f"{name}.{what}.npy", values)
    return part.replace(folder / f"{name}.npy")


def _random(settings: Settings, game: Any) -> Callable[[np.ndarray, Any], int]:
    """Uniform actions, each held for `repeat` steps."""
    state = {"left": 0, "action": 0}

    def act(frame: np.ndarray, game: Any) -> int:
        if not state["left"]:
            state.update(left=settings.repeat, action=int(game.random.integers(game.actions)))
        state["left"] -= 1
        return state["action"]

    return act


def _agent(settings: Settings) -> Callable[[np.ndarray, Any], int]:
    from vitkit.rl.rainbow import load_agent

    agent = load_agent(str(settings.agent))

    def act(frame: np.ndarray, game: Any) -> int:
        agent.see(frame)
        if game.random.random() < settings.epsilon:
            return int(game.random.integers(game.actions))
        return agent.act()

    return act


def run(settings: Settings) -> dict[str, Any]:
    """What `vitkit rl collect` does: {"path", "frames", "episodes", "verdict"}."""
    path = collect(settings)
    episodes = np.load(path.with_name(f"{path.stem}.episodes.npy"))
    rewards = np.load(path.with_name(f"{path.stem}.rewards.npy"))
    count = int(episodes[-1]) + 1
    words = f"{len(episodes):,} frames of {settings.env} in {count:,} episodes, reward {rewards.sum():g} in all"
    return {"path": path, "frames": len(episodes), "episodes": count, "verdict": words, "report": path}
