"""What a DICOM file says about its picture: tags read forgivingly, assumptions written down, nothing guessed in silence.

Numbers may be missing, empty, text or several; a functional group of one frame (enhanced multi-frame files) is asked
before the shared one, and that before the file itself.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingExtra


def _listed(words: str) -> list[str]:
    return words.split()


SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
# Tags that name or describe a person; what they hold is never repeated.
PHI = _listed(
    "PatientName PatientID PatientBirthDate PatientAddress PatientTelephoneNumbers PatientMotherBirthName OtherPatientIDs "
    "OtherPatientNames PatientBirthName ReferringPhysicianName PerformingPhysicianName OperatorsName InstitutionAddress "
    "AccessionNumber MilitaryRank CountryOfResidence"
)
# What anonymisers write instead of an identity: the same word for everybody tells nobody apart.
_NOBODY = frozenset(
    _listed(
        "0 00000000 none null na n/a nan unknown anon anonymous anonymized anonymised anonymity deidentified de-identified "
        "removed redacted hidden patient test xxx no_id noid not_available"
    )
)
_GROUPS = {
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "VOILUTFunction": "FrameVOILUTSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
}
_HEADER = _listed(
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID InstanceNumber Modality PatientIdentityRemoved "
    "BurnedInAnnotation IssuerOfPatientID SamplesPerPixel PhotometricInterpretation PresentationLUTShape NumberOfFrames "
    "Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation PlanarConfiguration ImagerPixelSpacing "
    "SliceLocation ModalityLUTSequence VOILUTSequence PerFrameFunctionalGroupsSequence SharedFunctionalGroupsSequence"
)
_MASKS = "1.2.840.10008.5.1.4.1.1.66.4"  # SOP class of segmentation objects


def is_dicom(path: str | Path) -> bool:
    """Whether the file carries the DICOM mark (`DICM` at byte 128); its name does not matter."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def pydicom() -> Any:
    """The package, or MissingExtra."""
    try:
        import pydicom as module
    except ImportError:
        raise MissingExtra("pydicom", "medical") from None
    # It warns about every odd value of every file; what matters of it is in our own notes and errors.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")
    return module


def open_file(source: str | Path | bytes, name: str, **options: Any) -> Any:
    """A pydicom Dataset. Files without the DICM mark are read when they begin like DICOM did before it had one.

    Raises DataError naming the file. `options` go to `pydicom.dcmread`.
    """
    module = pydicom()
    start = source[:132] if isinstance(source, bytes) else _start(source, name)
    if not start:
        raise DataError(f"{name}: the file is empty (0 bytes)", fix=_REPLACE)
    force = start[128:] != b"DICM"
    if force and not ((start[:1] in b"\x02\x08" and start[1:2] == b"\0" and start[2:4] != b"\0\0") or _bare(start)):
        raise DataError(
            f"{name}: not a DICOM file (no DICM mark at byte 128; it starts with {start[:8].hex(' ')})", fix=_REPLACE
        )
    try:
        ds = module.dcmread(io.BytesIO(source) if isinstance(source, bytes) else source, force=force, **options)
        len(list(ds.keys()))
        if "TransferSyntaxUID" not in ds.file_meta:
            implicit, little = ds.original_encoding
            uid = module.uid
            plain = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
            ds.file_meta.TransferSyntaxUID = plain if little else uid.ExplicitVRBigEndian
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: corrupt DICOM file ({_words(error)})", fix=_REPLACE) from None
    return ds


_REPLACE = "replace the file by an intact copy or remove it from the data (`vitkit check` lists all such files)"


def _start(path: str | Path, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(132)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror or error})", fix="restore the file or remove it from the data"
        ) from None


def _bare(start: bytes) -> bool:
    """Group length (0008,0000) first, as files of the 1990s begin."""
    return start[:8] == b"\x08\0\0\0\x04\0\0\0"


