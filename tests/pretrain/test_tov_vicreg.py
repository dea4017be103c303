"""TOV-VICReg beside parity: exact covariance, batches, splitting over processes, and the public verb on drawn streams."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

import vitkit
from vitkit.errors import ConfigError, DataError, TrainingError, WeightsError
from vitkit.parts import vicreg
from vitkit.pretrain.tov_vicreg import ORDERS, Settings, TOVVICReg

TINY = {
    "model": "vit_tiny_patch16_224", "pretrained": False, "arch_kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    "image_size": 16, "patch_size": 8, "mlp": "16-8", "workers": 0, "quiet": True, "optimizer": "sgd", "lr": 0.01,
}  # fmt: skip


def vit(size: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": size, "patch_size": 8, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **kwargs)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = {
        key: torch.randn(count, 3, 16, 16, generator=generator) for key in ("image", "image_y", "image_z", "image_w")
    }
    return {**views, "seed": torch.randint(0, 2**60, (count,), generator=generator)}


def ball(frames: int = 60, side: int = 20) -> np.ndarray:
    """uint8 (T, side, side): a square that moves by a pixel a frame."""
    stream = np.full((frames, side, side), 40, np.uint8)
    for t in range(frames):
        stream[t, 6:12, t % (side - 5) : t % (side - 5) + 5] = 220
    return stream


@pytest.fixture
def streams(tmp_path):
    path = tmp_path / "streams.npz"
    np.savez(path, ball=ball(), blink=ball()[::-1])
    return path


# ---- the terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (9, 9), (2, 6)], ids=str)
def test_covariance_is_exact_in_value_and_gradient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    centred = vicreg.centred(x)
    matrix = centred.T @ centred / (shape[0] - 1)
    want = (matrix.square().sum() - matrix.diagonal().square().sum()) / shape[1]
    (theirs,) = torch.autograd.grad(want, x)
    found = vicreg.covariance(vicreg.centred(x))
    (ours,) = torch.autograd.grad(found, x)
    assert torch.allclose(found, want, rtol=1e-12) and torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_the_small_matrix_agrees_with_lightly():
    from lightly.loss import VICRegLoss

    a, b = (torch.randn(16, 200, requires_grad=True) for _ in range(2))
    theirs = VICRegLoss(lambda_param=0.0, mu_param=1.0, nu_param=1.0)(a, b)
    x, y = vicreg.centred(a), vicreg.centred(b)
    ours = 0.5 * (vicreg.variance(x) + vicreg.variance(y)) + vicreg.covariance(x) + vicreg.covariance(y)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    want = torch.autograd.grad(theirs, (a, b))
    for mine, other in zip(torch.autograd.grad(ours, (a, b)), want, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-7)


def test_terms_are_float32_under_autocast():
    x = 300 * torch.randn(8, 64)  # squares of half-precision covariances would overflow
    with torch.autocast("cpu", torch.bfloat16):
        z = vicreg.centred(x.bfloat16())
        found = vicreg.covariance(z)
        assert (
            z.dtype == found.dtype == vicreg.variance(z).dtype == vicreg.invariance(x, x.half()).dtype == torch.float32
        )
    assert torch.allclose(found, vicreg.covariance(z))


def test_spread_counts_directions():
    line = torch.randn(50, 1) @ torch.randn(1, 12)
    assert float(vicreg.spread(line)[1]) == pytest.approx(1, abs=1e-3)
    deviation, used = vicreg.spread(torch.randn(4000, 12))
    assert float(deviation) == pytest.approx(1, abs=0.05) and float(used) > 11.5


# ---- the method ------------------------------------------------------------------------------------------------------


def test_neighbours_skip_the_projector_unless_asked():
    found = {}
    for asked in (False, True):
        torch.manual_seed(0)
        method = TOVVICReg(vit(), Settings(mlp="16-8", project_neighbours=asked)).train()
        found[asked] = float(method(batch())["loss"].detach()), int(method.projector[1].num_batches_tracked)
    assert found[False][0] == found[True][0]  # the loss reads neither
    assert (found[False][1], found[True][1]) == (2, 4)


def test_four_passes_give_what_one_batch_gives():
    method, views = TOVVICReg(vit(), Settings(mlp="16-8")).eval(), batch()
    apart = [method.represent(views[key]) for key in ("image", "image_y", "image_z", "image_w")]
    together = method.represent(torch.cat([views[key] for key in ("image", "image_y", "image_z", "image_w")]))
    assert torch.allclose(torch.cat(apart), together, atol=1e-6)


def test_orders_are_uniform_and_a_function_of_the_sample():
    method = TOVVICReg(vit(), Settings(mlp="8"))
    seeds = torch.randint(0, 2**62, (6000,), generator=torch.Generator().manual_seed(0))
    drawn = method.orders({"image": torch.zeros(6000), "seed": seeds})
    assert torch.equal(drawn, method.orders({"image": torch.zeros(6000), "seed": seeds}))
    assert torch.bincount(drawn, minlength=6).sub(1000).abs().max() < 120
    three = torch.eye(3)[:, None].repeat(1, 6, 8)  # x, z, w as marks
    logit, changed = method.temporal(*three, torch.arange(6))
    assert changed.tolist() == [0, 1, 1, 1, 1, 1] and logit.shape == (6,) and ORDERS[0] == (0, 1, 2)


def test_losses_are_finite_for_one_left_over_in_evaluation_only():
    method = TOVVICReg(vit(), Settings(mlp="16-8"))
    one = {key: value[:1] for key, value in batch().items()}
    with torch.no_grad():
        assert all(bool(value.isfinite()) for value in method.eval()(one).values())
    with pytest.raises(ConfigError, match="this batch has 1\n  fix: batch_size 2 or more"):
        method.train()(one)


def test_a_batch_without_neighbours_is_refused():
    with pytest.raises(ConfigError, match="a batch without image_y"):
        TOVVICReg(vit(), Settings(mlp="8"))({"image": torch.zeros(2, 3, 16, 16)})


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"mlp": "64-x"}, r"mlp is '64-x'\n  fix: widths joined by"),
        ({"cov_coeff": -1.0}, r"cov_coeff is -1\n  fix: 0 or more"),
        ({"frames": 0}, r"frames is 0\n"),
        ({"colour": True}, r"photometric=stacked takes the frames of an observation for colours"),
        ({"photometric": "grey"}, r"photometric is 'grey'\n  fix: one of: stacked, frame"),
        ({"frames": 4}, r"photometric=stacked needs 3 channels, observations of 4 grey frames have 4"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)


def test_heads_go_on_from_a_checkpoint_where_they_fit():
    method = TOVVICReg(vit(), Settings(mlp="16-8"))
    twin = TOVVICReg(vit(), Settings(mlp="16-8"))
    assert "go on from the checkpoint" in twin.adopt(method.extras())
    assert all(torch.equal(value, twin.extras()[name]) for name, value in method.extras().items())
    said = TOVVICReg(vit(), Settings(mlp="32-8")).adopt(method.extras())
    assert said == "the checkpoint's projector (16-8) is not 32-8: projector and temporal head start anew"
    with pytest.raises(WeightsError, match=r"no heads of TOV-VICReg: \d+ tensors missing"):
        twin.load_official({})


# ---- the verb --------------------------------------------------------------------------------------------------------


def test_pretraining_on_streams_end_to_end(streams, tmp_path):
    out = tmp_path / "run"
    run = vitkit.pretrain("tov_vicreg", data=streams, out=out, batch_size=8, epochs=2, max_steps=5, **TINY)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = {
        "invariance",
        "variance",
        "covariance",
        "temporal",
        "temporal_accuracy",
        "embedding_std",
        "dimensions_in_use",
    }
    assert names <= set(records[0]) and np.isfinite(run.metrics["held-out loss"])
    loaded = vitkit.load(out, say=None).vit
    assert "temporal_order_predictor.0.weight" in loaded.extras and loaded.extras["projector.0.weight"].shape == (
        16,
        24,
    )
    said = []
    again = {**TINY, "model": str(out)}
    for key in ("arch_kwargs", "pretrained", "image_size", "patch_size"):
        again.pop(key)
    vitkit.pretrain("tov_vicreg", data=streams, out=tmp_path / "more", batch_size=8, epochs=1, max_steps=1, **again)
    assert not said and (tmp_path / "more" / "report.html").is_file()


def test_two_processes_equal_one_with_the_double_batch(streams, tmp_path):
    """Projector statistics, covariance and all: representations are gathered before the projector."""
    base = {**TINY, "data": streams, "epochs": 1, "max_steps": 3, "seed": 3}
    one = vitkit.pretrain("tov_vicreg", out=tmp_path / "one", batch_size=8, **base)
    two = vitkit.pretrain("tov_vicreg", out=tmp_path / "two", batch_size=4, devices=2, **base)
    a, b = (vitkit.load(run.path, say=None).vit for run in (one, two))
    for name, value in {**a.state_dict(), **a.extras}.items():
        other = {**b.state_dict(), **b.extras}[name]
        assert torch.allclose(value.float(), other.float(), atol=2e-5), name


def test_wrong_channels_and_tables_are_refused(streams, tmp_path):
    common = {**TINY, "data": streams, "out": tmp_path / "run", "batch_size": 4, "epochs": 1}
    with pytest.raises(ConfigError, match=r"the model takes 3 channels, observations have 2 \(2 frames\)"):
        vitkit.pretrain("tov_vicreg", **common, frames=2, photometric="frame")
    with pytest.raises(ConfigError, match=r"columns were named \(label\), but streams have none"):
        vitkit.pretrain("tov_vicreg", **common, label_columns=("label",))


def test_a_batch_of_one_is_refused_by_the_verb(streams, tmp_path):
    with pytest.raises(ConfigError, match="this batch has 1"):
        vitkit.pretrain("tov_vicreg", data=streams, out=tmp_path / "run", batch_size=1, epochs=1, **TINY)


def test_nan_stops_before_the_step(streams, tmp_path, monkeypatch):
    real = TOVVICReg.represent
    monkeypatch.setattr(TOVVICReg, "represent", lambda self, images: real(self, images) * float("nan"))
    with pytest.raises(TrainingError, match="non-finite loss at step 0, before the optimiser step"):
        vitkit.pretrain("tov_vicreg", data=streams, out=tmp_path / "run", batch_size=8, epochs=1, **TINY)


def test_short_streams_are_refused_by_the_verb(tmp_path):
    np.savez(tmp_path / "short.npz", a=ball(8))
    with pytest.raises(DataError, match=r"1 stream shorter than three observations of 3 frames: a \(8\)"):
        vitkit.pretrain("tov_vicreg", data=tmp_path / "short.npz", out=tmp_path / "run", epochs=1, **TINY)
