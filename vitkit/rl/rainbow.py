"""Data-efficient Rainbow: what a pre-trained ViT is worth to an agent that may play only 100,000 steps.

Paper: Hessel et al., "Rainbow", AAAI 2018 (arXiv 1710.02298), with the settings of van Hasselt, Hessel & Aslanides, "When to
use parametric models in reinforcement learning?", NeurIPS 2019 (arXiv 1906.05243); Goulao & Oliveira (arXiv 2209.10901)
judge TOV-VICReg by it. Their agent is unpublished, so its settings are van Hasselt's here.

What happens, and where: `vitkit.rl.games` plays; an observation is three frames, its feature the ViT's pooled one
(`rl.agent.Encoder`). Heads are dueling, distributional (C51) and noisy (`rl.agent.Heads`); transitions of 20 steps are drawn
by priority (`rl.replay`), one batch a step; the next action is the online network's, its value the target's (`learn`).
Frozen (the default), the encoder runs once a frame and features are replayed, so training costs the heads alone; otherwise
frames are replayed and the encoder is fine-tuned.

Differs from the paper: three frames instead of four, as the encoder was pre-trained on; no resume (a run is one process).
Written here in some 250 lines because torchrl has the parts but no Rainbow, and eight further packages for two of them.

Cost: frozen one ViT pass and one update of the heads a step; fine-tuned three passes and a backward of 32 observations.

    vitkit rl rainbow --env ALE/Pong-v5 --model runs/tov --out runs/pong --steps 100000
    vitkit.rl("rainbow", env="ALE/Pong-v5", model="runs/tov", out="runs/pong", steps=100_000)
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from vitkit.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Settings:
    """Data-efficient Rainbow."""

    env: str = ""
    """environment of gymnasium that shows pictures, e.g. ALE/Pong-v5"""
    model: str = ""
    """encoder: run folder, weights file or timm name; "cnn" is data-efficient Rainbow's own, trained with the agent"""
    out: str = ""
    """folder to write: report.html, results.json and the agent"""
    pretrained: bool = True
    """load the released weights of a timm name; false starts from random ones"""
    arch_kwargs: dict[str, Any] | None = None
    """keywords of the architecture that differ from its name"""
    image_size: int | None = None
    """pixels that the encoder sees; by default the model's own (frames up to a patch larger lose their last rows)"""
    patch_size: int | None = None
    """pixels of a patch; by default the model's own"""
    frozen: bool = True
    """train the heads on features of the encoder as it is; false fine-tunes it"""
    steps: int = 100_000
    """agent steps, of `skip` emulator frames each (Atari-100k)"""
    learn_start: int = 1600
    """steps before the first update (van Hasselt et al., table 1)"""
    batch_size: int = 32
    """transitions an update (table 1)"""
    n_step: int = 20
    """rewards added before bootstrapping (table 1)"""
    gamma: float = 0.99
    """discount"""
    target_every: int = 2000
    """updates between copies to the target network (table 1)"""
    lr: float = 1e-4
    """of Adam, epsilon 1.5e-4 (table 1)"""
    hidden: int = 256
    """width of the heads' hidden layers (table 1)"""
    atoms: int = 51
    """atoms of the return distribution (Rainbow)"""
    returns: tuple[float, float] = (-10.0, 10.0)
    """support of the return distribution (Rainbow)"""
    sigma: float = 0.1
    """initial noise of noisy layers"""
    capacity: int = 100_000
    """transitions kept"""
    size: int = 84
    """pixels of a frame's sides"""
    skip: int = 4
    """emulator frames an action"""
    sticky: float = 0.0
    """probability that the emulator repeats the last action (Atari-100k: 0)"""
    evaluate: int = 10
    """episodes played at the end, without noise, and by random actions for comparison"""
    longest: int = 27_000
    """steps after which an evaluation episode is cut (108,000 emulator frames)"""
    seed: int = 0
    """of everything"""
    accelerator: str = "auto"
    """cpu, cuda or auto"""
    quiet: bool = False
    """no progress on the terminal"""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 2, "n_step": 1, "target_every": 1, "hidden": 1, "atoms": 2, "evaluate": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"{low} or more")
        if self.learn_start <= self.n_step or self.capacity < 2 * self.n_step:
            raise ConfigError(
                f"learn_start {self.learn_start} and capacity {self.capacity} with n_step {self.n_step}",
                fix="learn_start above n_step and capacity at least twice of it",
            )
        if self.model == "cnn" and self.frozen:
            raise ConfigError("the cnn has no weights before the agent trains it", fix="--frozen false")


