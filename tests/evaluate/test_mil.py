"""Slide heads, stacked training, protocols and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from vitkit.errors import ConfigError, DataError, TrainingError, WeightsError
from vitkit.evaluate.mil import ensemble, inference, protocols, survival, train
from vitkit.evaluate.mil.bags import Bags, collate
from vitkit.evaluate.mil.train import HEADS, Job, Recipe, fit

DIM = 6
SMALL = {
    "abmil": {"dim": 8},
    "chowder": {"n_top": 3, "n_bottom": 2, "tiles_hidden": (5,), "hidden": (6,)},
    "dsmil": {"queries": 4, "scores_hidden": (5,), "queries_hidden": (5,), "hidden": (5,)},
    "hipt": {"dim": 12},
    "max": {},
    "mean": {"hidden": (5,)},
    "transmil": {"dim": 8, "heads": 2, "nystrom": {"landmarks": 4, "kernel": 3}},
}


def slides(n=40, seed=0, tiles=(3, 9), classes=2, per_patient=2, survival_times=False, prefix="s") -> Bags:
    """Bags whose label is which of the first features stands out in one tile."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // per_patient % classes
    bags = []
    for label in labels:
        x = rng.normal(size=(rng.integers(*tiles), DIM)).astype(np.float32)
        x[rng.integers(len(x)), label] += 6
        bags.append(torch.from_numpy(x))
    patients = [f"{prefix}p{i // per_patient}" for i in range(n)]
    y = np.where(rng.random(n) < 0.7, 1.0, -1.0) * (5 - 4 * labels + rng.random(n)) if survival_times else labels
    return Bags.of(bags, y, patients=patients, names=[f"{prefix}{i}" for i in range(n)])


def heads(outputs=1):
    torch.manual_seed(0)
    return {name: HEADS[name](DIM, outputs, **options).eval() for name, options in SMALL.items()}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", HEADS)
def test_a_bag_alone_and_padded_in_a_batch_gives_the_same_logits_whatever_the_padding_holds(name, outputs):
    head = heads(outputs)[name]
    bags = [torch.randn(n, DIM) for n in (2, 7, 4)]
    x, mask = collate(bags)
    with torch.no_grad():
        alone = torch.cat([head(bag.unsqueeze(0)) for bag in bags])
        assert alone.shape == (3, outputs)
        x[mask] = 1e3 * torch.randn(int(mask.sum()), DIM)
        together = head(x, mask)
        assert torch.allclose(alone, together, atol=1e-6, rtol=1e-5)
        assert torch.equal(head(x, mask.unsqueeze(-1)), together)


@pytest.mark.parametrize("name", ["abmil", "chowder", "dsmil", "hipt"])
def test_tile_weights_sum_to_one_and_leave_padding_out(name):
    head = heads()[name]
    x, mask = collate([torch.randn(n, DIM) for n in (2, 7)])
    with torch.no_grad():
        weights = head.tile_weights(x, mask)
    assert weights.shape == (2, 7) and torch.allclose(weights.sum(1), torch.ones(2), atol=1e-6)
    assert not weights[mask].any()


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("transmil", "hipt")])
def test_the_order_of_tiles_does_not_matter_and_gradients_reach_every_used_weight(name):
    head, x = heads()[name], torch.randn(2, 6, DIM)
    assert torch.allclose(head(x), head(x.flip(1)), atol=1e-6)
    head(x).sum().backward()
    unused = {n for n, p in head.named_parameters() if p.grad is None}
    assert all(n.startswith("tiles_values") for n in unused)


