"""What `vitkit clean dvt` says before it starts, and the batches that its second stage sees."""

from __future__ import annotations

import numpy as np
import torch

from vitkit import weights
from vitkit.clean.dvt import Settings
from vitkit.data import read
from vitkit.run.dvt_jobs import sentences, verdict
from vitkit.run.dvt_stage1 import Pairs, batches
from vitkit.settings import Machine


def test_small_pictures_and_few_of_them_are_said():
    found = read("digits", say=None)
    kwargs = {"embed_dim": 48, "depth": 1, "num_heads": 1}
    vit = weights.load(
        "vit_tiny_patch16_224", arch_kwargs=kwargs, pretrained=False, image_size=64, in_chans=1, say=None
    )
    said = sentences(found, np.arange(20), vit, Settings(), shards=6, size=2)
    assert "20 pictures, 768 crops and 25,000 steps each, 2 at once; the finest grid has 16 cells" in said[0]
    assert said[1] == "4 of 10 parts of stage 1 are done already"
    assert "20 pictures are few" in said[2]
    assert "20 of 20 pictures looked at are smaller than the model's 64 x 64 pixels (the least: 32)" in said[3]
    assert len(sentences(found, np.arange(60), vit, Settings(), shards=60, size=1)) == 2  # many, none done


def test_processes_share_an_epoch_and_a_resumed_one_goes_on(tmp_path):
    found = read("digits", say=None)
    pairs = Pairs(tmp_path, found, np.arange(8), 8)
    maps = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 2, 2, 4)
    pairs.write(0, maps, maps + 1)
    machine = Machine(batch_size=2)
    alone = [batch["image"].tolist() for batch in batches(pairs, np.arange(8), Machine(batch_size=4), 2, 0, 1)(3, 0)]
    both = [
        [batch["image"].tolist() for batch in batches(pairs, np.arange(8), machine, 2, rank, 2)(3, 0)]
        for rank in (0, 1)
    ]
    assert [sorted(a + b) for a, b in zip(*both, strict=True)] == [sorted(one) for one in alone]
    order = [row for batch in alone for row in batch]
    assert sorted(order) == list(range(8))
    last = list(batches(pairs, np.arange(8), machine, 4, 0, 1)(3, 3))
    assert len(last) == 1 and last[0]["image"].tolist() == order[6:]
    batch = last[0]
    assert torch.equal(batch["raw"][:, 0, 0, 0], batch["image"].float())
    assert torch.equal(batch["target"], batch["raw"] + 1) and batch["raw"].shape == (2, 2, 2, 4)


def test_a_denoiser_that_does_not_help_is_called_that():
    rows = [{"name": name, "value": value, "n": 3} for name, value in (("clean", 0.5), ("raw", 0.6), ("map", 0.4))]
    assert "comes NO nearer to the clean features: cosine 0.600 -> 0.500" in verdict({"metrics": rows}, 9, 3.0, "")
    rows[0]["value"] = 0.7
    said = verdict({"metrics": rows}, 9, 3.0, "")
    assert "comes nearer to" in said and "Before" not in said