def run(settings: Settings) -> dict[str, Any]:
    """Train, evaluate, write; {"returns" of training episodes, "evaluated", "random", "verdict", "report", ...}."""
    import torch

    from vitkit.rl.games import Game

    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        game = _game(Game, settings, settings.seed)
        agent = build(settings, game.actions)
        started = time.perf_counter()
        curve = train(agent, game, settings)
        seconds = time.perf_counter() - started
        game.close()
        agent.heads.eval()
        evaluated = [play(agent, settings, index) for index in range(settings.evaluate)]
        random = [play(None, settings, index) for index in range(settings.evaluate)]
    found: dict[str, Any] = {
        "env": settings.env,
        "model": settings.model,
        "returns": curve,
        "evaluated": evaluated,
        "random": random,
    }
    found |= {"seconds": round(seconds, 1), "steps": settings.steps}
    from vitkit.rl.rainbow_page import write

    save_agent(agent, settings, game.actions)
    return write(found, settings)


def build(settings: Settings, actions: int) -> Any:
    """A new agent."""
    import torch

    from vitkit import weights
    from vitkit.rl.agent import Agent, Encoder, Heads, SmallCNN

    wanted = settings.accelerator
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    if settings.model == "cnn":
        encoder: Any = SmallCNN(3, settings.size)
    else:
        vit = weights.load(
            settings.model,
            pretrained=settings.pretrained,
            arch_kwargs=settings.arch_kwargs,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            seed=settings.seed,
            say=None,
        )
        if vit.passport.preprocess.in_chans != 3:
            raise ConfigError(
                f"the encoder takes {vit.passport.preprocess.in_chans} channels, an observation has 3 grey frames",
                fix="an encoder pre-trained with frames=3",
            )
        encoder = Encoder(vit)
    encoder.eval()
    encoder.requires_grad_(not settings.frozen)
    low, high = settings.returns
    heads = Heads(
        encoder.dim, actions, hidden=settings.hidden, atoms=settings.atoms, low=low, high=high, sigma=settings.sigma
    )
    return Agent(encoder.to(device), heads.to(device).train())


def train(agent: Any, game: Any, settings: Settings) -> list[tuple[int, float]]:
    """Play and learn; (step, return) of every finished episode."""
    import numpy as np
    import torch

    from vitkit.rl.replay import Replay
    from vitkit.run.progress import Progress

    s, frozen = settings, settings.frozen
    shape, dtype = ((agent.encoder.dim,), np.float32) if frozen else ((s.size, s.size), np.uint8)
    replay = Replay(
        min(s.capacity, s.steps), shape, dtype, stack=1 if frozen else 3, steps=s.n_step, gamma=s.gamma, seed=s.seed
    )
    target = copy.deepcopy((agent.encoder, agent.heads))
    params = [p for p in (*agent.encoder.parameters(), *agent.heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=s.lr, eps=1.5e-4)
    curve, score, over, frame, updates = [], 0.0, True, None, 0
    with Progress(s.steps, 1, steps_per_epoch=s.steps, quiet=s.quiet) as progress:
        for step in range(s.steps):
            if over:
                frame = game.reset()
                agent.begin()
            agent.see(frame)
            item = agent.feature()[0].cpu().numpy() if frozen else frame
            action = agent.act()
            frame, reward, lost, over = game.step(action)
            score += reward
            replay.add(item, action, float(np.clip(reward, -1, 1)), lost)
            if over:
                curve.append((step + 1, score))
                score = 0.0
            if step + 1 >= s.learn_start:
                beta = 0.4 + 0.6 * step / s.steps
                loss = learn(agent, target, replay, optimizer, s, beta)
                updates += 1
                if updates % s.target_every == 0:
                    for old, new in zip(target, (agent.encoder, agent.heads), strict=True):
                        old.load_state_dict(new.state_dict())
                progress.step(loss=loss)
            progress.step(images=1)
    return curve


def learn(agent: Any, target: Any, replay: Any, optimizer: Any, settings: Settings, beta: float) -> float:
    """One update on one batch of transitions; its mean loss."""
    import torch

    from vitkit.rl.agent import project

    s, heads = settings, agent.heads
    device = heads.support.device
    drawn = replay.sample(s.batch_size, beta)
    now, later = (torch.from_numpy(x).to(device) for x in (drawn.now, drawn.later))
    rewards, discount, weights = (
        torch.from_numpy(x).float().to(device) for x in (drawn.rewards, drawn.discount, drawn.weights)
    )
    actions = torch.from_numpy(drawn.actions).to(device)
    with torch.no_grad():
        seen = later[:, 0] if s.frozen else agent.encoder(later)
        best = heads.returns(seen).argmax(1)
        theirs = seen if s.frozen else target[0](later)
        ahead = target[1](theirs).exp()[torch.arange(len(best)), best]  # (B, atoms)
        wanted = project(rewards, discount, ahead, heads.support)
    logs = heads(now[:, 0] if s.frozen else agent.encoder(now))[torch.arange(len(actions)), actions]
    errors = -(wanted * logs).sum(1)
    loss = (weights * errors).mean()
    if not torch.isfinite(loss):
        raise TrainingError("non-finite loss of the agent, before the optimiser step", fix="a lower lr")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 10.0)
    optimizer.step()
    replay.update(drawn.rows, errors.detach().cpu().numpy())
    return float(loss.detach())


