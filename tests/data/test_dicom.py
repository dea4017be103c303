"""DICOM files of every kind give the pixel values that the standard's formulas give by hand."""

import io

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
)

from tests.data.scan_makers import CT, GONE, dataset, dicom, lut, save
from vitkit.data import pixels
from vitkit.data.dicom import decode, values
from vitkit.errors import ConfigError, DataError


def row(path, **options):
    """The first row of the decoded picture."""
    return decode(path, **options)[0][0].tolist()


def grey(tmp_path, stored, kind=np.uint16, **tags):
    return dicom(tmp_path / "a.dcm", np.array([stored], kind), **tags)


# stored -> rescale -> window (LINEAR: y = (x - (c - 0.5)) / (w - 1) + 0.5), 255 steps, half to even


def test_window_after_rescale(tmp_path):
    # HU -1024, -60, 40, 100, 976; ((x - 39.5) / 399 + 0.5) * 255 = < 0, 63.9, 127.8, 166.2, > 255
    path = grey(tmp_path, [0, 964, 1064, 1124, 2000], RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40,
                WindowWidth=400)  # fmt: skip
    assert row(path) == [0, 64, 128, 166, 255]
    assert values(path)[0].tolist() == [-1024, -60, 40, 100, 976]


def test_negative_slope_turns_the_values_over_once_and_not_the_window(tmp_path):
    # 1000 - x: 1000, 600, 500, 400, 0; window 500 / 401: ((x - 499.5) / 400 + 0.5) * 255 -> 600: 191.6, 500: 127.8
    path = grey(tmp_path, [0, 400, 500, 600, 1000], RescaleSlope=-1, RescaleIntercept=1000, WindowCenter=500,
                WindowWidth=401)  # fmt: skip
    assert row(path) == [255, 192, 128, 64, 0]


def test_negative_slope_without_a_window_keeps_large_values_bright(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[0, 100, 255]], np.uint8), RescaleSlope=-1, RescaleIntercept=255)
    assert row(path) == [255, 155, 0]


@pytest.mark.parametrize("width", [1, 255])
def test_monochrome1_is_the_exact_negative_after_windowing(tmp_path, width):
    tags = {"WindowCenter": 100, "WindowWidth": width}
    stored = list(range(0, 256, 5))
    plain = row(grey(tmp_path, stored, **tags))
    turned = row(grey(tmp_path, stored, PhotometricInterpretation="MONOCHROME1", **tags))
    assert [255 - value for value in plain] == turned
    if width == 1:  # x <= c - 0.5 is black, above is white
        assert plain == [0 if value <= 99 else 255 for value in stored]


