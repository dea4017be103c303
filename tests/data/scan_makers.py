"""DICOM and NIfTI files, written when a test asks for them: every tag can be set, left out, or be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
DX = "1.2.840.10008.5.1.4.1.1.1.1"
GONE = object()


def uid(*words: object) -> str:
    """The same UID for the same words."""
    return generate_uid(entropy_srcs=["vitkit", *map(str, words)])


def dataset(pixels: np.ndarray, **tags: object) -> Dataset:
    """A picture of uint8/uint16/int16 (H, W), or (H, W, 3) as RGB, or frames first. A tag set to GONE is left out."""
    pixels = np.asarray(pixels)
    colour = pixels.ndim > 2 and pixels.shape[-1] == 3
    frames = pixels.ndim - (3 if colour else 2)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.Modality = DX, "DX"
    ds.SOPInstanceUID = generate_uid()
    ds.Rows, ds.Columns = pixels.shape[frames : frames + 2]
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        ds.PlanarConfiguration = 0
    if frames:
        ds.NumberOfFrames = len(pixels)
    bits = pixels.dtype.itemsize * 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    raw = pixels.tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in tags.items():
        if value is GONE:
            if name in ds:
                del ds[name]
        elif isinstance(value, (Dataset, list)) and name.endswith("Sequence"):
            setattr(ds, name, Sequence(value if isinstance(value, list) else [value]))
        elif name != "TransferSyntaxUID":
            setattr(ds, name, value)
    if "TransferSyntaxUID" in tags:
        ds.file_meta.TransferSyntaxUID = tags["TransferSyntaxUID"]
    return ds


def save(path: Path, ds: Dataset, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", DX)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", uid("none"))
    ds.save_as(path, enforce_file_format=True, **options)
    return path


def dicom(path: Path, pixels: np.ndarray, **tags: object) -> Path:
    return save(path, dataset(pixels, **tags))


def lut(entries: list[int], first: int = 0, bits: int = 16) -> Dataset:
    """An item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


def ct_series(folder: Path, places: list[float], *, size: int = 6, series: str = "a", **tags: object) -> list[Path]:
    """CT slices whose stored values are their place + 1100 (HU: place + 76); named so that names tell no order."""
    paths = []
    for k, place in enumerate(places):
        pixels = np.full((size, size + 2), round(place) + 1100, np.int16)
        pixels[0, 0] = 1000 + k
        own = {
            "SOPClassUID": CT,
            "Modality": "CT",
            "SeriesInstanceUID": uid("series", series),
            "StudyInstanceUID": uid("study", series),
            "SOPInstanceUID": uid(series, k, place),
            "InstanceNumber": k + 1,
            "ImagePositionPatient": [-10.0, -20.0, place],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.5, 0.75],
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "PatientID": f"patient of {series}",
        }
        paths.append(dicom(folder / f"{(k * 7) % 10}_{series}_{k}.dcm", pixels, **(own | tags)))
    return paths


def nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None, **header: object) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine)
    if "units" in header:
        image.header.set_xyzt_units(header["units"])
    if "slope" in header:
        image.header.set_slope_inter(header["slope"], header["inter"])
    image.to_filename(path)
    return path
