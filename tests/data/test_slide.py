"""Slides cut into tiles, streamed through an encoder into files, read back as bags. Slides are drawn by the tests."""

from __future__ import annotations

import os
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit import tokens, weights
from vitkit.data import slide as slides
from vitkit.data.slide import Tiling, find_slides, open_slide, stem, tile, tile_folder
from vitkit.data.tissue import otsu, tissue_mask
from vitkit.errors import ConfigError, DataError, MissingExtra, WeightsError
from vitkit.evaluate.mil import store
from vitkit.evaluate.mil.bags import Bags, load_bags
from vitkit.evaluate.mil.pictures import heatmap
from vitkit.evaluate.mil.store import embed_slides, read_features

SIZE = 32


def tissue(width=200, height=150, box=(40, 30, 140, 120), seed=0) -> np.ndarray:
    """Bright glass with a rectangle of noisy pink tissue."""
    rng = np.random.default_rng(seed)
    out = np.full((height, width, 3), 242, np.uint8)
    x0, y0, x1, y1 = box
    out[y0:y1, x0:x1] = np.clip(np.array([190, 90, 150]) + rng.normal(0, 12, (y1 - y0, x1 - x0, 3)), 0, 255)
    return out


def tiled_tiff(path, levels, *, mpp=None, cell=64):
    """A slide as Aperio's scanners write them: tiled TIFF, one page a level, facts in the description."""
    note = b"Aperio Image Library v1\r\nsmall" + (b"" if mpp is None else f"|AppMag = 20|MPP = {mpp}".encode()) + b"\0"
    body, pages = bytearray(struct.pack("<2sHI", b"II", 42, 0)), []
    for pixels in levels:
        height, width = pixels.shape[:2]
        rows, columns = -(-height // cell), -(-width // cell)
        whole = np.zeros((rows * cell, columns * cell, 3), np.uint8)
        whole[:height, :width] = pixels
        offsets = []
        for y in range(rows):
            for x in range(columns):
                offsets.append(len(body))
                body += whole[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].tobytes()
        pages.append((width, height, offsets))
    link = 4
    for width, height, offsets in pages:
        lists = {270: note, 258: struct.pack("<3H", 8, 8, 8), 324: struct.pack(f"<{len(offsets)}I", *offsets)}
        lists[325] = struct.pack(f"<{len(offsets)}I", *[3 * cell * cell] * len(offsets))
        where = {}
        for tag, raw in lists.items():
            where[tag] = len(body)
            body += raw + bytes(len(raw) % 2)
        one, short, long = len(offsets), 3, 4
        single = {324: offsets[0], 325: 3 * cell * cell} if one == 1 else {}
        entries = [(256, long, 1, width), (257, long, 1, height), (258, short, 3, where[258]), (259, short, 1, 1)]
        entries += [(262, short, 1, 2), (270, 2, len(note), where[270]), (277, short, 1, 3), (284, short, 1, 1)]
        entries += [(322, long, 1, cell), (323, long, 1, cell)]
        entries += [(tag, long, one, single.get(tag, where[tag])) for tag in (324, 325)]
        body[link : link + 4] = struct.pack("<I", len(body))
        body += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        link = len(body)
        body += bytes(4)
    path.write_bytes(body)


@pytest.fixture
def vit():
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return weights.load(
        "vit_tiny_patch16_224",
        pretrained=False,
        arch_kwargs=small,
        image_size=SIZE,
        patch_size=8,
        num_classes=0,
        seed=0,
        say=None,
    ).eval()


@pytest.fixture
def folder(tmp_path):
    """Three drawn slides of different size."""
    made = tmp_path / "slides"
    made.mkdir()
    for number, width in enumerate((200, 150, 260)):
        Image.fromarray(tissue(width, seed=number)).save(made / f"case{number}.png")
    return made


PIXELS = Tiling(size=SIZE, mpp=None)


# ---------------------------------------------------------------- reading and tiling


def test_border_tiles_are_filled_up_with_zeros_and_cover_the_slide(tmp_path):
    pixels = tissue()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        tiles = tile(slide, Tiling(size=SIZE, mpp=None, min_tissue=0))
        assert slide.size == (200, 150) and len(tiles) == 7 * 5 and tiles.mpp is None
        whole = np.zeros((5 * SIZE, 7 * SIZE, 3), np.uint8)
        for i, (x, y) in enumerate(tiles.coords):
            whole[y : y + SIZE, x : x + SIZE] = tiles.read(i)
    assert np.array_equal(whole[:150, :200], pixels)
    assert not whole[150:].any() and not whole[:, 200:].any()


def test_only_tiles_with_enough_tissue_are_kept(tmp_path):
    Image.fromarray(tissue(box=(32, 32, 128, 96))).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    for share in (0.6, 0.95):
        kept = tile(slide, Tiling(size=SIZE, mpp=None, min_tissue=share))
        assert kept.tissue.min() >= share
        inside = {(x, y) for x in range(32, 128, SIZE) for y in range(32, 96, SIZE)}
        assert {tuple(c) for c in kept.coords.tolist()} <= inside
    assert len(tile(slide, PIXELS)) == 6


def test_tissue_is_what_is_coloured():
    mask = tissue_mask(tissue())
    truth = np.zeros_like(mask)
    truth[30:120, 40:140] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.97
    assert tissue_mask(tissue(box=(0, 0, 200, 150))).mean() > 0.99  # nothing but tissue: no half of it is background
    rng = np.random.default_rng(0)
    assert not tissue_mask((238 + rng.integers(0, 6, (80, 80, 3))).astype(np.uint8)).any()  # nothing but glass
    pen = tissue(box=(0, 0, 1, 1))
    pen[40:80, 40:80] = (8, 2, 4)
    assert not tissue_mask(pen)[45:75, 45:75].any()
    specks = np.full((100, 100, 3), 240, np.uint8)
    specks[::10, ::10] = (200, 40, 90)
    assert not tissue_mask(specks).any()


def test_otsu_divides_two_groups():
    values = np.array([10] * 50 + [12] * 30 + [200] * 20, np.uint8)
    assert 12 <= otsu(values) < 200


def test_a_slide_is_resampled_to_the_wished_resolution(tmp_path):
    pixels = np.asarray(Image.fromarray(tissue(40, 40, (0, 0, 40, 40))).resize((400, 400), Image.Resampling.BICUBIC))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", mpp=0.25)
    tiles = tile(slide, Tiling(size=SIZE, mpp=0.5))
    assert tiles.side == 64 and tiles.mpp == pytest.approx(0.5)
    at = tiles.coords.tolist().index([64, 128])
    want = Image.fromarray(pixels[128:192, 64:128]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(tiles.read(at), np.asarray(want))
    near = tile(slide, Tiling(size=SIZE, mpp=0.252))  # within 2 %: pixels as they are
    assert near.side == SIZE and near.mpp == pytest.approx(0.25)
    assert np.array_equal(near.read(0), pixels[:SIZE, :SIZE])
    with pytest.raises(DataError, match=r"coarser than the 0\.1 asked for"):
        tile(slide, Tiling(size=SIZE, mpp=0.1))
    odd = tile(slide, Tiling(size=SIZE, mpp=0.4))  # a side of 51.2 pixels
    assert odd.read(0).shape == (SIZE, SIZE, 3) and odd.coords[:, 0].max() == round(7 * 51.2)


def test_the_coarsest_level_that_is_fine_enough_is_read():
    levels = slides.Slide(None, (4000, 4000), 0.25, [1.0, 4.0, 16.003], lambda *a: None)
    found = {scale: levels.level(scale) for scale in (1, 2, 3.98, 4.5, 16, 20)}
    assert found == {1: 0, 2: 0, 3.98: 1, 4.5: 1, 16: 2, 20: 2}


def test_an_overview_in_strips_equals_one_in_one_piece(tmp_path, monkeypatch):
    Image.fromarray(tissue()).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    whole = slide.overview(3.7)
    monkeypatch.setattr(slides, "_STRIP", 900)
    assert np.abs(slide.overview(3.7).astype(int) - whole).max() <= 1
    assert slide.thumbnail(50).shape == (38, 50, 3)


def test_no_resolution_no_tissue_no_slide(tmp_path):
    Image.fromarray(tissue()).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: the file does not say(.|\n)*slide_mpp"):
        tile(open_slide(tmp_path / "a.png"))
    assert len(tile(open_slide(tmp_path / "a.png"), Tiling(size=SIZE, slide_mpp=0.5)))
    Image.fromarray(np.full((90, 90, 3), 243, np.uint8)).save(tmp_path / "glass.png")
    with pytest.raises(DataError, match=r"none of 9 tiles has 60% tissue \(most: 0%\)(.|\n)*min_tissue"):
        tile(open_slide(tmp_path / "glass.png"), PIXELS)
    with pytest.raises(DataError, match="there is no such slide"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Tiling(min_tissue=60)


def test_files_through_openslide(tmp_path):
    fine, coarse = tissue(256, 192, (40, 30, 200, 160)), tissue(64, 48, (10, 8, 50, 40), seed=1)
    tiled_tiff(tmp_path / "a.svs", [fine, coarse], mpp=0.25)
    with open_slide(tmp_path / "a.svs") as slide:
        assert (
            slide.size == (256, 192) and slide.mpp == 0.25 and slide.downsamples == [1.0, 4.0] and slide.power == "20"
        )
        tiles = tile(slide, Tiling(size=SIZE, mpp=0.25, min_tissue=0))
        assert tiles.level == 0 and np.array_equal(tiles.read(9), fine[32:64, 32:64])
        tiles = tile(slide, Tiling(size=SIZE, mpp=1.0, min_tissue=0))  # the stored level, not resampled
        assert tiles.level == 1 and len(tiles) == 4 and np.array_equal(tiles.read(0), coarse[:32, :32])
        assert np.array_equal(tiles.read(3)[:16], coarse[32:, 32:]) and not tiles.read(3)[16:].any()
        assert np.array_equal(slide.overview(4.0), coarse)
    tiled_tiff(tmp_path / "b.svs", [fine])
    with pytest.raises(DataError, match=r"b\.svs: the file does not say how many micrometres"):
        tile(open_slide(tmp_path / "b.svs"))
    (tmp_path / "broken.svs").write_bytes(b"not a slide")
    with pytest.raises(DataError, match=r"broken\.svs: cannot be read as a slide"):
        open_slide(tmp_path / "broken.svs")
    (tmp_path / "cut.svs").write_bytes((tmp_path / "a.svs").read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.svs"):
        open_slide(tmp_path / "cut.svs")


def test_without_openslide_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.svs").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(MissingExtra, match=r"vitkit\[medical\]"):
        open_slide(tmp_path / "a.svs")


def test_finding_slides_and_their_names(tmp_path):
    for name in ("b.svs", "a.1.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "tiles").mkdir()
    Image.fromarray(tissue(SIZE, SIZE, (0, 0, SIZE, SIZE))).save(tmp_path / "tiles" / "t_64_32.png")
    (tmp_path / "empty").mkdir()
    assert [stem(p.name) for p in find_slides(tmp_path)] == ["a.1", "b", "tiles"]
    assert tile_folder(tmp_path / "tiles").coords.tolist() == [[64, 32]]
    (tmp_path / "b.tiff").write_bytes(b"x")
    with pytest.raises(DataError, match="several slides are called b"):
        find_slides(tmp_path)
    with pytest.raises(DataError, match="holds no slides"):
        find_slides(tmp_path / "empty")


# ---------------------------------------------------------------- embedding


def plain(vit, path) -> np.ndarray:
    """One slide, one tile after the other."""
    tiles = tile(open_slide(path), PIXELS)
    rows = []
    for i in range(len(tiles)):
        x = torch.from_numpy(tiles.read(i).copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            rows.append(tokens.feature(vit, vit.passport.preprocess.normalise(x))[0].numpy())
    return np.stack(rows)


def test_batches_across_slides_give_the_features_of_one_tile_at_a_time(tmp_path, folder, vit):
    out = tmp_path / "features"
    report = embed_slides(vit, folder, out, tiling=PIXELS, batch_size=5)
    assert report.done == ["case0", "case1", "case2"] and not report.skipped and not report.bad
    total = 0
    for name in report.done:
        found = read_features(out / f"{name}.safetensors")
        want = plain(vit, folder / f"{name}.png")
        assert found.features.dtype == torch.float16 and found.side == SIZE
        np.testing.assert_allclose(found.features.float().numpy(), want, atol=3e-3, rtol=2e-3)
        assert np.array_equal(found.coords, tile(open_slide(folder / f"{name}.png"), PIXELS).coords)
        total += len(want)
    assert report.tiles == total


def test_a_finished_slide_is_skipped_and_whatever_changed_is_made_anew(tmp_path, folder, vit):
    out = tmp_path / "features"
    embed_slides(vit, folder, out, tiling=PIXELS)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "case1.safetensors").write_bytes(before["case1.safetensors"][:100])  # what a full disk leaves
    report = embed_slides(vit, folder, out, tiling=PIXELS)
    assert report.done == ["case1"] and report.skipped == ["case0", "case2"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    os.utime(folder / "case2.png", ns=(1, 1))
    assert embed_slides(vit, folder, out, tiling=PIXELS).done == ["case2"]
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert len(embed_slides(vit, folder, out, tiling=PIXELS).done) == 3  # other weights are never mistaken for these
    assert len(embed_slides(vit, folder, out, tiling=Tiling(size=SIZE, mpp=None, min_tissue=0.5)).done) == 3


def test_a_run_that_is_stopped_leaves_whole_files_and_goes_on(tmp_path, folder, vit):
    def stop(so_far):
        if so_far.done:
            raise KeyboardInterrupt

    out = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        embed_slides(vit, folder, out, tiling=PIXELS, batch_size=4, progress=stop)
    assert [p.name for p in out.iterdir()] == ["case0.safetensors"]
    assert embed_slides(vit, folder, out, tiling=PIXELS, batch_size=4).done == ["case1", "case2"]


def test_bad_slides_stop_the_run_or_are_listed(tmp_path, folder, vit):
    Image.fromarray(np.full((90, 90, 3), 243, np.uint8)).save(folder / "case0b.png")
    (folder / "case1.png").write_bytes((folder / "case1.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"case0b\.png: none of 9 tiles"):
        embed_slides(vit, folder, tmp_path / "f", tiling=PIXELS)
    report = embed_slides(vit, folder, tmp_path / "f", tiling=PIXELS, on_bad="skip")
    assert set(report.bad) == {"case0b", "case1"} and {*report.done, *report.skipped} == {"case0", "case2"}


def test_a_damaged_tile_drops_its_whole_slide(tmp_path, vit):
    for name in ("a", "b"):
        (tmp_path / "s" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(tissue(40, 40, (0, 0, 40, 40), seed=i)).save(tmp_path / "s" / name / f"{i}.png")
    (tmp_path / "s" / "a" / "2.png").write_bytes(b"no")
    report = embed_slides(vit, tmp_path / "s", tmp_path / "f", batch_size=3, on_bad="skip")
    assert report.done == ["b"] and list(report.bad) == ["a"]
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["b.safetensors"]
    found = read_features(tmp_path / "f" / "b.safetensors")
    assert len(found.features) == 4 and (found.coords == -1).all()
    with pytest.raises(DataError, match="no places on the slide"):
        heatmap(np.zeros((9, 9, 3), np.uint8), found.coords, found.side, np.ones(4), (90, 90))


def test_precision_and_settings_are_checked(tmp_path, folder, vit):
    half = embed_slides(vit, folder, tmp_path / "h", tiling=PIXELS, precision="bf16")
    assert len(half.done) == 3
    with pytest.raises(ConfigError, match="bf16"):
        embed_slides(vit, folder, tmp_path / "h", precision="half")
    with pytest.raises(ConfigError, match="skip"):
        embed_slides(vit, folder, tmp_path / "h", on_bad="ignore")
    del vit.passport
    with pytest.raises(WeightsError, match=r"weights\.load"):
        embed_slides(vit, folder, tmp_path / "h")


# ---------------------------------------------------------------- bags


@pytest.fixture
def embedded(tmp_path, folder, vit):
    embed_slides(vit, folder, tmp_path / "features", tiling=PIXELS)
    return tmp_path


def write(path, text):
    path.write_text(text)
    return path


def test_bags_from_files_and_a_table(embedded):
    table = write(embedded / "t.csv", "slide,label,patient\ncase1.png,tumour,p1\ncase0,normal,p0\n")
    bags = load_bags(embedded / "features", table)
    assert bags.names == ["case1", "case0"] and bags.classes == ["normal", "tumour"] and bags.labels.tolist() == [1, 0]
    assert bags.patients.tolist() == ["p1", "p0"] and bags.key and bags.outputs == 1
    few = load_bags(embedded / "features", table, max_tiles=2)
    assert few.lengths.tolist() == [2, 2]
    times = write(embedded / "s.csv", "slide,months,died\ncase0,12.5,1\ncase1,3,0\n")
    survival = load_bags(embedded / "features", times, label="months", event="died")
    assert survival.labels.tolist() == [12.5, -3.0] and survival.patients.tolist() == ["case0", "case1"]


@pytest.mark.parametrize(
    "text,message",
    [
        ("slide,label\ncase0,0\ncase9,1\n", r"labels for 1 of 2 slides without features in .*: case9"),
        ("slide,label\ncase0,0\ncase0.png,1\n", "several rows: case0"),
        ("slide,label\ncase0,0\ncase1,\n", "no label for case1"),
        ("slide,label\ncase0,1\ncase1,1\n", "all slides are of one class, 1"),
        ("slide,klass\ncase0,1\n", "no column 'label'"),
    ],
)
def test_tables_that_do_not_fit(embedded, text, message):
    with pytest.raises((DataError, ConfigError), match=message):
        load_bags(embedded / "features", write(embedded / "t.csv", text))


def test_features_of_two_encoders_are_never_mixed(embedded, folder, vit):
    with torch.no_grad():
        vit.norm.weight.mul_(2)
    embed_slides(vit, folder / "case1.png", embedded / "features", tiling=PIXELS)
    with pytest.raises(DataError, match="mixes features of 2 encoders"):
        load_bags(embedded / "features", write(embedded / "t.csv", "slide,label\ncase0,0\ncase1,1\n"))


def test_a_bag_without_tiles_is_refused():
    with pytest.raises(DataError, match="slides without a tile: b"):
        Bags.of([torch.randn(3, 4), torch.zeros(0, 4)], [0, 1], names=["a", "b"])
    with pytest.raises(DataError, match="not finite"):
        Bags.of([torch.full((3, 4), torch.nan)], [0])


def test_training_sees_random_tiles_and_evaluation_all():
    bags = Bags.of([torch.arange(n).float()[:, None] for n in (5, 9)], [0, 1])
    x, mask = bags.batch(bags.places(np.array([1, 0])))
    assert x[..., 0].tolist() == [[*range(9)], [0, 1, 2, 3, 4, 0, 0, 0, 0]] and mask.sum() == 4
    seen = set()
    for seed in range(8):
        x, mask = bags.batch(bags.places(np.array([0, 1]), n_tiles=4, rng=np.random.default_rng(seed)))
        assert x.shape == (2, 4, 1) and not mask.any() and len({*x[1, :, 0].tolist()}) == 4
        seen |= {*x[1, :, 0].tolist()}
    assert seen == {*map(float, range(9))}


def test_heatmap_paints_tiles_where_they_lie():
    coords = np.array([[0, 0], [50, 50]])
    thumb = np.full((20, 20, 3), 240, np.uint8)
    for scale in ("rank", "max"):
        out = heatmap(thumb, coords, 50, np.array([0.1, 0.9]), (100, 100), scale=scale)
        assert out.dtype == np.uint8 and out.shape == thumb.shape
        assert np.array_equal(out[:10, 10:], thumb[:10, 10:])  # no tile, no paint
        assert out[15, 15].sum() > out[5, 5].sum()  # more attention is brighter
    with pytest.raises(DataError, match="1 weights for 2 tiles"):
        heatmap(thumb, coords, 50, np.ones(1), (100, 100))


def test_the_store_names_its_format():
    assert store._FORMAT == "vitkit.slide/2"