def play(agent: Any, settings: Settings, index: int) -> float:
    """The return of one evaluation episode; by random actions without an agent."""
    from vitkit.rl.games import Game

    game = _game(Game, settings, 10_000 + 100 * settings.seed + index)
    frame, score = game.reset(), 0.0
    if agent is not None:
        agent.begin()
    for _ in range(settings.longest):
        if agent is None:
            action = int(game.random.integers(game.actions))
        else:
            agent.see(frame)
            action = agent.act()
        frame, reward, _, over = game.step(action)
        score += reward
        if over:
            break
    game.close()
    return score


def _game(kind: Any, settings: Settings, seed: int) -> Any:
    return kind(settings.env, seed=seed, size=settings.size, skip=settings.skip, sticky=settings.sticky, noops=30)


def save_agent(agent: Any, settings: Settings, actions: int) -> None:
    """Encoder and heads with the settings, so that `load_agent` gives the player back."""
    from pathlib import Path

    from vitkit import weights
    from vitkit.run.files import atomic_write

    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"heads.{k}": v for k, v in agent.heads.state_dict().items()}
    if settings.model == "cnn":
        state |= {f"encoder.{k}": v for k, v in agent.encoder.state_dict().items()}
    else:
        weights.save_run(folder / "encoder", agent.encoder.vit)
    weights.save_state(folder / "agent.safetensors", {k: v.detach().cpu().contiguous() for k, v in state.items()})
    atomic_write(folder / "agent.json", json.dumps({**asdict(settings), "actions": actions}, indent=1) + "\n")


def load_agent(run: str) -> Any:
    """The player that a finished run left, without noise."""
    from dataclasses import replace
    from pathlib import Path

    from vitkit import weights

    folder = Path(run)
    if not (folder / "agent.json").is_file():
        raise ConfigError(
            f"{run} is no run of vitkit rl rainbow: there is no agent.json", fix="the --out of a finished one"
        )
    said = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
    actions = said.pop("actions")
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in said.items()})
    if settings.model != "cnn":
        settings = replace(
            settings, model=str(folder / "encoder"), arch_kwargs=None, pretrained=True, image_size=None, patch_size=None
        )
    agent = build(settings, actions)
    state = weights.read_state(folder / "agent.safetensors")[0]
    agent.heads.load_state_dict({k.removeprefix("heads."): v for k, v in state.items() if k.startswith("heads.")})
    if settings.model == "cnn":
        agent.encoder.load_state_dict(
            {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        )
    agent.heads.eval()
    return agent
