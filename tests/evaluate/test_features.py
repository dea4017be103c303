"""Features are timm's, in image order; the cache hits without the model, misses after any change; bad files named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit import tokens, weights
from vitkit.data import read
from vitkit.data.transforms import eval_view
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.evaluate import features as module
from vitkit.evaluate import knn, linear
from vitkit.evaluate.features import cache_key, features

SHAPE = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def model(seed=0, **changes):
    kwargs = {"pretrained": False, "patch_size": 8, "image_size": 32, "in_chans": 1, "arch_kwargs": SHAPE}
    return weights.load("vit_tiny_patch16_224", **{**kwargs, **changes}, seed=seed, say=None)


@pytest.fixture
def vit():
    return model()


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures in two classes."""
    rng = np.random.default_rng(0)
    for i in range(11):
        path = tmp_path / "pictures" / ("cat" if i < 5 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 36), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def images(folder):
    return read(str(folder), say=lambda text: None)


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the batches that the model saw."""
    seen, original = [], tokens.feature

    def counted(vit, x):
        seen.append(len(x))
        return original(vit, x)

    monkeypatch.setattr(tokens, "feature", counted)
    return seen


def test_features_are_timms_in_image_order(vit, images):
    x = features(vit, images, batch_size=4)
    view = eval_view(vit.passport.preprocess)
    batch = torch.stack([view(images.decode(i)) for i in range(len(images))])
    with torch.no_grad():
        tokens_ = vit.eval().forward_features(vit.passport.preprocess.normalise(batch))
        expected = vit.forward_head(tokens_, pre_logits=True).numpy()
    assert x.dtype == np.float32 and x.shape == (11, 24)
    assert np.allclose(x, expected, atol=1e-5)
    assert np.allclose(x, features(vit, images, batch_size=11), atol=1e-5)


def test_workers_change_nothing(vit, images):
    assert np.array_equal(features(vit, images, batch_size=4), features(vit, images, batch_size=4, workers=2))


def test_progress_counts_images(vit, images):
    seen = []
    features(vit, images, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_model_threads_and_generators_are_left_as_they_were(vit, images):
    vit.train()
    vit.blocks[0].eval()
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    before = {name: p.clone() for name, p in vit.state_dict().items()}
    features(vit, images)
    assert vit.training and vit.blocks[1].training and not vit.blocks[0].training
    assert all(torch.equal(before[name], p) for name, p in vit.state_dict().items())
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------- the cache


def test_a_hit_is_identical_and_does_not_run_the_model(vit, images, calls, tmp_path):
    first = features(vit, images, cache=tmp_path / "cache")
    assert calls
    calls.clear()
    again = features(vit, images, cache=tmp_path / "cache")
    assert not calls
    assert np.array_equal(first, again) and isinstance(again, np.memmap)
    assert np.array_equal(first, features(vit, images))
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and no half-written file beside it


def test_a_hit_may_be_changed_in_memory_only(vit, images, tmp_path):
    features(vit, images, cache=tmp_path)[:] = 0
    assert np.abs(features(vit, images, cache=tmp_path)).sum() > 0


def test_head_mode_and_batch_do_not_matter_for_the_key(vit, images):
    key = cache_key(vit, images)
    vit.eval()
    assert key == cache_key(vit.train(), images)
    vit.reset_classifier(7)
    assert key == cache_key(vit, images)


def test_weights_make_another_key(vit, images):
    key = cache_key(vit, images)
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    assert key != cache_key(vit, images)
    assert cache_key(model(seed=0), images) == key != cache_key(model(seed=1), images)


def test_settings_that_no_tensor_holds_make_another_key(vit, images):
    key = cache_key(vit, images)
    vit.blocks[0].norm1.eps = 1e-5
    assert key != cache_key(vit, images)
    vit.blocks[0].norm1.eps = 1e-6
    assert key == cache_key(vit, images)
    vit.blocks[0].attn.scale *= 2
    assert key != cache_key(vit, images)


def test_preprocessing_and_feature_make_another_key(vit, images):
    key, passport = cache_key(vit, images), vit.passport
    for change in (
        {"preprocess": replace(passport.preprocess, mean=(0.4,))},
        {"preprocess": replace(passport.preprocess, crop_pct=0.8)},
        {"feature": replace(passport.feature, positions="dinov2")},
    ):
        vit.passport = replace(passport, **change)
        assert key != cache_key(vit, images)
    vit.passport = passport
    assert key == cache_key(vit, images)


def test_data_make_another_key(vit, images, folder):
    key = cache_key(vit, images)
    assert key == cache_key(vit, read(str(folder), say=lambda text: None))
    assert key != cache_key(vit, images.subset([0, 1, 2]))
    path = folder / "cat" / "00.png"
    Image.fromarray(np.zeros((40, 36), np.uint8)).save(path)
    assert key != cache_key(vit, read(str(folder), say=lambda text: None))


@pytest.mark.parametrize("damage", ("truncated", "other shape", "empty", "pickled"))
def test_a_damaged_cache_is_made_again(vit, images, tmp_path, calls, damage):
    first = np.array(features(vit, images, cache=tmp_path))
    path = next(tmp_path.glob("features-*.npy"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other shape":
        np.save(path, first[:3])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    calls.clear()
    assert np.array_equal(features(vit, images, cache=tmp_path), first)
    assert calls
    assert np.array_equal(np.load(path), first)


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def damaged(folder):
    for name in ("cat/01.png", "cat/02.png", "dog/09.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:60])
    return read(str(folder), say=lambda text: None)


def test_a_bad_file_is_named(vit, damaged):
    with pytest.raises(DataError, match=r"1\.png"):
        features(vit, damaged, batch_size=4)


@pytest.mark.parametrize("batch_size", (1, 4, 64))
def test_bad_files_can_be_skipped(vit, damaged, batch_size):
    found = features(vit, damaged, batch_size=batch_size, on_bad="skip")
    assert [name.rsplit("pictures", 1)[1].replace("\\", "/") for name in found.bad] == [
        "/cat/01.png",
        "/cat/02.png",
        "/dog/09.png",
    ]
    assert np.array_equal(found.good, ~np.isin(np.arange(11), (1, 2, 9)))
    assert np.isnan(found.x[~found.good]).all()
    clean = features(vit, damaged.subset(found.good))
    assert np.allclose(found.x[found.good], clean, atol=1e-5)
    with pytest.raises(DataError, match="not finite"):  # forgotten holes are not evaluated by mistake
        linear.fit(found.x, damaged.labels)
    with pytest.raises(DataError, match="not finite"):
        knn.fit(found.x, damaged.labels)


def test_skipped_files_are_tried_again(vit, damaged, folder, tmp_path, calls, monkeypatch):
    first = features(vit, damaged, on_bad="skip", cache=tmp_path / "cache")
    calls.clear()
    again = features(vit, damaged, on_bad="skip", cache=tmp_path / "cache")
    assert calls == [] and again.bad == first.bad and np.array_equal(again.x, first.x, equal_nan=True)
    with pytest.raises(DataError, match=r"1\.png"):
        features(vit, damaged, cache=tmp_path / "cache")
    broken, decode = folder / "cat" / "01.png", type(damaged).decode

    def mended(self, i):  # as if a network drive had come back: neither the data nor their fingerprint change
        return torch.zeros(1, 40, 36, dtype=torch.uint8) if self.path(i) == str(broken) else decode(self, i)

    monkeypatch.setattr(type(damaged), "decode", mended)
    more = features(vit, damaged, on_bad="skip", cache=tmp_path / "cache")
    assert calls == [1] and len(more.bad) == 2 and more.good[1]
    assert np.array_equal(more.x[first.good], first.x[first.good])


def test_a_model_that_gives_nan_is_not_blamed_on_the_data(vit, images):
    with torch.no_grad():
        vit.norm.weight[0] = float("nan")
    with pytest.raises(WeightsError, match=r"not finite, first for .*00\.png"):
        features(vit, images)


def test_a_model_without_pooling_is_refused(images):
    vit = model()
    vit.global_pool = ""
    with pytest.raises(WeightsError, match="instead of one pooled feature"):
        features(vit, images)


def test_a_model_without_passport_is_refused(images):
    import timm

    with pytest.raises(WeightsError, match=r"VisionTransformer has no passport(.|\n)*vitkit.weights.load"):
        features(timm.create_model("test_vit"), images)


def test_nothing_to_do_and_unknown_options(vit, images):
    with pytest.raises(DataError, match="no images"):
        features(vit, images.subset([]))
    with pytest.raises(ConfigError, match="on_bad is 'ignore'"):
        features(vit, images, on_bad="ignore")


def test_written_in_one_step(vit, images, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(module.np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        features(vit, images, cache=tmp_path)
    assert list(tmp_path.iterdir()) == [] or all(p.name == "pictures" for p in tmp_path.iterdir())


def test_embedding_digits_end_to_end(vit):
    digits = read("digits", say=lambda text: None)
    train, test = digits.part("train").few(10), digits.part("test").subset(np.arange(100))
    x, y = features(vit, train), features(vit, test)
    assert (knn.scores(x, train.labels, y).argmax(1) == test.labels).mean() > 0.25
    probe = linear.fit(x, train.labels, n_classes=10, settings=linear.Settings(penalties=(0.03,)))
    assert (probe.scores(y).argmax(1) == test.labels).mean() > 0.4
