"""Batches: the same for any number of workers, from any start, over any number of processes; damage is counted."""

import random

import numpy as np
import pytest
import torch

from tests.data.makers import class_folders
from tests.data.test_splits import made
from tests.data.test_views import RGB
from vitkit import data
from vitkit.data.loader import Order, loader, sample_seed, steps_per_epoch
from vitkit.data.transforms import eval_view, finetune_view, pretrain_view
from vitkit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return data.read(class_folders(tmp_path_factory.mktemp("set"), {"a": 12, "b": 11}), label_columns=None)


def batches(images, view=None, **how):
    how = {"batch_size": 4, "seed": 1, **how}
    return list(loader(images, view or finetune_view(RGB), **how))


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key], key


def test_a_batch(images):
    batch = batches(images)[0]
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert (
        batch["label"].dtype == torch.int64
        and batch["index"].dtype == torch.int64
        and batch["seed"].dtype == torch.int64
    )
    assert batch["bad"] == [] and set(batch) == {"image", "label", "index", "seed", "bad"}
    assert batch["label"].tolist() == images.labels[batch["index"]].tolist()
    assert batch["seed"].tolist() == [sample_seed(1, 0, i) for i in batch["index"].tolist()]


def test_multi_labels_and_no_labels():
    multi = made(np.array([[1, np.nan], [0, 1]], np.float32))
    batch = batches(multi, batch_size=2, shuffle=False)[0]
    assert batch["label"].dtype == torch.float32 and torch.isnan(batch["label"][0, 1])
    assert "label" not in batches(made(None, group=["a", "b"]))[0]


def test_every_image_once_in_an_order_of_seed_and_epoch(images):
    orders = {}
    for key in ((1, 0), (1, 1), (2, 0)):
        found = batches(images, eval_view(RGB), seed=key[0], epoch=key[1])
        orders[key] = [i for batch in found for i in batch["index"].tolist()]
        assert sorted(orders[key]) == list(range(23)) and [len(b["index"]) for b in found] == [4, 4, 4, 4, 4, 3]
    assert len({tuple(order) for order in orders.values()}) == 3
    plain = batches(images, eval_view(RGB), shuffle=False)
    assert [i for batch in plain for i in batch["index"].tolist()] == list(range(23))


