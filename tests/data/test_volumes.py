"""Volumes: order, orientation and spacing of NIfTI files and DICOM series; slices of them as a data set."""

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from tests.data.makers import picture, table
from tests.data.scan_makers import CT, GONE, ct_series, dicom, nifti, uid
from vitkit import data
from vitkit.data import check, scans, splits, volume
from vitkit.errors import ConfigError, DataError


def block(*shape):
    """A different value in every voxel."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def turned(letters, spacing=(1.0, 1.0, 1.0)):
    """The NIfTI affine of axes that grow towards `letters`, e.g. "LPS"."""
    world = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.diag([0.0, 0, 0, 1])
    for k, letter in enumerate(letters):
        axis, sign = world[letter]
        affine[axis, k] = sign * spacing[k]
    affine[:3, 3] = (5, 6, 7)
    return affine


# NIfTI


@pytest.mark.parametrize("letters", ["RAS", "LPS", "LAS", "PSR", "SLA", "ILP"])
def test_every_orientation_gives_the_same_volume_as_nibabel(tmp_path, letters):
    import nibabel

    path = nifti(tmp_path / "a.nii.gz", block(3, 4, 5), turned(letters, (1.0, 2.0, 3.0)))
    canonical = nibabel.as_closest_canonical(nibabel.load(path))  # (R, A, S)
    read = volume.read(path, orientation="SAR")
    assert (read.data == canonical.get_fdata().transpose(2, 1, 0)).all() and read.data.dtype == np.float32
    assert read.spacing == tuple(float(z) for z in canonical.header.get_zooms()[::-1])
    pictures = volume.read(path)  # rows to the back, columns to the left
    assert (pictures.data == read.data[:, ::-1, ::-1]).all() and pictures.orientation == "SPL"
    for one in (read, pictures):  # the affine still says where every voxel lies
        at = np.array([1, 2, 0, 1])
        stored = np.argwhere(nibabel.load(path).get_fdata() == one.data[1, 2, 0])[0]
        assert np.allclose(one.affine @ at, nibabel.load(path).affine @ [*stored, 1])


def test_oblique_axes_take_the_nearest_letters(tmp_path):
    affine = turned("LPS")
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = rotation @ affine[:3, :3]
    read = volume.read(nifti(tmp_path / "a.nii", block(3, 4, 5), affine))
    assert read.orientation == "SPL" and read.spacing == (1, 1, 1)
    assert (read.data == block(3, 4, 5).transpose(2, 1, 0)).all()


def test_slope_intercept_units_and_as_stored(tmp_path):
    path = nifti(tmp_path / "a.nii", block(2, 2, 2), turned("RAS", (0.001,) * 3), slope=2.0, inter=-3.0, units="meter")
    read = volume.read(path, orientation=None)
    assert (read.data == block(2, 2, 2).transpose(2, 1, 0) * 2.0 - 3).all()
    assert read.spacing == (1.0, 1.0, 1.0) and read.orientation == "SAR"
    assert repr(read) == "Volume('a.nii', 2 x 2 x 2 voxels of 1 x 1 x 1 mm, SAR)"


def test_four_axes(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", block(2, 3, 4, 5), turned("LPS"))
    first = volume.read(path)
    assert (first.data == block(2, 3, 4, 5)[..., 0].transpose(2, 1, 0)).all() and "4-D: volume 0 of 5" in first.notes
    assert (volume.read(path, time=3).data == block(2, 3, 4, 5)[..., 3].transpose(2, 1, 0)).all()
    mean = volume.read(path, time="mean")
    assert np.allclose(mean.data, block(2, 3, 4, 5).mean(-1).transpose(2, 1, 0)) and "mean of 5" in mean.notes[0]
    for wrong in (5, -1, "median"):
        with pytest.raises(ConfigError, match="time="):
            volume.read(path, time=wrong)
    single = nifti(tmp_path / "b.nii", block(2, 3, 4, 1))
    assert volume.read(single).data.shape == (4, 3, 2)
    flat = nifti(tmp_path / "c.nii", block(2, 3))
    assert volume.read(flat).data.shape == (1, 3, 2)
    with pytest.raises(DataError, match="5 axes"):
        volume.read(nifti(tmp_path / "d.nii", block(2, 2, 2, 2, 2)))


def test_not_a_number_becomes_the_smallest_value(tmp_path):
    values = np.arange(8.0).reshape(2, 2, 2)
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    read = volume.read(nifti(tmp_path / "a.nii", values), orientation=None)
    assert read.data[0, 0, 0] == 1 and read.data[1, 1, 1] == 1 and "2 voxels that are not finite" in read.notes[0]
    with pytest.raises(DataError, match="no finite value"):
        volume.read(nifti(tmp_path / "b.nii", np.full((2, 2, 2), np.nan)))


def test_header_without_orientation(tmp_path):
    import nibabel

    image = nibabel.Nifti1Image(block(2, 2, 2), None)
    image.to_filename(tmp_path / "a.nii")
    assert volume.read(tmp_path / "a.nii").notes == ("no orientation in the header: axes taken as stored",)


def test_broken_volumes_are_named(tmp_path):
    whole = nifti(tmp_path / "a.nii", block(20, 20, 20)).read_bytes()
    packed = nifti(
        tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 999, (20, 20, 20), np.int16)
    ).read_bytes()
    for name, content, text in (
        ("b.nii", whole[:-100], "truncated NIfTI file"),
        ("c.nii.gz", packed[: len(packed) // 2], "truncated NIfTI file"),
        ("d.nii", b"text" * 200, "corrupt NIfTI file"),
        ("e.nii.gz", b"text" * 200, "corrupt NIfTI file"),
        ("f.nii", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=text) as caught:
            volume.read(tmp_path / name)
        assert name in str(caught.value)
    flat = turned("RAS")
    flat[:3, 1] = flat[:3, 0]
    with pytest.raises(DataError, match="span no volume"):
        volume.read(nifti(tmp_path / "g.nii", block(2, 2, 2), flat))
    rgb = np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(DataError, match="holds colours"):
        volume.read(nifti(tmp_path / "h.nii", rgb))
    with pytest.raises(DataError, match="no such file"):
        volume.read(tmp_path / "gone.nii")
    with pytest.raises(DataError, match="not a volume"):
        volume.read(picture(tmp_path / "a.png"))
    with pytest.raises(ConfigError, match="orientation="):
        volume.read(tmp_path / "a.nii", orientation="XYZ")


# brightness and spacing


def test_percentiles_and_window_of_a_volume():
    values = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)  # percentiles 0.5 and 99.5 are 5 and 995
    assert (volume.to_uint8(values) == np.rint(np.clip((values - 5) / 990, 0, 1) * 255)).all()
    assert volume.to_uint8(values, window=(500, 200)).reshape(-1)[[400, 450, 500, 600]].tolist() == [0, 64, 128, 255]
    assert not volume.to_uint8(np.full((2, 2, 2), 7.0, np.float32)).any()
    sparse = np.zeros((10, 10, 10), np.float32)
    sparse[0, 0, 0] = 8  # percentiles coincide: minimum and maximum
    assert volume.to_uint8(sparse)[0, 0, 0] == 255


def test_resampling_keeps_places_and_says_the_spacing(tmp_path):
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (12, 16, 20)), indexing="ij")
    ramp = (10 * z + 2 * y - 3 * x).astype(np.float32)
    read = volume.read(nifti(tmp_path / "a.nii", ramp.transpose(2, 1, 0), turned("LPS", (1.0, 1.0, 2.0))))
    fine = volume.resample(read, (1.0, 1.0, 1.0))
    assert fine.data.shape == (24, 16, 20) and fine.spacing == (1, 1, 1)
    # slice 5 of the finer grid lies at 0.5 * 5 - 0.25 of the old one
    assert np.allclose(fine.data[5, 3, 4], 10 * 2.25 + 2 * 3 - 3 * 4, atol=1e-4)
    assert np.allclose(fine.affine @ [5, 3, 4, 1], read.affine @ [2.25, 3, 4, 1])
    coarse = volume.resample(read, (5.0, 2.0, 1.0))
    assert coarse.data.shape == (5, 8, 20) and coarse.spacing == (4.8, 2.0, 1.0)
    assert np.allclose(coarse.data[2, 4, 10], 10 * (2.5 * 2.4 - 0.5) + 2 * 8.5 - 3 * 10, atol=0.05)
    numbers = volume.resample(read, (0.7, 3.0, 2.0), labels=True)
    assert set(np.unique(numbers.data)) <= set(np.unique(ramp))
    for wrong in ((1, 1), (1, 0, 1), (1, 1, float("nan"))):
        with pytest.raises(ConfigError, match="spacing="):
            volume.resample(read, wrong)


# DICOM series


def test_slices_are_ordered_by_position_not_by_name_or_number(tmp_path):
    ct_series(tmp_path, [6.0, 0.0, 4.0, 2.0])
    read = volume.read(tmp_path)
    assert read.data[:, 3, 3].tolist() == [76, 78, 80, 82] and read.data.shape == (4, 6, 8)
    assert read.data[:, 0, 0].tolist() == [-23, -21, -22, -24]  # the slices that were written second, fourth, ...
    assert read.spacing == (2.0, 0.5, 0.75) and read.orientation == "SPL" and read.modality == "CT"
    # 10 mm towards the left and 20 towards the back in DICOM are minus that to the right and front
    assert np.allclose(read.affine @ [0, 0, 0, 1], [10, 20, 0, 1]) and read.notes == ()


def test_series_and_nifti_of_the_same_voxels_are_equal(tmp_path):
    paths = ct_series(tmp_path / "dicom", [0.0, 2.0, 4.0])
    read = volume.read(tmp_path / "dicom")
    affine = read.affine[:, [2, 1, 0, 3]]
    same = volume.read(nifti(tmp_path / "a.nii", read.data.transpose(2, 1, 0), affine))
    assert (same.data == read.data).all() and np.allclose(same.affine, read.affine) and len(paths) == 3


def test_an_inverted_series_keeps_its_values_and_turns_its_pictures(tmp_path):
    ct_series(tmp_path / "plain", [0, 2, 4])
    ct_series(tmp_path / "turned", [0, 2, 4], PhotometricInterpretation="MONOCHROME1")
    plain, turned = (volume.read(tmp_path / name) for name in ("plain", "turned"))
    assert np.array_equal(plain.data, turned.data) and turned.inverted and not plain.inverted
    for window in (None, (1020, 40)):
        assert np.array_equal(volume.to_uint8(turned, window=window), 255 - volume.to_uint8(plain, window=window))
    assert volume.reorient(turned, "RAS").inverted


def test_sagittal_series_are_turned_like_all_others(tmp_path):
    places = iter([0.0, 3.0, 6.0])
    for k in range(3):
        pixels = np.full((4, 5), k * 10, np.int16)
        pixels[0, 0] = 99  # head, front
        tags = {"ImagePositionPatient": [next(places), -50, 80], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
        dicom(tmp_path / f"{k}.dcm", pixels, SOPClassUID=CT, SeriesInstanceUID=uid("sagittal"),
              PixelSpacing=[2, 1], **tags)  # fmt: skip
    read = volume.read(tmp_path)  # rows go down, columns to the back, slices to the left
    assert read.data.shape == (4, 5, 3) and read.spacing == (2, 1, 3)
    assert read.data[3, 0].tolist() == [99, 99, 99] and read.data[0, 2].tolist() == [0, 10, 20]


def test_slices_shifted_by_a_tilted_gantry_keep_their_places(tmp_path):
    for k in range(4):
        dicom(tmp_path / f"{k}.dcm", np.full((4, 4), k, np.uint16), SeriesInstanceUID="9.9", PixelSpacing=[1, 1],
              ImagePositionPatient=[3, float(k), 2.0 * k], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])  # fmt: skip
    read = volume.read(tmp_path, orientation=None)
    for k in range(4):  # right and anterior are minus DICOM's left and posterior
        assert np.allclose(read.affine @ [k, 0, 0, 1], [-3, -k, 2 * k, 1])


def test_gaps_double_slices_and_uneven_steps_are_reported(tmp_path):
    ct_series(tmp_path / "gap", [0.0, 2.0, 4.0, 10.0])
    assert "gap of 6 mm between" in volume.read(tmp_path / "gap").notes[0]
    ct_series(tmp_path / "double", [0.0, 2.0, 2.0, 4.0])
    read = volume.read(tmp_path / "double")
    assert read.data.shape[0] == 3 and "1 slice at a place that another has already" in read.notes[0]
    assert read.data[1, 0, 0] == 1001 - 1024  # the lower InstanceNumber
    ct_series(tmp_path / "uneven", [0.0, 2.0, 4.2, 6.2])
    assert "uneven steps" in volume.read(tmp_path / "uneven").notes[0]


def test_mixed_series_sizes_and_colours_are_refused(tmp_path):
    ct_series(tmp_path / "two", [0.0, 2.0], series="one")
    ct_series(tmp_path / "two", [0.0, 2.0, 4.0], series="other")
    with pytest.raises(DataError, match="slices of 2 series are mixed") as caught:
        volume.read(tmp_path / "two")
    assert "series=UID" in caught.value.fix
    assert volume.read(tmp_path / "two", series_uid=uid("series", "other")).data.shape[0] == 3
    with pytest.raises(DataError, match=r"there is no series 1\.2"):
        volume.read(tmp_path / "two", series_uid="1.2")
    ct_series(tmp_path / "sizes", [0.0, 2.0])
    ct_series(tmp_path / "sizes", [4.0], size=5)
    with pytest.raises(DataError, match=r"slices of different size are mixed \(5 x 7, 6 x 8\)"):
        volume.read(tmp_path / "sizes")
    ct_series(tmp_path / "spacing", [0.0, 2.0])
    ct_series(tmp_path / "spacing", [4.0], PixelSpacing=[1, 1], InstanceNumber=9)
    with pytest.raises(DataError, match=r"slices of different spacing are mixed \(1 of 2 differ from the first\)"):
        volume.read(tmp_path / "spacing")
    with pytest.raises(DataError, match="holds no DICOM pictures"):
        volume.read(picture(tmp_path / "png" / "a.png").parent)


def test_series_without_positions(tmp_path):
    gone = {"ImagePositionPatient": GONE}
    for k, place in enumerate([4.0, 0.0, 2.0]):
        ct_series(tmp_path / "location", [place], SliceLocation=place, InstanceNumber=k, **gone)[0].rename(
            tmp_path / "location" / f"{k}.dcm"
        )
    read = volume.read(tmp_path / "location")
    assert read.data[:, 3, 3].tolist() == [76, 78, 80] and "ordered by SliceLocation" in read.notes[0]
    ct_series(tmp_path / "number", [4.0, 0.0, 2.0], **gone)
    read = volume.read(tmp_path / "number")
    assert read.data[:, 3, 3].tolist() == [80, 76, 78] and "ordered by InstanceNumber" in read.notes[0]
    ct_series(tmp_path / "nothing", [4.0, 0.0], InstanceNumber=GONE, **gone)
    with pytest.raises(DataError, match="nothing tells how 2 slices lie") as caught:
        volume.read(tmp_path / "nothing")
    assert "read them as images" in caught.value.fix


def test_slope_of_each_slice(tmp_path):
    ct_series(tmp_path, [0.0], RescaleSlope=1, RescaleIntercept=0)
    path = ct_series(tmp_path / "x", [2.0], RescaleSlope=0.5, RescaleIntercept=10)[0]
    path.rename(tmp_path / "second.dcm")
    assert volume.read(tmp_path).data[:, 3, 3].tolist() == [1100, 561]


def enhanced(path, places):
    groups = []
    for place in places:
        item, inner = Dataset(), Dataset()
        inner.ImagePositionPatient = [0, 0, place]
        item.PlanePositionSequence = [inner]
        groups.append(item)
    shared, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing = [0.5, 0.5]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [measures]
    frames = np.stack([np.full((3, 4), round(place), np.uint16) for place in places])
    return dicom(path, frames, PerFrameFunctionalGroupsSequence=groups, SharedFunctionalGroupsSequence=shared)


def test_enhanced_multi_frame_files_are_volumes_and_films_are_not(tmp_path):
    read = volume.read(enhanced(tmp_path / "a.dcm", [9.0, 3.0, 6.0]))
    assert read.data[:, 0, 0].tolist() == [3, 6, 9] and read.spacing == (3, 0.5, 0.5)
    film = dicom(tmp_path / "film.dcm", np.zeros((3, 4, 4), np.uint8), ImagePositionPatient=[0, 0, 0],
                 ImageOrientationPatient=[1, 0, 0, 0, 1, 0])  # fmt: skip
    with pytest.raises(DataError, match="nothing tells how 3 slices lie"):
        volume.read(film)


# slices as a data set


def bright(k, size=(12, 14, 5)):
    values = np.random.default_rng(k).normal(100 * (1 + k % 2), 10, size)
    return values.astype(np.float32)


@pytest.fixture
def cohort(tmp_path):
    """Eight volumes of two classes in a table, one row a volume."""
    rows = ["path,label"]
    for k in range(8):
        nifti(tmp_path / "scans" / f"case{k}.nii.gz", bright(k), turned("RAS", (1.0, 1.0, 2.0)))
        rows.append(f"scans/case{k}.nii.gz,{'ab'[k % 2]}")
    return table(tmp_path / "labels.csv", "\n".join(rows) + "\n")


def test_volumes_in_a_table_become_slices_that_stay_together(cohort):
    images = data.read(cohort)
    assert len(images) == 40 and images.names[5] == "scans/case1.nii.gz[0]" and images.classes == ["a", "b"]
    assert images.labels.tolist() == [k % 2 for k in range(8) for _ in range(5)]
    assert splits.leaks(images) == {} and len(set(images.group.tolist())) == 8
    numbers, places = scans.volumes(images)
    assert numbers.tolist() == [k for k in range(8) for _ in range(5)] and places.tolist() == [*range(5)] * 8
    expected = volume.to_uint8(volume.read(cohort.parent / "scans" / "case3.nii.gz"))
    assert (images.decode(17)[0].numpy() == expected[2]).all()
    words = " ".join(images.understood)
    assert "8 NIfTI volumes: each axial slice is an image (40), brightness of a volume by its 0.5 to 99.5" in words


def test_planes_and_frames_of_volumes(cohort):
    path = cohort.parent / "scans" / "case0.nii.gz"
    sides = {"axial": (5, 14, 12), "coronal": (14, 5, 12), "sagittal": (12, 5, 14)}
    stored = {}
    for plane, (slices, height, width) in sides.items():
        images = data.read(path, plane=plane)
        assert len(images) == slices and images.decode(0).shape == (1, height, width)
        stored[plane] = np.stack([images.decode(k)[0].numpy() for k in range(slices)])
    assert (stored["coronal"] == stored["axial"].transpose(1, 0, 2)[:, ::-1]).all()  # head up
    assert (stored["sagittal"] == stored["axial"].transpose(2, 0, 1)[:, ::-1]).all()
    assert data.read(cohort, frames="middle").names[:2] == ["scans/case0.nii.gz[2]", "scans/case1.nii.gz[2]"]


def test_subjects_in_names_are_groups(tmp_path):
    for k in range(4):
        nifti(tmp_path / f"sub-0{k // 2}" / "anat" / f"sub-0{k // 2}_run-{k}.nii.gz", bright(k))
    images = data.read(tmp_path)
    assert sorted(set(images.group.tolist())) == ["subject 0001", "subject 0002"] and len(images) == 20


def test_series_folders_in_a_table(tmp_path):
    rows = ["path,label"]
    for k in range(4):
        ct_series(tmp_path / f"case{k}", [4.0, 0.0, 2.0], series=str(k))
        rows.append(f"case{k},{'ab'[k % 2]}")
    images = data.read(table(tmp_path / "t.csv", "\n".join(rows) + "\n"), window=(76, 400), test_fraction=0.25)
    assert len(images) == 12 and images.labels.tolist() == [k % 2 for k in range(4) for _ in range(3)]
    assert [int(images.decode(k)[0, 3, 3]) for k in range(3)] == [128, 129, 130]  # in order of position
    assert scans.volumes(images)[1].tolist() == [0, 1, 2] * 4 and len(set(images.group.tolist())) == 4
    ct_series(tmp_path / "case0", [8.0], series="another")
    with pytest.raises(DataError, match=r"case0: slices of 2 series are mixed"):
        data.read(tmp_path / "t.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no DICOM pictures"):
        data.read(table(tmp_path / "u.csv", "path,label\nempty,a\ncase1,b\n"))


def test_folders_of_one_series_each_are_volumes_not_classes(tmp_path):
    for k in range(3):
        ct_series(tmp_path / f"scan{k}", [0.0, 2.0, 4.0], series=str(k))
    images = data.read(tmp_path)
    assert images.task is None and images.labels is None and len(images) == 9
    assert "each of the 3 folders is one volume: read without labels" in images.understood
    ct_series(tmp_path / "scan0", [0.0, 2.0], series="second")
    assert data.read(tmp_path).task == "single"


def test_masks_slice_by_slice_and_only_where_they_fit(tmp_path):
    affine = turned("RAS", (1.0, 1.0, 2.0))
    for k in range(3):
        nifti(tmp_path / "images" / f"case{k}.nii.gz", bright(k), affine)
        mask = np.zeros((12, 14, 5), np.uint8)
        mask[2:5, 3:9, k + 1] = 2
        # the mask of case 1 is stored turned over: it fits all the same
        flip = np.diag([-1.0, 1, 1, 1]) @ affine if k == 1 else affine
        flip = flip.copy()
        flip[:3, 3] = (affine @ [11, 0, 0, 1])[:3] if k == 1 else affine[:3, 3]
        nifti(tmp_path / "masks" / f"case{k}.nii.gz", mask[::-1] if k == 1 else mask, flip)
    images = data.read(tmp_path)
    assert images.task == "mask" and len(images) == 15
    for k in range(3):
        found = [images.mask(5 * k + j).numpy() for j in range(5)]
        assert [int(one.max()) for one in found] == [2 * (j == k + 1) for j in range(5)]
        assert (found[k + 1][14 - 9 : 14 - 3, 12 - 5 : 12 - 2] == 2).all() and found[k + 1].sum() == 36
        assert found[0].shape == images.decode(5 * k).shape[1:]
    assert check(tmp_path).ok
    shape, far = np.zeros((12, 14, 6), np.uint8), affine.copy()
    far[0, 3] += 4
    for mask, where, text in (
        (shape, affine, r"case2\.nii\.gz: the mask is 6 x 14 x 12 voxels, its volume case2\.nii\.gz 5 x 14 x 12"),
        (shape[..., :5], turned("RAS"), "the mask has voxels of 1 x 1 x 1 mm, its volume .* 2 x 1 x 1"),
        (shape[..., :5], far, "the mask lies 4 mm away from its volume"),
    ):
        nifti(tmp_path / "masks" / "case2.nii.gz", mask, where)
        with pytest.raises(DataError, match=text):
            data.read(tmp_path)
    nifti(tmp_path / "masks" / "case2.nii.gz", np.full((12, 14, 5), 0.5), affine)
    with pytest.raises(DataError, match="one class number per voxel"):
        data.read(tmp_path).mask(12)


def test_a_mask_named_for_two_volumes_must_fit_both(tmp_path):
    nifti(tmp_path / "m.nii.gz", np.ones((12, 14, 5), np.uint8), turned("RAS"))
    nifti(tmp_path / "a.nii.gz", bright(0), turned("RAS"))
    nifti(tmp_path / "b.nii.gz", bright(1), turned("RAS", (1.0, 1.0, 2.0)))
    (tmp_path / "t.csv").write_text("image,mask\na.nii.gz,m.nii.gz\nb.nii.gz,m.nii.gz\n")
    with pytest.raises(
        DataError, match=r"m\.nii\.gz: the mask has voxels of 1 x 1 x 1 mm, its volume b\.nii\.gz 2 x 1 x 1"
    ):
        data.read(tmp_path / "t.csv")


@pytest.mark.parametrize(("image", "mask"), [
    ("imagesTr/case{}_0000.nii.gz", "labelsTr/case{}.nii.gz"),
    ("imagesTr/case{}.nii.gz", "labelsTr/case{}.nii.gz"),
    ("train/images/case{}.nii", "train/masks/case{}_seg.nii.gz"),
])  # fmt: skip
def test_usual_names_of_masks(tmp_path, image, mask):
    for k in range(2):
        nifti(tmp_path / image.format(k), bright(k))
        nifti(tmp_path / mask.format(k), np.full((12, 14, 5), k, np.uint8))
    images = data.read(tmp_path)
    assert images.task == "mask" and [int(images.mask(k).max()) for k in (0, 5)] == [0, 1]


def test_the_doctor_on_volumes(tmp_path):
    empty_ends = bright(0, (40, 44, 9))
    empty_ends[..., :2] = empty_ends[..., 8:] = 0
    nifti(tmp_path / "a.nii.gz", empty_ends)
    nifti(tmp_path / "b.nii.gz", bright(1, (40, 44, 9)))
    nifti(tmp_path / "c.nii.gz", bright(2, (40, 44, 9)), turned("LPS", (1.0, 1.0, 5.0)))
    nifti(tmp_path / "d.nii.gz", bright(3, (40, 44, 9)), turned("RAS", (3.0, 1.0, 1.0)))
    whole = nifti(tmp_path / "e.nii.gz", bright(4)).read_bytes()
    (tmp_path / "e.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "f.nii").write_bytes(b"text" * 200)
    report = check(tmp_path)
    found = {p.kind: p for p in report.problems}
    assert found["truncated file"].files == [f"e.nii.gz[{k}]" for k in range(5)] and not report.ok
    assert found["corrupt file"].files == ["f.nii"]
    assert found["mm of pixels or voxels unlike most (1 x 1 x 1)"].files == [
        "c.nii.gz (5 x 1 x 1)",
        "d.nii.gz (1 x 1 x 3)",
    ]
    assert found["axial slices have long pixels"].files == ["d.nii.gz (1 x 3 mm)"]
    assert not any(kind.startswith("constant picture") for kind in found)
    assert "4 volumes, films or slides of 9 frames" in report.text() or "of 5 to 9 frames" in report.text()


def test_embed_and_evaluate_slice_wise(cohort):
    from vitkit import weights
    from vitkit.evaluate.features import features

    vit = weights.load(
        "vit_tiny_patch16_224", arch_kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2}, patch_size=4, image_size=8,
        pretrained=False, seed=0, say=lambda text: None,
    )  # fmt: skip
    images = data.read(cohort)
    rows = features(vit, images, batch_size=16, workers=0)
    numbers, _ = scans.volumes(images)
    pooled = np.stack([np.asarray(rows)[numbers == k].mean(0) for k in range(8)])
    assert pooled.shape == (8, 16) and np.isfinite(pooled).all()


def test_real_volumes_where_there_are_any():
    """Files in $VITKIT_DATA (none are bundled; the files written above are the proof)."""
    import nibabel

    for path in sorted(Path(os.environ.get("VITKIT_DATA", "/nowhere"), "medical_formats", "nifti").glob("*")):
        stored = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        stored = stored if stored.ndim == 3 else stored[..., 0]
        assert np.allclose(volume.read(path, orientation="SAR").data, stored.transpose(2, 1, 0)), path
