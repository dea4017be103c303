"""Verbs that only know pictures say so of models of volumes and videos."""

from __future__ import annotations

import pytest

import vitkit
from tests.examples import model
from vitkit import weights
from vitkit.data import read
from vitkit.errors import ConfigError
from vitkit.passport import Passport, Preprocess
from vitkit.run.exporting import open_run


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    vit = model("volume")
    kwargs = {"img_size": [16, 16, 24], "patch_size": [8, 8, 8], "embed_dim": 48, "depth": 3, "num_heads": 4}
    pixels = Preprocess(mean=(0.0,), std=(1.0,), image_size=(16, 16, 24), kind="volume")
    vit.passport = Passport("volume_vit_tiny_patch16_96", kwargs, pixels)
    weights.save_run(folder, vit)
    return str(folder)


@pytest.mark.parametrize(
    "call,verb",
    [
        (lambda m, out: vitkit.explain(m, "digits", out=out, quiet=True), "explain"),
        (lambda m, out: vitkit.attack(m, data="digits", out=out, quiet=True), "attack"),
        (lambda m, out: vitkit.scaling(models=[m], sizes=(16,), data="digits", out=out, quiet=True), "scaling"),
        (lambda m, out: vitkit.compare(m, m, data="digits", out=out, quiet=True), "compare --data"),
    ],
)
def test_verbs_for_images_refuse_models_of_volumes(volumes, tmp_path, call, verb):
    with pytest.raises(ConfigError, match=f"vitkit {verb} works on images, and this model takes volumes"):
        call(volumes, str(tmp_path / "out"))


def test_export_and_methods_for_images(volumes, tmp_path):
    with pytest.raises(ConfigError, match="takes volumes, and only models of images are exported"):
        open_run(tmp_path.__class__(volumes))
    with pytest.raises(ConfigError, match="kind='film'"):
        read("digits", kind="film")