def test_inverting_before_the_window_would_give_something_else(tmp_path):
    # 12 bits, ((x - 999.5) / 500 + 0.5) * 255: 800: 25.8, 1000: 127.8, 1200: 229.8; then 255 minus that
    path = grey(tmp_path, [0, 800, 1000, 1200, 4095], BitsStored=12, HighBit=11, WindowCenter=1000, WindowWidth=501,
                PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert row(path) == [255, 229, 127, 25, 0]


def test_signed_values(tmp_path):
    # window 0 / 201: (x + 0.5) / 200 + 0.5: -100: 0.0025 -> 0.6, 0: 0.5025 -> 128.1, 100: 1
    path = grey(tmp_path, [-32768, -100, 0, 100, 32767], np.int16, WindowCenter=0, WindowWidth=201)
    assert row(path) == [0, 1, 128, 255, 255]


def test_twelve_signed_bits_in_sixteen_have_their_sign_in_bit_11(tmp_path):
    # 0x0FFF is -1, 0x0800 is -2048; the upper four bits hold an old overlay and do not count
    path = grey(tmp_path, [0x0FFF, 0x0800, 0x07FF, 0xF001, 0x0000], np.uint16, BitsStored=12, HighBit=11,
                PixelRepresentation=1)  # fmt: skip
    assert values(path)[0].tolist() == [-1, -2048, 2047, 1, 0]


def test_unsigned_bits_beside_the_stored_ones_are_cut_off(tmp_path):
    path = grey(tmp_path, [0xF00A, 0x100B, 0x0FFF], BitsStored=12, HighBit=11)
    assert values(path)[0].tolist() == [10, 11, 4095]


def test_high_bit_fifteen_means_shifted_values(tmp_path):
    path = grey(tmp_path, [0x00F0, 0xFFF5], BitsStored=12, HighBit=15)
    assert values(path)[0].tolist() == [15, 4095]


def test_window_functions(tmp_path):
    tags = {"WindowCenter": 100, "WindowWidth": 100}
    # LINEAR_EXACT: (x - 100) / 100 + 0.5; SIGMOID: 1 / (1 + exp(-4 (x - 100) / 100))
    exact = grey(tmp_path, [50, 100, 150], VOILUTFunction="LINEAR_EXACT", **tags)
    assert row(exact) == [0, 128, 255]
    sigmoid = grey(tmp_path, [50, 100, 150], VOILUTFunction="SIGMOID", **tags)
    assert row(sigmoid) == [30, 128, 225]  # 0.1192 * 255 = 30.4, 0.5 * 255 = 127.5, 0.8808 * 255 = 224.6
    odd = grey(tmp_path, [50, 100, 150], VOILUTFunction="SOMETHING", **tags)
    assert row(odd) == row(grey(tmp_path, [50, 100, 150], **tags))  # ((x - 99.5) / 99 + 0.5)


def test_first_of_several_windows(tmp_path):
    both = grey(tmp_path, [0, 50, 100, 200], WindowCenter=[50, 1000], WindowWidth=[101, 50])
    assert row(both) == row(grey(tmp_path, [0, 50, 100, 200], WindowCenter=50, WindowWidth=101)) == [1, 129, 255, 255]


@pytest.mark.parametrize("tags", [
    {"WindowCenter": 50}, {"WindowWidth": 50}, {"WindowCenter": 50, "WindowWidth": 0},
    {"WindowCenter": "", "WindowWidth": ""}, {"WindowCenter": 50, "WindowWidth": -5},
])  # fmt: skip
def test_windows_that_cannot_be_used_count_as_none(tmp_path, tags):
    path = dicom(tmp_path / "a.dcm", np.array([[0, 77, 255]], np.uint8), **tags)
    assert row(path) == [0, 77, 255]


def test_eight_bits_without_a_window_stay_as_they_are_and_seven_are_stretched(tmp_path):
    stored = np.array([[0, 1, 127, 254, 255]], np.uint8)
    assert row(dicom(tmp_path / "a.dcm", stored)) == stored[0].tolist()
    seven = dicom(tmp_path / "b.dcm", np.array([[0, 64, 127]], np.uint8), BitsStored=7, HighBit=6)
    assert row(seven) == [0, 129, 255]  # 64 * 255 / 127 = 128.5
    signed = dicom(tmp_path / "c.dcm", np.array([[-128, 0, 127]], np.int8))
    assert row(signed) == [0, 128, 255]


def test_more_bits_without_a_window_use_percentiles(tmp_path):
    stored = np.arange(1001)[None] * 10  # percentiles 0.5 and 99.5 are 50 and 9950
    got = np.array(row(dicom(tmp_path / "a.dcm", stored.astype(np.uint16))))
    expected = np.rint(np.clip((stored[0] - 50) / 9900, 0, 1) * 255)
    assert got.tolist() == expected.tolist()
    assert row(grey(tmp_path, [7, 7, 7])) == [0, 0, 0]  # constant: nothing to stretch


def test_ct_without_a_window_has_a_fixed_one(tmp_path):
    path = grey(tmp_path, [0, 864, 1064, 1264, 4000], np.int16, SOPClassUID=CT, Modality="CT", RescaleSlope=1,
                RescaleIntercept=-1024)  # fmt: skip
    assert row(path) == [0, 0, 128, 255, 255]  # -160 HU is black, 240 HU white


def test_chosen_window_replaces_the_files_own_but_not_its_inversion(tmp_path):
    tags = {"WindowCenter": 40, "WindowWidth": 80, "RescaleSlope": 1, "RescaleIntercept": -1000}
    path = grey(tmp_path, [400, 900, 1400], **tags)
    assert row(path, window=(-100, 1000)) == [0, 128, 255]
    path = grey(tmp_path, [400, 900, 1400], PhotometricInterpretation="MONOCHROME1", **tags)
    assert row(path, window=(-100, 1000)) == [255, 127, 0]
    for window in (40, (1, 2, 3), (40, 0), ("a", "b"), (40, float("nan"))):
        with pytest.raises(ConfigError, match="window="):
            decode(path, window=window)


def test_padding_is_black_and_not_part_of_percentiles(tmp_path):
    stored = np.full((2, 1001), -2000, np.int16)
    stored[1] = np.arange(1001) * 10
    path = dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    got = decode(path)[0]
    assert (got[0] == 0).all()
    assert got[1].tolist() == (255 - np.rint(np.clip((stored[1] - 50) / 9900, 0, 1) * 255)).tolist()
    ranged = grey(tmp_path, [1, 2, 3, 50, 100], WindowCenter=50, WindowWidth=101, PixelPaddingValue=1,
                  PixelPaddingRangeLimit=3, PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert row(ranged) == [0, 0, 0, 126, 0]


# look-up tables


def test_modality_lut_comes_first_and_clamps_at_both_ends(tmp_path):
    # first mapped value 2: 0..2 -> 1000, 3 -> 500, 4 and more -> 0; then window 500 / 1001
    path = grey(tmp_path, [0, 2, 3, 4, 9], ModalityLUTSequence=lut([1000, 500, 0], 2), WindowCenter=500,
                WindowWidth=1001)  # fmt: skip
    assert values(path)[0].tolist() == [1000, 1000, 500, 0, 0]
    assert row(path) == [255, 255, 128, 0, 0]


def test_voi_lut_goes_before_a_window(tmp_path):
    path = grey(tmp_path, [0, 1, 2, 3, 60], VOILUTSequence=[lut([0, 4095, 1000], 1, 12), lut([9, 9], 0, 12)],
                WindowCenter=1, WindowWidth=2)  # fmt: skip
    assert row(path) == [0, 0, 255, 62, 62]  # 1000 / 4095 * 255 = 62.3


def test_voi_lut_of_eight_bits_with_more_than_256_entries(tmp_path):
    item = Dataset()
    item.LUTDescriptor = [1024, 0, 8]
    item.add_new(0x00283006, "OW", bytes(k // 4 for k in range(1024)))  # one entry a byte
    assert row(grey(tmp_path, [0, 255, 256, 600, 1023], VOILUTSequence=item)) == [0, 63, 64, 150, 255]


def test_voi_lut_of_words_that_do_not_use_all_their_bits(tmp_path):
    path = grey(tmp_path, [0, 1, 2], VOILUTSequence=lut([0, 2048, 4095], 0, 12))
    assert row(path) == [0, 128, 255]
    wrong = grey(tmp_path, [0, 1], VOILUTSequence=lut([0, 300], 0, 8))  # says 8 bits, holds more
    assert row(wrong) == [0, 255]


def test_voi_lut_over_signed_values_with_an_unsigned_first_value(tmp_path):
    path = grey(tmp_path, [-2, -1, 0, 5], np.int16, VOILUTSequence=lut([0, 100, 255], 65534, 8))
    assert row(path) == [0, 100, 255, 255]


def test_voi_lut_reads_every_slice_of_a_series_alike(tmp_path):
    # stored 0..4095 minus 1024: a first value of 64512 means -1024, also in a slice without a negative value
    table = [min(i // 16, 255) for i in range(4096)]
    for stored, shown in (([0, 1024, 2048], [0, 64, 128]), ([1024, 1024, 2048], [64, 64, 128])):
        path = grey(tmp_path, stored, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024,
                    VOILUTSequence=lut(table, 64512, 8))  # fmt: skip
        assert row(path) == shown


def test_table_cut_off(tmp_path):
    item = lut([1, 2, 3])
    item.LUTDescriptor = [30, 0, 16]
    with pytest.raises(DataError, match=r"a\.dcm: VOILUTSequence: 3 entries of 30 are there"):
        decode(grey(tmp_path, [1, 2], VOILUTSequence=item))


# colour

RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]], np.uint8)


def test_rgb_by_pixel_and_by_plane(tmp_path):
    assert (decode(dicom(tmp_path / "a.dcm", RGB))[0] == RGB).all()
    ds = dataset(RGB, PlanarConfiguration=1)
    ds.PixelData = RGB.transpose(2, 0, 1).tobytes()
    assert (decode(save(tmp_path / "b.dcm", ds))[0] == RGB).all()


def test_colour_is_not_windowed(tmp_path):
    path = dicom(tmp_path / "a.dcm", RGB, WindowCenter=10, WindowWidth=2)
    assert (decode(path, window=(1, 2))[0] == RGB).all()


def test_ybr_full_becomes_rgb(tmp_path):
    # grey 100; pure red is Y 76, Cb 85, Cr 255 (rounded): back to about 254, 0, 0
    ybr = np.array([[[100, 128, 128], [76, 85, 255]]], np.uint8)
    got = decode(dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL"))[0]
    assert got[0, 0].tolist() == [100, 100, 100]
    assert np.abs(got[0, 1].astype(int) - [254, 0, 0]).max() <= 1


def test_ybr_full_422_shares_colour_between_two_pixels(tmp_path):
    ds = dataset(np.zeros((1, 2, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422")
    ds.PixelData = bytes([100, 200, 128, 128])  # Y1 Y2 Cb Cr
    assert decode(save(tmp_path / "a.dcm", ds))[0].tolist() == [[[100] * 3, [200] * 3]]


def test_sixteen_bit_rgb_is_scaled_by_its_bits(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[[4095, 2048, 0]]], np.uint16), BitsStored=12, HighBit=11)
    assert decode(path)[0].tolist() == [[[255, 128, 0]]]


def test_bits_beside_those_of_rgb_are_cut_off(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[[4095 + 4096, 0, 2048]]], np.uint16), BitsStored=12, HighBit=11)
    assert decode(path)[0].tolist() == [[[255, 0, 128]]]


def palette(entries, bits, first=0, kind=np.uint16):
    tags = {}
    for colour, column in zip(("Red", "Green", "Blue"), zip(*entries, strict=True), strict=True):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [len(entries), first, bits]
        raw = np.array(column, kind).tobytes()
        tags[f"{colour}PaletteColorLookupTableData"] = raw + b"\0" * (len(raw) % 2)
    return {"PhotometricInterpretation": "PALETTE COLOR", **tags}


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 128, 255)]


@pytest.mark.parametrize("tags", [
    palette(COLOURS, 8, kind=np.uint8),
    palette(COLOURS, 8),  # 8-bit colours in words
    palette(COLOURS, 16),  # the same with a wrong number of bits
    palette([tuple(v * 257 for v in c) for c in COLOURS], 16),
    palette([tuple(v * 256 for v in c) for c in COLOURS], 16),
])  # fmt: skip
def test_palettes_of_eight_and_sixteen_bits(tmp_path, tags):
    path = dicom(tmp_path / "a.dcm", np.array([[0, 1, 2, 9]], np.uint8), **tags)
    assert decode(path)[0][0].tolist() == [list(COLOURS[k]) for k in (0, 1, 2, 2)]


def test_palette_with_a_first_value_and_more_than_256_entries(tmp_path):
    entries = [(k // 4, 0, 255 - k // 4) for k in range(1024)]
    tags = palette(entries, 8, first=10, kind=np.uint8)
    path = dicom(tmp_path / "a.dcm", np.array([[0, 10, 410, 5000]], np.uint16), **tags)
    assert decode(path)[0][0].tolist() == [[0, 0, 255], [0, 0, 255], [100, 0, 155], [255, 0, 0]]


def test_segmented_palette(tmp_path):
    # discrete segment (0) of 1 entry: 0; linear segment (1) of 4 entries up to 200: 50, 100, 150, 200
    raw = np.array([0, 1, 0, 1, 4, 200], np.uint16).tobytes()
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [5, 0, 16]
        tags[f"Segmented{colour}PaletteColorLookupTableData"] = np.frombuffer(raw, np.uint16).tobytes()
    tags["SegmentedRedPaletteColorLookupTableData"] = np.array([0, 1, 0, 1, 4, 51200], np.uint16).tobytes()
    path = dicom(tmp_path / "a.dcm", np.array([[0, 1, 4]], np.uint8), **tags)
    assert decode(path)[0][0, :, 0].tolist() == [0, 50, 200]


def test_palette_without_its_tables(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((1, 2), np.uint8), PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(DataError, match=r"a\.dcm: PALETTE COLOR without its colour tables"):
        decode(path)


def test_unknown_colour_spaces_are_named(tmp_path):
    path = dicom(tmp_path / "a.dcm", RGB, PhotometricInterpretation="HSV")
    with pytest.raises(DataError, match="PhotometricInterpretation HSV with 3 values a pixel is not read") as caught:
        decode(path)
    assert "a.dcm" in str(caught.value) and "convert the file to RGB" in caught.value.fix


# frames


def test_each_frame_by_its_number(tmp_path):
    frames = np.arange(40, dtype=np.uint8).reshape(4, 2, 5)
    path = dicom(tmp_path / "a.dcm", frames)
    for k in range(4):
        got, facts = decode(path, frame=k)
        assert (got == frames[k]).all() and facts.frames == 4
    with pytest.raises(DataError, match=r"a\.dcm: there is no frame 4") as caught:
        decode(path, frame=4)
    assert "from 0 to 3" in caught.value.fix
    colours = np.stack([RGB, 255 - RGB])
    assert (decode(dicom(tmp_path / "b.dcm", colours), frame=1)[0] == 255 - RGB).all()


def test_window_and_rescale_of_each_frame_in_enhanced_files(tmp_path):
    def group(**tags):
        item = Dataset()
        for name, own in tags.items():
            inner = Dataset()
            for key, value in own.items():
                setattr(inner, key, value)
            setattr(item, name, [inner])
        return item

    frames = [
        group(FrameVOILUTSequence={"WindowCenter": 50, "WindowWidth": 101}),
        group(FrameVOILUTSequence={"WindowCenter": 100, "WindowWidth": 201}),
    ]
    shared = group(PixelValueTransformationSequence={"RescaleSlope": 2, "RescaleIntercept": 0})
    path = dicom(tmp_path / "a.dcm", np.full((2, 1, 2), 25, np.uint16), PerFrameFunctionalGroupsSequence=frames,
                 SharedFunctionalGroupsSequence=shared)  # fmt: skip
    assert row(path) == [129, 129]  # 50 in 50 / 101: (0.5 / 100 + 0.5) * 255
    assert row(path, frame=1) == [64, 64]  # 50 in 100 / 201: (-49.5 / 200 + 0.5) * 255 = 64.4


# what is missing


def test_missing_tags_have_stated_rules(tmp_path):
    stored = np.array([[0, 100, 255]], np.uint8)
    for gone in ("PhotometricInterpretation", "SamplesPerPixel", "BitsStored", "HighBit", "PixelRepresentation",
                 "Modality", "SOPInstanceUID"):  # fmt: skip
        assert row(dicom(tmp_path / f"{gone}.dcm", stored, **{gone: GONE})) == [0, 100, 255], gone
    assert (decode(dicom(tmp_path / "b.dcm", RGB, PlanarConfiguration=GONE))[0] == RGB).all()
    assert (decode(dicom(tmp_path / "c.dcm", RGB, PhotometricInterpretation=GONE))[0] == RGB).all()


def test_half_a_rescale_and_a_slope_of_zero(tmp_path):
    only_slope = grey(tmp_path, [1, 2], RescaleSlope=3)
    assert values(only_slope)[0].tolist() == [3, 6]
    assert values(grey(tmp_path, [1, 2], RescaleIntercept=5))[0].tolist() == [6, 7]
    assert values(grey(tmp_path, [1, 2], RescaleSlope=0, RescaleIntercept=5))[0].tolist() == [6, 7]


def test_what_cannot_be_done_without_is_named(tmp_path):
    stored = np.zeros((1, 2), np.uint8)
    with pytest.raises(DataError, match=r"a\.dcm: DICOM tags are missing or zero: Rows, BitsAllocated"):
        decode(dicom(tmp_path / "a.dcm", stored, Rows=GONE, BitsAllocated=GONE))
    with pytest.raises(DataError, match=r"holds no picture \(Digital X-Ray Image Storage"):
        decode(dicom(tmp_path / "b.dcm", stored, PixelData=GONE))
    with pytest.raises(DataError, match="BitsAllocated 8, BitsStored 12, HighBit 11 contradict each other"):
        decode(dicom(tmp_path / "c.dcm", stored, BitsStored=12, HighBit=11))


def test_float_pixels_and_not_a_number(tmp_path):
    ds = dataset(np.zeros((1, 4), np.uint16), PixelData=GONE, BitsAllocated=32, BitsStored=GONE, HighBit=GONE)
    ds.FloatPixelData = np.array([0.0, 0.5, 1.0, 1.0], np.float32).tobytes()
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 0.5, 1, "LINEAR_EXACT"
    assert row(save(tmp_path / "a.dcm", ds)) == [0, 128, 255, 255]
    ds.FloatPixelData = np.array([0.0, np.nan, 1.0, 1.0], np.float32).tobytes()
    with pytest.raises(DataError, match=r"b\.dcm: holds values that are not finite"):
        decode(save(tmp_path / "b.dcm", ds))


# files


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_plain_syntaxes(tmp_path, syntax):
    path = grey(tmp_path, [0, 50, 100], WindowCenter=50, WindowWidth=101, TransferSyntaxUID=syntax)
    assert row(path) == [1, 129, 255]


def test_big_endian_with_a_table(tmp_path):
    ds = dataset(np.array([[0, 1, 2]], np.uint16), VOILUTSequence=lut([0, 1000, 2000], 0, 11))
    ds.PixelData = np.array([[0, 1, 2]], ">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    assert row(save(tmp_path / "a.dcm", ds)) == [0, 125, 249]  # of 2047


def test_compressed_rle_jpeg_and_jpeg2000(tmp_path):
    smooth = (np.add.outer(np.arange(32), np.arange(32)) * 4).astype(np.uint8)
    ds = dataset(smooth)
    ds.compress(RLELossless)
    assert (decode(save(tmp_path / "rle.dcm", ds))[0] == smooth).all()
    for name, syntax, kind, options in (
        ("jpeg", JPEGBaseline8Bit, "JPEG", {"quality": 95}),
        ("j2k", JPEG2000Lossless, "JPEG2000", {"no_jp2": True}),
    ):
        raw = io.BytesIO()
        Image.fromarray(smooth).save(raw, kind, **options)
        ds = dataset(smooth, TransferSyntaxUID=syntax)
        ds.PixelData = encapsulate([raw.getvalue()])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        got = decode(save(tmp_path / f"{name}.dcm", ds))[0]
        assert np.abs(got.astype(int) - smooth).max() <= (0 if name == "j2k" else 4)


@pytest.mark.parametrize("said", ["YBR_FULL_422", "YBR_FULL", "RGB"])
def test_jpeg_colours_are_right_whatever_the_file_calls_them(tmp_path, said):
    colours = np.repeat(np.repeat(RGB, 16, 0), 16, 1)
    raw = io.BytesIO()
    Image.fromarray(colours).save(raw, "JPEG", quality=95, subsampling=2)
    ds = dataset(colours, PhotometricInterpretation=said, TransferSyntaxUID=JPEGBaseline8Bit)
    ds.PixelData = encapsulate([raw.getvalue()])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    got = decode(save(tmp_path / "a.dcm", ds))[0]
    assert np.abs(got[8, 8::16].astype(int) - RGB[0]).max() <= 6


def test_syntax_without_a_decoder_is_named_with_the_package_that_has_one(tmp_path, monkeypatch):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    ds = dataset(np.zeros((2, 2), np.uint8), TransferSyntaxUID=JPEGLSLossless)
    ds.PixelData = encapsulate([b"\xff\xd8\xff\xf7 not decoded"])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    with pytest.raises(DataError) as caught:
        decode(save(tmp_path / "a.dcm", ds))
    assert "a.dcm: pixels are compressed as JPEG-LS Lossless Image Compression (1.2.840.10008.1.2.4.80)" in str(
        caught.value
    )
    assert caught.value.fix == "pip install pyjpegls, or save the files uncompressed (Explicit VR Little Endian)"


def test_twelve_bit_jpeg_is_named_with_the_package_that_reads_it(tmp_path):
    raw = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(raw, "JPEG")
    content = raw.getvalue()
    at = content.index(b"\xff\xc0")  # the frame header says 12 bits instead of 8, and "extended"
    content = content[:at] + b"\xff\xc1" + content[at + 2 : at + 4] + b"\x0c" + content[at + 5 :]
    tags = {"TransferSyntaxUID": JPEGExtended12Bit, "BitsStored": 12, "HighBit": 11}
    ds = dataset(np.zeros((16, 16), np.uint16), **tags)
    ds.PixelData = encapsulate([content])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    with pytest.raises(DataError, match=r"JPEG Extended .* is beyond what is installed here") as caught:
        decode(save(tmp_path / "a.dcm", ds))
    assert "pip install python-gdcm" in caught.value.fix


def test_reports_decoded_by_hand_are_named_for_what_they_are(tmp_path):
    gone = dict.fromkeys(("Rows", "Columns", "PixelData"), GONE)
    path = dicom(tmp_path / "a.dcm", np.zeros((1, 2), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", **gone)
    with pytest.raises(DataError, match=r"a\.dcm: a DICOM file that holds no picture \(Basic Text SR Storage\)"):
        decode(path)


def test_private_syntax(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((1, 2), np.uint8))
    raw = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0")
    with pytest.raises(DataError, match=r"not DICOM's own \(1\.2\.840\.99999\.1\.2\.1\)"):
        decode(raw, "a.dcm")


def test_files_without_preamble_are_read_and_other_files_are_named(tmp_path):
    stored = np.array([[0, 100, 255]], np.uint8)
    ds = dataset(stored, TransferSyntaxUID=ImplicitVRLittleEndian)
    ds.save_as(tmp_path / "old.dcm", implicit_vr=True, little_endian=True)  # neither preamble nor file meta
    raw = (tmp_path / "old.dcm").read_bytes()
    assert raw[128:132] != b"DICM" and row(tmp_path / "old.dcm") == [0, 100, 255]
    for name, content, text in (
        ("empty", b"", r"empty\.dcm: the file is empty \(0 bytes\)"),
        (
            "text",
            b"not a scan at all" * 30,
            r"text\.dcm: not a DICOM file \(no DICM mark at byte 128; it starts with 6e",
        ),
        ("short", b"\0" * 100, r"short\.dcm: not a DICOM file"),
        ("mark", b"\0" * 128 + b"DICM", r"mark\.dcm: DICOM tags are missing or zero"),
        ("noise", b"\0" * 128 + b"DICM" + bytes(range(256)) * 8, r"noise\.dcm: "),
    ):
        (tmp_path / f"{name}.dcm").write_bytes(content)
        with pytest.raises(DataError, match=text):
            decode(tmp_path / f"{name}.dcm")
    with pytest.raises(DataError, match="cannot be read"):
        decode(tmp_path / "gone.dcm")


def test_cut_files_are_never_half_read(tmp_path):
    raw = dicom(tmp_path / "a.dcm", np.arange(6000, dtype=np.uint16).reshape(60, 100)).read_bytes()
    for kept in (len(raw) - 1, len(raw) - 5000, len(raw) - 11990, 400, 200, 140):
        with pytest.raises(DataError) as caught:
            decode(raw[:kept], "a.dcm")
        assert "a.dcm" in str(caught.value)
    with pytest.raises(DataError, match="truncated DICOM pixels"):
        decode(raw[:-5000], "a.dcm")


def test_random_damage_gives_a_picture_or_an_error_that_names_the_file(tmp_path):
    raw = bytearray(grey(tmp_path, list(range(64)), WindowCenter=5, WindowWidth=5).read_bytes())
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(raw)
        for at in random.integers(132, len(raw), 4).tolist():
            broken[at] = int(random.integers(256))
        try:
            assert decode(bytes(broken), "a.dcm")[0].dtype == np.uint8
        except DataError as error:
            assert "a.dcm" in str(error)


def test_bytes_of_dicom_are_decoded_wherever_pictures_are(tmp_path):
    path = dicom(tmp_path / "a", np.array([[0, 100, 255]], np.uint8))
    array, facts = pixels.decode(path.read_bytes(), "a")
    assert array[0].tolist() == [0, 100, 255] and facts.format == "DICOM"