@pytest.mark.parametrize("name", HEADS)
def test_real_tiles_only_give_the_logits_of_padded_bags(name):
    head, bags = heads()[name], slides(5, tiles=(2, 9))
    places = bags.places(np.arange(5))
    x, at = bags.flat(places)
    assert len(x) == bags.lengths.sum() and torch.equal(at < 0, places < 0)
    with torch.no_grad():
        assert torch.allclose(head.flat(x, at), head(*bags.batch(places)), atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_slides_that_are_pooled_once_train_to_the_same_weights(name, monkeypatch):
    bags = slides()
    jobs = protocols._jobs(bags, Recipe(head=name, options=SMALL[name], epochs=3, batch_size=8, lr=1e-2), 2, (0,))
    once = fit(bags, jobs)
    monkeypatch.setattr(train, "_pooling", lambda *_: None)
    for a, b in zip(once, fit(bags, jobs), strict=True):
        assert all(torch.allclose(a.state[k], b.state[k], atol=1e-5) for k in a.state)
        np.testing.assert_allclose(a.curve, b.curve)


def test_the_heads_of_the_sheet():
    assert sum(p.numel() for p in HEADS["abmil"](1024, 1).parameters()) == 164_482
    x = torch.randn(1, 4, 3 + DIM)
    head = HEADS["abmil"](DIM, 1, metadata_cols=3)
    moved = x.clone()
    moved[..., :3] += 100
    assert torch.equal(head(x), head(moved))
    with pytest.raises(ConfigError, match="sigmoid"):
        HEADS["abmil"](DIM, hidden=(4,), act="sigmiod")
    with pytest.raises(ConfigError, match="use abmil"):
        HEADS["mean"](DIM).tile_weights(x)


def test_original_transmil_depends_on_padding_and_ours_does_not():
    torch.manual_seed(0)
    head = HEADS["transmil"](DIM, dim=8, heads=2, per_bag=False).eval()
    bag = torch.randn(1, 3, DIM)
    padded, mask = collate([bag[0], torch.randn(9, DIM)])
    with torch.no_grad():
        assert not torch.allclose(head(padded, mask)[:1], head(bag), atol=1e-4)


# ---------------------------------------------------------------- training


def moot(recipe, bags):
    """Biases that shift all tiles of a softmax, or all risks or classes: no gradient but rounding, which Adam blows up."""
    shared = bags.survival or (recipe.head == "chowder" and bags.outputs > 1)
    biases = [key for key in recipe.build(bags, 0).state_dict() if key.endswith("bias")]
    ends = [[key for key in biases if key.startswith(start)][-1:] for start in ("mlp.", "tiles_scores.")]
    return {"attention_layer.w.bias", *(end for part in ends for end in part if shared)}


@pytest.mark.parametrize("kind", ["two classes", "three classes", "survival"])
@pytest.mark.parametrize("name", ["abmil", "chowder", "dsmil", "mean", "max"])
def test_many_models_together_equal_one_by_one(name, kind):
    bags = slides(42, classes=3 if kind == "three classes" else 2, survival_times=kind == "survival")
    recipe = Recipe(head=name, options=SMALL[name], lr=1e-2, weight_decay=1e-3, batch_size=8, epochs=3, n_tiles=5)
    jobs = protocols._jobs(bags, recipe, 3, (0, 1))
    one, many = fit(bags, jobs, together=False, keep="best"), fit(bags, jobs, keep="best")
    assert len(one) == 6
    for a, b in zip(one, many, strict=True):
        assert a.epochs == b.epochs
        np.testing.assert_allclose(a.curve, b.curve, atol=1e-6)
        for key in a.state:
            if key not in moot(recipe, bags):
                assert torch.allclose(a.state[key], b.state[key], atol=2e-5, rtol=1e-4), key


def test_stacking_in_parts_that_fit_into_memory_changes_nothing(monkeypatch):
    bags = slides()
    jobs = protocols._jobs(bags, Recipe(options=SMALL["abmil"], epochs=2, batch_size=8), 4, (0,))
    whole = fit(bags, jobs)
    monkeypatch.setattr(train, "_BYTES", (4 * 8 * 8 * DIM * 2,) * 2)
    assert len(list(train._groups(bags, jobs, True, torch.device("cpu")))) > 1
    for a, b in zip(whole, fit(bags, jobs), strict=True):
        keys = a.state.keys() - moot(jobs[0].recipe, bags)
        assert all(torch.allclose(a.state[k], b.state[k], atol=2e-5) for k in keys)


@pytest.mark.parametrize("name", ["hipt", "transmil"])
def test_heads_that_cannot_be_stacked_train_one_by_one(name):
    bags = slides(16)
    recipe = Recipe(head=name, options=SMALL[name], epochs=2, batch_size=4)
    found = protocols.cross_validate(bags, recipe, k=2, seeds=(0,))
    assert np.isfinite(found.ensemble.scores(bags)).all()
    again = protocols.cross_validate(bags, recipe, k=2, seeds=(0,))
    assert np.array_equal(found.ensemble.scores(bags), again.ensemble.scores(bags))


def test_adam_recipe_learns_and_the_best_epoch_is_the_first_of_equals():
    bags = slides(60)
    rows = np.arange(60)
    job = Job(rows[:40], 0, Recipe(options={"dim": 16}, lr=1e-2, epochs=30), rows[40:])
    best = fit(bags, [job], keep="best")[0]
    assert best.curve.max() > 0.95 and best.epochs == int(np.argmax(best.curve)) + 1
    head = train.module(bags, 1, best)
    logits = torch.stack([head(bags.tiles(i).unsqueeze(0))[0] for i in rows[40:]])
    value = inference.score(bags.labels[40:], logits.detach().numpy())
    assert value == pytest.approx(best.curve.max())


def test_a_loss_that_is_not_finite_stops():
    huge = Bags.of([torch.full((2, DIM), 3e38) for _ in range(16)], np.arange(16) % 2)
    with pytest.raises(TrainingError, match="smaller lr"):
        fit(huge, [Job(np.arange(16), 0, Recipe(head="mean", epochs=2))])


def test_recipes_name_what_is_wrong():
    with pytest.raises(ConfigError, match="abmil"):
        Recipe(head="abmill")
    with pytest.raises(ConfigError, match="above 0"):
        Recipe(n_tiles=0)


# ---------------------------------------------------------------- protocols


def test_patients_never_straddle_folds_and_every_slide_is_held_out_once():
    bags = slides(60, per_patient=3)
    for seed in range(5):
        held = []
        for train_rows, val in protocols.folds(bags, 5, seed):
            assert not {*bags.patients[train_rows]} & {*bags.patients[val]}
            assert len(np.unique(bags.labels[val])) == 2
            held += val.tolist()
        assert sorted(held) == list(range(60))


def test_folds_that_cannot_be():
    bags = Bags.of([torch.randn(2, DIM)] * 8, [0, 0, 0, 0, 0, 0, 1, 1], patients=[0, 1, 2, 3, 4, 5, 6, 6])
    with pytest.raises(DataError, match="'1' has slides of 1 patients"):
        protocols.folds(bags, 2)
    one = Bags.of([torch.randn(2, DIM)] * 8, [0] * 8, classes=["a", "b"])
    with pytest.raises(DataError, match="'b' has slides of 0 patients"):
        protocols.folds(one, 2)


def test_nested_trains_e_plus_one_epochs_and_ignores_the_held_out_labels():
    bags = slides(48)
    recipes = [Recipe(options={"dim": 8}, lr=lr, epochs=3, batch_size=8) for lr in (1e-2, 1e-3)]
    found = protocols.nested(bags, recipes, outer=3, inner=3)
    assert len(found.each) == 3 and found.interval.n == 24
    train_rows, held = protocols.folds(bags, 3, 0)[0]
    curves = [
        np.mean([t.curve for t in fit(bags, protocols._jobs(bags, r, 3, (0,), train_rows))], axis=0) for r in recipes
    ]
    best = int(np.argmax([c.max() for c in curves]))
    recipe, epochs = found.chosen[0]
    assert recipe == recipes[best] and epochs == int(np.argmax(curves[best])) + 1
    final = fit(bags, [Job(train_rows, 500, recipe, epochs=epochs)])
    scores = ensemble.ensemble_of(bags, final).scores(bags.subset(held))
    np.testing.assert_allclose(found.scores[held], scores, atol=1e-5)
    assert fit(bags, [Job(train_rows, 500, recipe, epochs=1)])[0].epochs == 1


def test_nothing_is_selected_on_the_external_cohort():
    dev, test = slides(40), slides(20, seed=1, prefix="t")
    recipe = Recipe(options={"dim": 8}, lr=1e-2, epochs=4)
    turned = Bags.of([test.tiles(i) for i in range(20)], 1 - test.labels, patients=test.patients, names=test.names)
    a = protocols.external(dev, test, recipe, k=2, seeds=(0, 1))
    b = protocols.external(dev, turned, recipe, k=2, seeds=(0, 1))
    assert np.array_equal(a.scores, b.scores)
    assert a.ensemble.value == pytest.approx(1 - b.ensemble.value)
    assert a.ensemble.n == 10  # patients, not slides, are redrawn


def test_slides_of_a_patient_in_both_cohorts_are_refused():
    dev = slides(20)
    with pytest.raises(DataError, match=r"10 patients are in the development and"):
        protocols.require_apart(dev, slides(20, seed=1))


def test_an_encoder_against_itself_is_no_different_and_a_worse_one_is():
    dev, test = slides(40), slides(40, seed=1, prefix="t")
    recipe = Recipe(options={"dim": 8}, lr=1e-2, epochs=10)
    same = protocols.compare_encoders(dev, dev, {"x": (test, test), "y": (test, test)}, recipe, k=2, seeds=(0,))
    assert same.cohorts["x"].p == 1 and same.cohorts["x"].value == 0 and same.p == 1

    def noise(bags):
        rng = torch.Generator().manual_seed(0)
        made = [torch.randn(len(bags.tiles(i)), DIM, generator=rng) for i in range(len(bags))]
        order = np.random.default_rng(0).permutation(len(bags))  # found by name, not by place
        return Bags.of(
            [made[i] for i in order],
            bags.labels[order],
            patients=bags.patients[order],
            names=[bags.names[i] for i in order],
        )

    other = protocols.compare_encoders(dev, noise(dev), {"x": (test, noise(test))}, recipe, k=2, seeds=(0,))
    assert other.cohorts["x"].value > 0.2 and other.p < 0.05
    with pytest.raises(DataError, match="same slides"):
        protocols.compare_encoders(dev, test, {}, recipe)


def test_an_ensemble_is_the_mean_of_its_members_and_survives_its_file(tmp_path):
    bags = slides(24)
    found = protocols.cross_validate(bags, Recipe(options={"dim": 8}, epochs=2), k=2, seeds=(0, 1)).ensemble
    members = found.member_scores(bags)
    assert members.shape == (4, 24, 1)
    np.testing.assert_allclose(found.scores(bags), members.mean(0))
    single = [ensemble.ensemble_of(bags, [m]).scores(bags) for m in found.members]
    np.testing.assert_allclose(members, np.stack(single), atol=1e-6)
    again = ensemble.Ensemble.load(found.save(tmp_path / "heads.safetensors"))
    assert np.array_equal(again.scores(bags), found.scores(bags))
    weights = again.attention(bags.tiles(0))
    assert len(weights) == len(bags.tiles(0)) and weights.sum() == pytest.approx(1)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError, match="not a file of slide heads"):
        ensemble.Ensemble.load(tmp_path / "x.safetensors")
    other = Bags.of([torch.randn(2, DIM + 1)], [1])
    with pytest.raises(ConfigError, match="same encoder"):
        found.scores(other)