def test_workers_change_nothing(images):
    same(batches(images, workers=0, epoch=3), batches(images, workers=2, epoch=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_in_the_middle_gives_the_rest(images, workers):
    same(batches(images, start=2, workers=workers), batches(images)[2:])


def test_start_at_the_end_and_beyond(images):
    assert batches(images, start=6) == [] and len(loader(images, eval_view(RGB), batch_size=4, seed=0, start=6)) == 0
    with pytest.raises(ConfigError, match="start=7 of an epoch of 6 batches"):
        batches(images, start=7)


@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_see_what_one_with_the_double_batch_sees(images, workers):
    whole = batches(images, batch_size=8, drop_last=True)
    parts = [batches(images, batch_size=4, rank=rank, world=2, drop_last=True, workers=workers) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 2
    for one, left, right in zip(whole, *parts, strict=True):
        for key in ("image", "label", "index", "seed"):
            assert torch.equal(one[key], torch.cat([left[key], right[key]]))


@pytest.mark.parametrize(
    ("n", "world", "sizes"),
    # 23 = 16 + 7, divided into 4 and 3; 17 = 16 + 1 and 20 = 18 + 2: fewer than there are ranks, left out
    [(23, 2, [[8, 4], [8, 3]]), (17, 2, [[8], [8]]), (20, 3, [[6], [6], [6]]), (22, 3, [[6, 2], [6, 1], [6, 1]])],
)
def test_last_batch_is_divided_evenly(n, world, sizes):
    size = {2: 8, 3: 6}[world]
    assert [[len(batch) for batch in Order(n, size, 0, rank=rank, world=world)] for rank in range(world)] == sizes


@pytest.mark.parametrize("n", range(1, 40))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_agree_on_the_number_of_batches_and_share_nothing(n, world):
    for drop_last in (False, True):
        orders = [Order(n, 4, 9, 1, drop_last=drop_last, rank=rank, world=world) for rank in range(world)]
        pieces = [[batch.tolist() for batch in order] for order in orders]
        assert (
            {len(piece) for piece in pieces}
            == {orders[0].batches}
            == {steps_per_epoch(n, 4, world=world, drop_last=drop_last)}
        )
        flat = [i for piece in pieces for batch in piece for i in batch]
        assert len(flat) == len(set(flat)) and all(batch for piece in pieces for batch in piece)
        lost = n - len(flat)
        assert lost < (4 * world if drop_last else world)


def test_length_counts_what_is_still_to_come(images):
    found = loader(images, eval_view(RGB), batch_size=4, seed=0, start=2)
    assert len(found) == 4 and found.total == 6
    assert len(list(found)) == 4 and len(list(found)) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_generators_are_untouched(images, workers):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    batches(images, workers=workers)
    assert (
        torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1] and np.random.rand() == expected[2]
    )


def test_seeds_are_well_mixed():
    seeds = {sample_seed(s, e, i) for s in range(5) for e in range(5) for i in range(40)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert 400 < sum(seed & 1 for seed in seeds) < 600
    assert sample_seed(0, 0, 0) == sample_seed(0, 0, 0) and sample_seed(1, 0, 0) != sample_seed(0, 1, 0)


def test_augmentation_depends_on_epoch_and_image_only(images):
    """A picture's augmented pixels do not depend on its batch."""
    small, large = batches(images, batch_size=2), batches(images, batch_size=23)
    pixels = {i: image for batch in small for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)}
    assert all(
        torch.equal(pixels[i], image) for i, image in zip(large[0]["index"].tolist(), large[0]["image"], strict=True)
    )


@pytest.fixture
def damaged(tmp_path):
    root = class_folders(tmp_path / "set", {"a": 10, "b": 10})
    (root / "a" / "009.png").write_bytes(b"")
    (root / "b" / "000.png").write_bytes((root / "b" / "000.png").read_bytes()[:300])
    return data.read(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_replaced_by_the_next_good_one_and_named(damaged, workers):
    found = batches(damaged, eval_view(RGB), batch_size=5, shuffle=False, max_bad=0.1, workers=workers)
    assert found[1]["index"].tolist() == [5, 6, 7, 8, 11] and found[2]["index"].tolist() == [11, 11, 12, 13, 14]
    assert [path[-9:] for path in found[1]["bad"]] == ["a/009.png", "b/000.png"]
    assert [path[-9:] for path in found[2]["bad"]] == ["b/000.png"]
    assert found[1]["label"].tolist() == [0, 0, 0, 0, 1] and found[1]["seed"][4] == sample_seed(1, 0, 9)
    same(found, batches(damaged, eval_view(RGB), batch_size=5, shuffle=False, max_bad=0.1))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_files_end_the_epoch(damaged, workers):
    with pytest.raises(
        DataError, match=r"set: 2 files of 20 cannot be read, more than max_bad=0\.05 allows: .*009\.png"
    ) as caught:
        batches(damaged, max_bad=0.05, workers=workers, shuffle=False)
    assert "the file is empty" in str(caught.value) and "vitkit check" in caught.value.fix


def test_with_max_bad_zero_the_first_damaged_file_is_an_error(damaged):
    with pytest.raises(DataError, match=r"009\.png: the file is empty"):
        batches(damaged, eval_view(RGB), shuffle=False, max_bad=0)


def test_nothing_but_damage(tmp_path):
    root = class_folders(tmp_path, {"a": 2, "b": 2})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="4 files of 4 cannot be read"):
        batches(data.read(root), max_bad=0.99)


def test_errors_of_a_view_are_not_taken_for_damage(images):
    def broken(image):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        batches(images, broken)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world": 2}, "rank=2"),
        ({"workers": -1}, "workers=-1"),
        ({"max_bad": 2}, "max_bad=2"),
    ],
)
def test_senseless_settings(images, how, message):
    with pytest.raises(ConfigError, match=message):
        batches(images, **how)


def test_no_images_give_no_batches(images):
    assert batches(images.subset([])) == []


def test_workers_use_one_thread(images):
    def threads(image):
        return torch.full((1, 1, 1), torch.get_num_threads(), dtype=torch.uint8)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert int(batches(images, threads, workers=1)[0]["image"].max()) == 1
    finally:
        torch.set_num_threads(before)


def test_pixels_in_memory_are_not_worn_out_by_training():
    images = data.read("digits").subset(np.arange(8))
    before = [images.decode(i) for i in range(8)]
    view = pretrain_view(type(RGB)(mean=(0.5,), std=(0.5,), channels="grey"))
    batches(images, view)
    assert all(torch.equal(images.decode(i), image) for i, image in enumerate(before))
