"""DICOM wherever files are read: folders, tables, single files; frames, patients as groups, the doctor's findings."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import picture, table, texture
from tests.data.scan_makers import CT, GONE, MR, ct_series, dataset, dicom, save, uid
from vitkit import data
from vitkit.data import check, loader, scans, splits
from vitkit.errors import ConfigError, DataError


def scan(path, seed=0, patient="p", **tags):
    """An X-ray of its own study."""
    own = {"PatientID": patient, "StudyInstanceUID": uid("study", patient), "SeriesInstanceUID": uid("s", path.name)}
    own |= {"SOPInstanceUID": uid("x", path.name, path.parent.name)}
    return dicom(path, texture(seed, channels=1), **(own | tags))


@pytest.fixture
def classes(tmp_path):
    """Two classes of twelve X-rays, two of each patient; half the names have no ending."""
    for k in range(24):
        name = f"{k:02d}.dcm" if k % 2 else f"IM{k:02d}"
        scan(tmp_path / "set" / "ab"[k // 12] / name, k, f"DOE^JANE {k // 2}")
    return tmp_path / "set"


def problem(report, kind):
    found = [p for p in report.problems if kind in p.kind]
    assert len(found) == 1, (kind, report.problems)
    return found[0]


def test_class_folders_of_dicom_with_and_without_ending(classes):
    images = data.read(classes)
    assert len(images) == 24 and images.classes == ["a", "b"] and images.names[0] == "a/01.dcm"
    assert set(images.counts) == {"train", "val", "test"}
    k = images.names.index("a/IM02")
    assert (images.decode(k)[0].numpy() == texture(2, channels=1)).all() and images.labels[k] == 0
    assert "24 DICOM files: rescale, then the window of each file, MONOCHROME1 turned over, 8 bits" in images.understood


def test_patients_are_groups_and_their_identity_is_not_kept(classes, tmp_path):
    images = data.read(classes)
    assert len(set(images.group.tolist())) == 12 and splits.leaks(images) == {}
    assert images.group[0].startswith("patient 00")
    file = splits.save(images, tmp_path / "splits.csv")
    written = file.read_text() + "".join(images.understood) + repr(images) + check(classes).text()
    written += repr(images.store.headers[0])
    assert "DOE" not in written and "JANE" not in written and "patient 0001" in written
    assert (splits.load(images, file).split == images.split).all()


def test_patients_stay_together_where_the_class_folders_are_read_twice(classes):
    one, two = data.read(classes), data.read(classes)
    assert one.group.tolist() == two.group.tolist() and one.fingerprint == two.fingerprint
    for k in range(12):
        pair = [
            i for i, name in enumerate(one.names) if int(name[-6:-4] if name.endswith("dcm") else name[-2:]) // 2 == k
        ]
        assert len({one.group[i] for i in pair}) == 1 and len({one.split[i] for i in pair}) == 1


def test_a_run_on_disk_holds_no_identity(tmp_path):
    import vitkit

    for k in range(16):
        scan(tmp_path / "set" / "ab"[k % 2] / f"{k}.dcm", k, f"DOE {k // 2}", PatientName="ROE^RICHARD",
             PatientBirthDate="19700102")  # fmt: skip
    tiny = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 4}
    model = {"model": "VisionTransformer", "arch_kwargs": tiny, "pretrained": False, "image_size": 12, "quiet": True}
    path = str(tmp_path / "set")
    vitkit.adapt("linear", data=path, out=str(tmp_path / "run"), epochs=1, batch_size=4, accelerator="cpu", **model)
    vitkit.embed(data=path, out=str(tmp_path / "rows"), accelerator="cpu", **model)
    files = [file for top in ("run", "rows") for file in (tmp_path / top).rglob("*") if file.is_file()]
    assert {"splits.csv", "images.csv", "report.html"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert not [word for word in (b"DOE", b"ROE^", b"RICHARD", b"19700102") if word in content], file
    assert "patient 0001" in (tmp_path / "run" / "splits.csv").read_text()


@pytest.mark.parametrize("word", ["", "ANONYMOUS", "Anon", "0", GONE])
def test_words_that_stand_for_nobody_are_no_patient(tmp_path, word):
    for k in range(6):
        scan(tmp_path / f"{k}.dcm", k, word if word is not GONE else "x", StudyInstanceUID=uid("study", k // 2),
             **({"PatientID": GONE} if word is GONE else {}))  # fmt: skip
    images = data.read(tmp_path)
    assert images.group.tolist() == [f"study {k // 2 + 1:04d}" for k in range(6)]
    assert "groups: 3 studies by StudyInstanceUID" in " ".join(images.understood)


def test_pictures_of_a_study_without_a_patient_go_with_its_patient(tmp_path):
    for k in range(8):
        lost = {"PatientID": GONE} if k % 2 else {}
        scan(tmp_path / f"{k}.dcm", k, f"p{k // 4}", StudyInstanceUID=uid("study", k // 2), **lost)
    images = data.read(tmp_path)
    assert images.group.tolist() == ["patient 0001"] * 4 + ["patient 0002"] * 4
    assert "groups: 2 patients by PatientID" in " ".join(images.understood)


def test_one_identity_for_all_studies_is_said(tmp_path):
    for k in range(4):
        scan(tmp_path / f"{k}.dcm", k, "site", StudyInstanceUID=uid("study", k))
    assert "WARNING: all studies carry the same PatientID" in " ".join(data.read(tmp_path).understood)


def test_same_id_of_two_issuers_is_two_patients(tmp_path):
    scan(tmp_path / "a.dcm", 1, "7", IssuerOfPatientID="north")
    scan(tmp_path / "b.dcm", 2, "7", IssuerOfPatientID="south")
    assert len(set(data.read(tmp_path).group.tolist())) == 2


def test_table_with_its_own_groups_keeps_them_and_names_contradictions(tmp_path):
    for k in range(4):
        scan(tmp_path / f"{k}.dcm", k, "same")
    table(
        tmp_path / "labels.csv", "path,label,patient\n" + "".join(f"{k}.dcm,{'ab'[k % 2]},own {k}\n" for k in range(4))
    )
    images = data.read(tmp_path / "labels.csv")
    assert images.group.tolist() == [f"own {k}" for k in range(4)] and images.classes == ["a", "b"]
    assert "WARNING: 1 patient (by PatientID) in more than one of the groups given" in images.understood


def test_split_folders_that_share_a_patient_are_named(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            scan(tmp_path / split / name / f"{split}.dcm", len(split), "same")
    report = check(tmp_path)
    assert problem(report, "groups in several splits").files == ["patient 0001 (train, test)"] and not report.ok


def test_dicom_and_png_in_one_set(tmp_path):
    picture(tmp_path / "a.png", 1, channels=1)
    scan(tmp_path / "b.dcm", 2)
    images = data.read(tmp_path)
    assert [images.decode(k).shape for k in range(2)] == [(1, 48, 48)] * 2
    assert (images.decode(0)[0].numpy() == texture(1, channels=1)).all()
    assert images.store.raw(0) and images.store.raw(1) is None
    assert images.paths == [str(tmp_path / "a.png"), str(tmp_path / "b.dcm")]


def test_names_that_end_in_digits_and_the_index_of_a_disc(tmp_path):
    scan(tmp_path / "1.2.840.113619.2", 1)
    scan(tmp_path / "DICOMDIR", 2)
    (tmp_path / "notes.1").write_text("no scan")
    assert data.read(tmp_path).names == ["1.2.840.113619.2"]


# frames


def film(path, frames=5, **tags):
    pixels = np.stack([texture(k, 40, 40, 1) for k in range(frames)])
    return dicom(path, pixels, PatientID="film", **tags)


def test_each_frame_is_an_image_and_said(tmp_path):
    film(tmp_path / "film.dcm")
    scan(tmp_path / "z.dcm", 9)
    images = data.read(tmp_path)
    assert images.names == [*(f"film.dcm[{k}]" for k in range(5)), "z.dcm"]
    assert "1 file with several frames (5): each frame is an image" in images.understood
    for k in range(5):
        assert (images.decode(k)[0].numpy() == texture(k, 40, 40, 1)).all()
    assert images.path(3).endswith("film.dcm[3]") and len(set(images.group[:5].tolist())) == 1
    assert scans.volumes(images)[0].tolist() == [0] * 5 + [1] and scans.volumes(images)[1].tolist()[:5] == [*range(5)]


@pytest.mark.parametrize(("frames", "kept"), [("middle", [2]), (2, [1, 3]), ("3", [0, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_some_frames(tmp_path, frames, kept):
    film(tmp_path / "film.dcm")
    images = data.read(tmp_path, frames=frames)
    assert images.names == [f"film.dcm[{k}]" for k in kept]
    assert len(kept) == 5 or f"frames={frames}: {len(kept)} of 5 slices taken" in images.understood


def test_frame_column(tmp_path):
    film(tmp_path / "film.dcm")
    scan(tmp_path / "one.dcm", 7)
    table(tmp_path / "t.csv", "path,label,frame\nfilm.dcm,a,3\nfilm.dcm,b,0\none.dcm,a,\n")
    images = data.read(tmp_path / "t.csv")
    assert images.names == ["film.dcm[3]", "film.dcm[0]", "one.dcm"] and images.labels.tolist() == [0, 1, 0]
    assert (images.decode(0)[0].numpy() == texture(3, 40, 40, 1)).all()
    table(tmp_path / "u.csv", "path,label,frame\nfilm.dcm,a,5\none.dcm,b,\n")
    with pytest.raises(DataError, match=r"film\.dcm: there is no frame 5"):
        data.read(tmp_path / "u.csv")
    table(tmp_path / "v.csv", "path,label,frame\nfilm.dcm,a,last\none.dcm,b,\n")
    with pytest.raises(DataError, match=r"column 'frame' holds last \(row 1\)"):
        data.read(tmp_path / "v.csv")


def test_wrong_choices(tmp_path):
    film(tmp_path / "film.dcm")
    for given, text in (({"frames": 0}, "frames=0"), ({"plane": "coronial"}, "did you mean coronal"),
                        ({"window": (1, -1)}, "window=")):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            data.read(tmp_path, **given)
    picture(tmp_path / "png" / "a.png")
    with pytest.raises(ConfigError, match="are for DICOM and NIfTI"):
        data.read(tmp_path / "png", window=(40, 400))


def test_window_reaches_the_pixels_and_the_fingerprint(tmp_path):
    ct_series(tmp_path, [0.0, 40.0])
    plain, windowed = data.read(tmp_path), data.read(tmp_path, window=(76, 200))
    k = windowed.names.index("0_a_0.dcm")  # HU 76
    assert windowed.decode(k)[0, 3, 3] == 128 and plain.fingerprint != windowed.fingerprint


# one file, tar, loader, model


def test_a_single_file(tmp_path):
    film(tmp_path / "film.dcm", 3)
    images = data.read(tmp_path / "film.dcm")
    assert len(images) == 3 and images.task is None
    scan(tmp_path / "noending", 1)
    assert len(data.read(tmp_path / "noending")) == 1


def test_dicom_in_tar_shards(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for k in range(2):
            tar.add(scan(tmp_path / f"{k}.dcm", k), f"{k}.dcm")
            (tmp_path / f"{k}.cls").write_text("ab"[k])
            tar.add(tmp_path / f"{k}.cls", f"{k}.cls")
    images = data.read(tmp_path / "train-0.tar", val_fraction=0, test_fraction=0)
    assert (images.decode(1)[0].numpy() == texture(1, channels=1)).all()


def test_workers_read_frames(tmp_path):
    film(tmp_path / "film.dcm")
    images = data.read(tmp_path)
    batches = [
        next(iter(loader.loader(images, lambda image: image, batch_size=5, seed=0, shuffle=False, workers=n)))
        for n in (0, 1)
    ]
    assert (batches[0]["image"] == batches[1]["image"]).all()


# what is no picture, what is broken


def test_objects_without_pictures_are_left_out_by_name(tmp_path):
    scan(tmp_path / "a.dcm")
    report = dataset(np.zeros((1, 2), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for tag in ("Rows", "Columns", "PixelData", "BitsAllocated"):
        del report[tag]
    save(tmp_path / "sr.dcm", report)
    dicom(tmp_path / "seg.dcm", np.zeros((2, 4, 4), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    images = data.read(tmp_path)
    assert images.names == ["a.dcm"]
    words = " ".join(images.understood)
    assert "left out: 2 DICOM files that are no pictures" in words
    assert "1 Basic Text SR Storage" in words and "1 Segmentation Storage" in words
    (tmp_path / "a.dcm").unlink()
    with pytest.raises(DataError, match=r"holds no pictures, only 1 "):
        data.read(tmp_path)


def test_broken_files_are_named_counted_and_limited(classes):
    raw = (classes / "a" / "01.dcm").read_bytes()
    (classes / "a" / "cut.dcm").write_bytes(raw[:-800])
    (classes / "a" / "junk.dcm").write_bytes(b"x" * 999)
    (classes / "b" / "empty.dcm").write_bytes(b"")
    dicom(classes / "b" / "tags.dcm", np.zeros((4, 4), np.uint8), Rows=GONE)
    images = data.read(classes)
    assert "WARNING: 3 files cannot be read" in " ".join(images.understood)  # the cut one is found by its pixels
    with pytest.raises(DataError, match=r"junk\.dcm: not a DICOM file"):
        images.decode(images.names.index("a/junk.dcm"))
    report = check(classes)
    assert problem(report, "truncated file").files == ["a/cut.dcm"]
    assert problem(report, "not an image").files == ["a/junk.dcm"]
    assert problem(report, "empty file").files == ["b/empty.dcm"]
    assert problem(report, "DICOM tags missing or wrong").files == ["b/tags.dcm"]
    assert not report.ok
    with pytest.raises(DataError, match=r"more than max_bad=0\.01"):
        list(loader.loader(images, lambda image: image[:, :4, :4], batch_size=8, seed=0))


def test_missing_extra(classes, monkeypatch):
    import builtins

    from vitkit.errors import MissingExtra

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pydicom":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"vitkit\[medical\]"):
        data.read(classes)


# the doctor


def test_good_scans_have_little_to_complain_about(classes):
    report = check(classes)
    assert report.ok and {p.severity for p in report.problems} <= {"warning", "note"}
    assert [p.kind for p in report.problems] == [
        "tags that identify persons are filled in (PatientID)",
        "no window: all values of 8 bits",
    ]
    assert "scans: 24 DICOM files" in report.facts and "modality: DX 24" in report.facts


def test_findings_of_the_doctor(tmp_path):
    scan(tmp_path / "a.dcm", 1)
    scan(tmp_path / "b.dcm", 2, PhotometricInterpretation="MONOCHROME1", PatientName="ROE^RICHARD", WindowCenter=90,
         WindowWidth=200)  # fmt: skip
    scan(tmp_path / "c.dcm", 3, PhotometricInterpretation=GONE, BurnedInAnnotation="YES")
    scan(tmp_path / "d.dcm", 4, SOPInstanceUID=uid("x", "a.dcm", tmp_path.name), Modality="MR", SOPClassUID=MR)
    scan(tmp_path / "e.dcm", 5, PixelSpacing=[0.1, 0.1], RescaleSlope=0, PatientIdentityRemoved="YES")
    scan(tmp_path / "f.dcm", 6, PixelSpacing=[0.2, 0.2])
    scan(tmp_path / "g.dcm", 7, PixelSpacing=[0.2, 0.2], PresentationLUTShape="INVERSE")
    dicom(tmp_path / "h.dcm", texture(8), PatientID="p")
    dicom(tmp_path / "i.dcm", texture(9, channels=1).astype(np.uint16) * 16, PatientID="p")
    report = check(tmp_path)
    assert report.ok
    assert problem(report, "no PhotometricInterpretation: taken as MONOCHROME2").files == ["c.dcm"]
    assert problem(report, "the same SOPInstanceUID").files == ["a.dcm = d.dcm"]
    assert problem(report, "modality other than DX").files == ["d.dcm (MR)"]
    assert problem(report, "MONOCHROME1 among MONOCHROME2").files == ["b.dcm"]
    assert problem(report, "RescaleSlope 0: taken as 1").files == ["e.dcm"]
    assert problem(report, "contradicts MONOCHROME2").files == ["g.dcm"]
    assert problem(report, "mm of pixels or voxels unlike most (0.2 x 0.2)").files == ["e.dcm (0.1 x 0.1)"]
    assert problem(report, "these are colour").files == ["h.dcm"]
    assert problem(report, "percentile").files == ["i.dcm"]
    assert problem(report, "burned into the pixels").files == ["c.dcm"]
    phi = problem(report, "tags that identify persons")
    assert "PatientName" in phi.kind and "e.dcm" not in phi.files and len(phi.files) == 8
    assert "ROE" not in report.text()


def test_no_window_is_not_noted_where_one_is_chosen(tmp_path):
    ct_series(tmp_path, [0.0, 2.0, 4.0])
    assert any("no window: centre 40" in p.kind for p in check(tmp_path).problems)
    assert not any("no window" in p.kind for p in check(tmp_path, window=(40, 400)).problems)


def test_gaps_copies_and_mixed_planes_of_series(tmp_path):
    ct_series(tmp_path, [0.0, 2.0, 4.0, 10.0, 12.0], series="gap")
    ct_series(tmp_path, [0.0, 2.0, 2.0, 4.0], series="double")
    paths = ct_series(tmp_path, [0.0, 2.0, 4.0], series="mixed")
    import pydicom

    ds = pydicom.dcmread(paths[1])
    ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    ds.save_as(paths[1])
    report = check(tmp_path)
    assert "gap of 6 mm between" in problem(report, "gaps between slices").files[0]
    assert "1 slice at a place that another has already" in problem(report, "several slices at one place").files[0]
    assert "different orientation" in problem(report, "do not belong together").files[0]
    assert [os.path.basename(paths[1]) in text for text in problem(report, "plane (Image").files] == [True]
    images = data.read(tmp_path)
    numbers, places = scans.volumes(images)
    by_volume = {tuple(sorted(places[numbers == k].tolist())) for k in set(numbers.tolist())}
    assert by_volume == {(0, 1, 2, 3, 4), (0, 1, 2), (0,)}  # the mixed series and the double slice stay single pictures
    assert images.store.headers[0].modality == "CT" and CT


def test_real_files_where_there_are_any():
    """Files of several makers in $VITKIT_DATA (none are bundled; the files written above are the proof)."""
    from vitkit.data.dicom import decode

    for path in sorted(Path(os.environ.get("VITKIT_DATA", "/nowhere"), "medical_formats").glob("dicom*/*.dcm")):
        array, facts = decode(path)
        assert array.dtype == np.uint8 and array.any() and facts.format == "DICOM", path