# ---------------------------------------------------------------- statistics


def test_basic_interval_equals_resampling_with_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 30)
    score = np.round(rng.normal(size=30) + y, 1)  # with ties
    draws = rng.integers(0, 30, (300, 30))
    values = [roc_auc_score(y[d], score[d]) for d in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    found, theta = inference.basic_interval(y, score, draws=draws), roc_auc_score(y, score)
    np.testing.assert_allclose([found.value, found.low, found.high], [theta, 2 * theta - high, 2 * theta - low])
    rare = inference.basic_interval(np.array([1, 0, 0, 0]), np.arange(4.0), n=200)
    assert "left out" in rare.note


def test_fisher():
    p = [0.1, 0.2, 0.03]
    assert inference.fisher(p) == pytest.approx(stats.chi2.sf(-2 * np.log(p).sum(), 6))
    with pytest.raises(DataError, match="p-values"):
        inference.fisher([0.1, float("nan")])


def test_concordance_by_pairs_and_with_weights():
    rng = np.random.default_rng(0)
    time = np.round(rng.exponential(size=25) + 0.1, 1) * np.where(rng.random(25) < 0.6, 1, -1)
    risk = np.round(rng.normal(size=25), 1)
    right = pairs = 0.0
    for i in range(25):
        for j in range(25):
            earlier = abs(time[i]) < abs(time[j]) or (abs(time[i]) == abs(time[j]) and time[j] < 0)
            if time[i] > 0 and earlier:
                pairs += 1
                right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    assert survival.concordance(time, risk) == pytest.approx(right / pairs)
    rows = rng.integers(0, 25, 25)
    weights = np.bincount(rows, minlength=25)[:, None].astype(np.float32)
    assert survival._concordance(time, risk, weights)[0] == pytest.approx(survival.concordance(time[rows], risk[rows]))
    with pytest.raises(DataError, match="signed times"):
        survival.concordance(np.array([1.0, 0.0]), np.array([1.0, 2.0]))


def test_cox_loss_by_hand_and_for_many_models_at_once():
    risk = torch.tensor([0.5, -1.0, 0.3, 2.0])
    time = torch.tensor([2.0, 1.0, -2.0, 3.0])  # the censored case leaves with the event at 2, after it

    def at(i, left):
        return risk[i] - torch.logsumexp(risk[left], 0)

    want = -(at(1, [0, 1, 2, 3]) + at(0, [0, 2, 3]) + at(3, [3])) / 4
    assert survival.cox_loss(risk, time) == pytest.approx(float(want))
    both = survival.cox_loss(torch.stack([risk, risk.flip(0)]), torch.stack([time, time.flip(0)]))
    assert torch.allclose(both, want.expand(2))
    assert survival.cox_loss(risk, -time.abs()) == 0