def _words(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def get(ds: Any, keyword: str, frame: int = 0) -> Any:
    """The value of a tag for one frame; None when it is missing, empty or unreadable."""
    group = _GROUPS.get(keyword)
    if group:
        for outer, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
            items = _plain(ds, outer)
            if items is not None and index < len(items):
                inner = _plain(items[index], group)
                value = _plain(inner[0], keyword) if inner else None
                if value is not None:
                    return value
    return _plain(ds, keyword)


def _plain(ds: Any, keyword: str) -> Any:
    try:
        value = ds.get(keyword)
    except Exception:  # a value that its type does not allow ("abc" for a number): as good as none
        return None
    if value is None or (isinstance(value, str | bytes) and not value):
        return None
    return value


def numbers(ds: Any, keyword: str, frame: int = 0) -> list[float]:
    """All numbers of a tag, in order; [] when there is none or one of them is no finite number."""
    value = get(ds, keyword, frame)
    if value is None:
        return []
    several = isinstance(value, list | tuple) or (hasattr(value, "__iter__") and not isinstance(value, str | bytes))
    try:
        found = [float(part) for part in (value if several else [value])]
    except (TypeError, ValueError):
        return []
    return found if all(map(math.isfinite, found)) else []


def number(ds: Any, keyword: str, frame: int = 0) -> float | None:
    """The first number of a tag, or None."""
    return next(iter(numbers(ds, keyword, frame)), None)


def text(ds: Any, keyword: str, frame: int = 0) -> str:
    """A tag as stripped text ("" when missing; the first of several values)."""
    value = get(ds, keyword, frame)
    if value is None:
        return ""
    if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue":
        value = value[0] if len(value) else ""
    return str(value).strip().strip("\0")


@dataclass(frozen=True)
class Layout:
    """How the stored numbers are laid out, after the rules for missing tags; `assumed` says which were used."""

    rows: int
    columns: int
    samples: int
    frames: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    planar: int
    assumed: tuple[str, ...] = ()


def layout(ds: Any, name: str) -> Layout:
    """The picture's layout. Raises DataError naming the tags without which nothing can be read."""
    required = {tag: number(ds, tag) for tag in ("Rows", "Columns", "BitsAllocated")}
    missing = [tag for tag, value in required.items() if not value]
    kind = _not_a_picture(ds) if missing else ""
    if kind:
        fix = "leave it out, or replace it by an intact copy if it was a picture"
        raise DataError(f"{name}: a DICOM file that holds no picture ({kind})", fix=fix)
    if missing:
        raise DataError(
            f"{name}: DICOM tags are missing or zero: {', '.join(missing)}",
            fix="export the picture again from its source",
        )
    rows, columns, allocated = (int(required[tag] or 0) for tag in ("Rows", "Columns", "BitsAllocated"))
    assumed = []

    def optional(tag: str, rule: int, words: str) -> int:
        value = number(ds, tag)
        if value is None and words:
            assumed.append(f"no {tag}: {words}")
        return rule if value is None else int(value)

    photometric = text(ds, "PhotometricInterpretation").upper()
    colour = photometric[:3] in ("RGB", "YBR")
    samples = optional("SamplesPerPixel", 3 if colour else 1, f"taken as {3 if colour else 1}")
    if not photometric:
        photometric = "RGB" if samples == 3 else "MONOCHROME2"
        assumed.append(f"no PhotometricInterpretation: taken as {photometric}")
    stored = optional("BitsStored", allocated, "taken as BitsAllocated")
    high = optional("HighBit", stored - 1, "")
    signed = optional("PixelRepresentation", 0, "taken as unsigned")
    planar = optional("PlanarConfiguration", 0, "taken as 0" if samples == 3 else "")
    if not 0 < stored <= allocated or not stored - 1 <= high < max(allocated, stored):
        raise DataError(
            f"{name}: BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} contradict each other",
            fix="export the picture again from its source",
        )
    frames = max(1, int(number(ds, "NumberOfFrames") or 1))
    return Layout(
        rows, columns, samples, frames, photometric, allocated, stored, high, signed == 1, planar, tuple(assumed)
    )


@dataclass(frozen=True)
class Header:
    """What the index and the doctor know of a file without its pixels. `patient` is for grouping only: never written."""

    path: str
    frames: int = 1
    size: tuple[int, int] = (0, 0)
    photometric: str = ""
    modality: str = ""
    syntax: str = ""
    series: str = ""
    sop: str = ""
    patient: str = field(default="", repr=False)
    study: str = field(default="", repr=False)
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()
    location: float | None = None
    number: float | None = None
    phi: tuple[str, ...] = ()
    burned_in: bool = False
    notes: tuple[str, ...] = ()
    no_picture: str = ""  # why a valid file is no picture, e.g. "structured report"
    problem: str = ""  # the error, when it could not be read


def header(path: str | Path) -> Header:
    """Read a file's tags, not its pixels. Damage is recorded in `problem`, never raised."""
    name = str(path)
    tags = [*_HEADER, *_GROUPS, *PHI]
    try:
        ds = open_file(path, name, stop_before_pixels=True, specific_tags=tags)
        kind = _not_a_picture(ds)
        if kind:
            return Header(name, no_picture=kind, sop=text(ds, "SOPInstanceUID"))
        shape = layout(ds, name)
    except DataError as error:
        return Header(name, problem=str(error))
    from .windowing import rule

    located = {
        tag: tuple(numbers(ds, tag)) for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    }
    phi = () if text(ds, "PatientIdentityRemoved").upper() == "YES" else _personal(ds)
    notes = [*shape.assumed, *rule(ds, shape)]
    inverse = text(ds, "PresentationLUTShape").upper() == "INVERSE"
    if inverse and shape.photometric == "MONOCHROME2":
        notes.append("PresentationLUTShape INVERSE contradicts MONOCHROME2: not inverted")
    return Header(
        name,
        frames=shape.frames,
        size=(shape.rows, shape.columns),
        photometric=shape.photometric,
        modality=text(ds, "Modality"),
        syntax=ds.file_meta.TransferSyntaxUID,
        series=text(ds, "SeriesInstanceUID"),
        sop=text(ds, "SOPInstanceUID"),
        patient=_patient(ds),
        study=text(ds, "StudyInstanceUID"),
        position=located["ImagePositionPatient"],
        orientation=located["ImageOrientationPatient"],
        spacing=located["PixelSpacing"] or tuple(numbers(ds, "ImagerPixelSpacing")),
        location=number(ds, "SliceLocation"),
        number=number(ds, "InstanceNumber"),
        phi=phi,
        burned_in=text(ds, "BurnedInAnnotation").upper() == "YES",
        notes=tuple(notes),
    )


def _not_a_picture(ds: Any) -> str:
    """Why a valid DICOM object is not read as a picture: reports, plans, presentation states, masks; "" if it is one."""
    kind = ds.file_meta.get("MediaStorageSOPClassUID") or ""
    uid = text(ds, "SOPClassUID") or str(kind)
    if uid == _MASKS:
        return "Segmentation Storage"
    if number(ds, "Rows") or number(ds, "Columns") or not uid:
        return ""
    known = pydicom().uid.UID(uid)
    words = known.name if known.name != uid else f"SOP class {uid}"
    is_picture = "Image Storage" in words or words == f"SOP class {uid}"
    return "" if is_picture else words


def _patient(ds: Any) -> str:
    """Something that is the same for all pictures of one person, or "" (anonymised to a word that everybody gets)."""
    known = text(ds, "PatientID")
    if not known or known.lower().replace(" ", "_") in _NOBODY:
        return ""
    return f"{text(ds, 'IssuerOfPatientID')}\0{known}"


def _personal(ds: Any) -> tuple[str, ...]:
    def empty(value: str) -> bool:
        plain = value.lower().strip("^ ").replace("^", "_").replace(" ", "_")
        return not plain or plain in _NOBODY or plain.startswith(("anon", "deident", "de-ident", "removed"))

    return tuple(tag for tag in PHI if not empty(text(ds, tag)))
