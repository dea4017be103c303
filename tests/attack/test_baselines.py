"""Baselines: each does to the features what it says, within the same budget, from the same starts."""

from __future__ import annotations

import sys

import pytest
import torch

from vitkit import tokens, weights
from vitkit.attack import baselines
from vitkit.attack.dta import DTA, Settings, features
from vitkit.attack.encoder import normaliser
from vitkit.errors import ConfigError, DataError, MissingExtra

from ..test_tokens import make
from .test_dta import EPS, pixels

SETTINGS = Settings(eps=EPS, steps=5)


def tokens_at(vit, x: torch.Tensor, block: int) -> torch.Tensor:
    with torch.no_grad():
        return features(vit, normaliser(vit)(x), (block,))[0]


@pytest.mark.parametrize("name", baselines.ENCODER_ATTACKS)
def test_budget_range_and_repeatability(name):
    vit, x = make("plain"), pixels()
    one, two = (baselines.encoder_attack(name, vit, x, SETTINGS, torch.arange(4)) for _ in range(2))
    assert torch.equal(one, two) and (one - x).abs().max() <= EPS + 1e-6
    assert one.min() >= 0 and one.max() <= 1 and not torch.equal(one, x)
    assert all(p.requires_grad for p in vit.parameters())


def test_each_moves_what_it_names():
    vit, x = make("plain"), pixels()
    noisy = baselines.noise(x, SETTINGS)
    made = {name: baselines.encoder_attack(name, vit, x, SETTINGS) for name in baselines.ENCODER_ATTACKS}
    energy = lambda p, block: tokens_at(vit, p, block).square()  # noqa: E731
    assert energy(made["l4a"], 0).mean() > energy(noisy, 0).mean()
    far = lambda p: (energy(p, 2) - energy(x, 2)).square().mean()  # noqa: E731
    assert far(made["ssp"]) > 2 * far(noisy)
    assert tokens_at(vit, made["std"], 2).flatten(1).std(1).mean() < tokens_at(vit, noisy, 2).flatten(1).std(1).mean()
    fired = lambda p: sum((energy(p, b).sum((1, 2)) / 2).log().mean() for b in range(3))  # noqa: E731
    assert fired(made["fff"]) > fired(noisy)


def test_costs_by_hand():
    vit, x = make("plain"), pixels(2)
    f = [tokens_at(vit, x, block) for block in range(3)]
    prepare = normaliser(vit)
    other = baselines.noise(x, SETTINGS)
    g = [tokens_at(vit, other, block) for block in range(3)]
    costs = {name: make_cost(vit, prepare, x)(other) for name, make_cost in baselines.COSTS.items()}
    assert torch.allclose(costs["l4a"], -(g[0] ** 2).flatten(1).mean(1))
    assert torch.allclose(costs["ssp"], -((g[2] ** 2 - f[2] ** 2) ** 2).flatten(1).mean(1))
    assert torch.allclose(costs["std"], g[2].flatten(1).std(1))  # block 3, or the last of a shallower encoder
    assert torch.allclose(costs["fff"], -sum((one.flatten(1).norm(dim=1) ** 2 / 2).log() for one in g))


def test_starts_are_those_of_dta():
    """Zero steps apart, every attack begins at the same image: differences come from the cost."""
    from vitkit.attack.pgd import uniform

    x, seeds = pixels(), torch.tensor([3, 1, 4, 1])
    seen = []

    def spy(images):
        seen.append(images.detach().clone())
        return images.flatten(1).sum(1)

    from vitkit.attack.pgd import sign_descent

    sign_descent(spy, x, eps=EPS, steps=1, step_size=EPS / 4, seeds=seeds)
    assert torch.equal(seen[0], (x + EPS * uniform(x, seeds)).clamp(0, 1))


def downstream():
    vit = weights.load("vit_tiny_patch16_224", pretrained=False, image_size=32, arch_kwargs={"depth": 2}, say=None)
    vit.reset_classifier(3)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    return vit.eval()


def test_white_box_is_torchattacks_in_pixels():
    import torchattacks

    vit, x = downstream(), pixels(6, (32, 32))
    normalise = vit.passport.preprocess.normalise
    labels = tokens.logits(vit, normalise(x)).argmax(1)
    state = torch.get_rng_state()
    for name in baselines.WHITE_BOX:
        made = baselines.white_box(name, vit, x, labels, SETTINGS, seed=3)
        assert (made - x).abs().max() <= EPS + 1e-6 and made.min() >= 0 and made.max() <= 1
        before, after = (torch.nn.functional.cross_entropy(tokens.logits(vit, normalise(p)), labels) for p in (x, made))
        assert after > before
    assert torch.equal(torch.get_rng_state(), state)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit

        def forward(self, p):
            return self.vit(normalise(p))

    want = torchattacks.MIFGSM(Whole(), eps=EPS, alpha=EPS / 4, steps=5)(x, labels)
    assert torch.allclose(made, want)


def test_under_inference_mode_and_in_half_precision():
    vit, x, labels = make("plain"), pixels(2), torch.tensor([0, 1])
    wanted = baselines.white_box("pgd", vit, x, labels, SETTINGS)
    with torch.inference_mode():
        found = baselines.white_box("pgd", vit, pixels(2), torch.tensor([0, 1]), SETTINGS)
    assert torch.equal(found, wanted)
    for name in baselines.ENCODER_ATTACKS:
        found = baselines.encoder_attack(name, make("plain").to(torch.bfloat16), x, SETTINGS)
        assert found.dtype == torch.float32 and (found - x).abs().max() <= SETTINGS.eps + 1e-6


def test_errors():
    vit, x = make("plain"), pixels()
    with pytest.raises(ConfigError, match="there is no attack 'uap' on an encoder\n  fix: one of: l4a, ssp, std, fff"):
        baselines.encoder_attack("uap", vit, x)
    with pytest.raises(ConfigError, match="no white-box attack 'cw'"):
        baselines.white_box("cw", vit, x, torch.zeros(4), SETTINGS)
    with pytest.raises(DataError, match=r"works on pixels in \[0, 1\]"):
        baselines.noise(x * 3, SETTINGS)


def test_without_torchattacks_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(
        MissingExtra, match=r"needs the package 'torchattacks'.*\n  fix: pip install 'vitkit\[attack\]'"
    ):
        baselines.white_box("pgd", make("plain"), pixels(), torch.zeros(4), SETTINGS)


def test_dta_leaves_less_similarity_than_any_baseline():
    vit, x = make("plain"), pixels(6)
    attack = DTA(vit, Settings(eps=EPS, steps=5, layer=2))
    inner = attack.cost(x)

    def cost(p):
        return inner(p).detach()

    left = {
        name: float(cost(baselines.encoder_attack(name, vit, x, SETTINGS)).mean()) for name in ("l4a", "ssp", "std")
    }
    assert float(cost(attack(x)).mean()) < min(*left.values(), float(cost(baselines.noise(x, SETTINGS)).mean()))
