"""Games of gymnasium as streams of frames: the Atari preprocessing that agents and encoders have been compared on.

Machado et al., "Revisiting the Arcade Learning Environment", JAIR 2018 (arXiv 1709.06009), and Mnih et al. 2015: an action is
held for `skip` emulator frames, the pixel-wise maximum of the last two is kept (sprites flicker), grey, resized by area
averaging to `size` x `size`. Environments other than Atari's are taken as they are if they show pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitkit.errors import ConfigError, MissingExtra, nearest

ATARI = "ALE/"


class Game:
    """`reset() -> frame`, `step(action) -> (frame, reward, life lost, over)`; frames are uint8 (size, size).

    sticky: probability that the emulator repeats the last action instead (0.25 is ALE's advice, Atari-100k has 0). noops: up
    to so many idle actions at the start of an episode. fire: press FIRE first where a game waits for it.
    """

    def __init__(self, env: str, *, seed: int = 0, size: int = 84, skip: int = 4, sticky: float = 0.0, noops: int = 0):
        self.size, self.skip, self.noops = size, skip, noops
        self.atari = env.startswith(ATARI)
        options = {"frameskip": 1, "obs_type": "grayscale", "repeat_action_probability": sticky} if self.atari else {}
        self.env = make(env, **options)
        shape = getattr(self.env.observation_space, "shape", None) or ()
        pictures = getattr(self.env.observation_space, "dtype", None) == np.uint8 and len(shape) in (2, 3)
        if not pictures or (len(shape) == 3 and shape[-1] != 3):
            raise ConfigError(
                f"{env} shows observations of shape {tuple(shape)}, not pictures", fix="an ALE/... environment"
            )
        if not hasattr(self.env.action_space, "n"):
            raise ConfigError(
                f"{env} has continuous actions", fix="an environment with a list of actions, e.g. ALE/Pong-v5"
            )
        self.actions = int(self.env.action_space.n)
        self.random = np.random.default_rng(seed)
        self._lives = 0
        self.env.action_space.seed(seed)
        self.env.reset(seed=seed)

    @property
    def meanings(self) -> list[str]:
        """Names of the actions."""
        names = getattr(self.env.unwrapped, "get_action_meanings", None)
        return list(names()) if names is not None else [str(i) for i in range(self.actions)]

    @property
    def memory(self) -> np.ndarray:
        """The console's 128 bytes (Atari only)."""
        return self.env.unwrapped.ale.getRAM()

    def reset(self) -> np.ndarray:
        picture, info = self.env.reset()
        for _ in range(int(self.random.integers(self.noops + 1)) if self.noops else 0):
            picture, _, over, cut, info = self.env.step(0)
            if over or cut:
                picture, info = self.env.reset()
        self._lives = info.get("lives", 0)
        return self._frame(picture)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        total, over = 0.0, False
        last: list[np.ndarray] = []
        for _ in range(self.skip if self.atari else 1):
            picture, reward, ended, cut, info = self.env.step(action)
            total, over = total + float(reward), bool(ended or cut)
            last = [*last[-1:], picture]
            if over:
                break
        picture = np.maximum(*last) if self.atari and len(last) == 2 else last[-1]
        lives = info.get("lives", 0)
        lost, self._lives = lives < self._lives, lives
        return self._frame(picture), total, lost or over, over

    def close(self) -> None:
        self.env.close()

    def _frame(self, picture: np.ndarray) -> np.ndarray:
        grey = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])
        return np.rint(area(grey, (self.size, self.size))).clip(0, 255).astype(np.uint8)


def make(env: str, **options: Any) -> Any:
    """The gymnasium environment; an unknown id names the nearest ones."""
    try:
        import ale_py
        import gymnasium
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name).replace("_", "-"), "rl") from error
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    if env not in gymnasium.registry:
        known = list(gymnasium.registry)
        close = nearest(env, known) or [k for k in known if env.lower() in k.lower()][:3]
        games = sum(name.startswith(ATARI) and name.endswith("-v5") for name in known)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(
            f"there is no environment {env!r}",
            fix=f"{hint}{games} Atari games are called ALE/<Game>-v5, e.g. ALE/Pong-v5",
        )
    return gymnasium.make(env, **options)


def area(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`picture` (H, W) resized by area: every new pixel is the mean of what it covers, parts of pixels included.

    From running sums, which need no matrix product (and so none of its threads) for a picture this small.
    """
    for new in size:  # rows, then columns: each pass transposes
        old = len(picture)
        edges = np.linspace(0, old, new + 1)
        whole = np.minimum(edges.astype(int), old - 1)
        sums = np.cumsum(picture, 0, dtype=np.float64) - picture  # (H, W): before each row
        at = sums[whole] + (edges - whole)[:, None] * picture[whole]
        picture = (np.diff(at, axis=0) * (new / old)).T
    return picture
