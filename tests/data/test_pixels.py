"""Every pixel format becomes the right uint8 values, or an error that names the file."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.data.makers import texture
from vitkit.data import pixels
from vitkit.errors import ConfigError, DataError


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(image: Image.Image, format: str = "PNG", **options: object) -> np.ndarray:
    return pixels.decode(saved(image, format, **options), "a.png")[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_grey_and_rgb_stay_as_they_are(channels):
    array = texture(0, channels=channels)
    assert np.array_equal(decode(Image.fromarray(array)), array)


def test_rgb_with_equal_channels_stays_rgb():
    grey = texture(1, channels=1)
    assert decode(Image.fromarray(np.stack([grey] * 3, -1))).shape == (48, 48, 3)


def test_one_bit_becomes_black_and_white():
    array = np.zeros((8, 8), bool)
    array[2:] = True
    assert np.array_equal(decode(Image.fromarray(array)), array * np.uint8(255))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_by_the_full_range(format):
    values = np.array([[0, 257, 128 * 257, 65535], [300, 511, 4095, 65000]], np.uint16)
    array, facts = pixels.decode(saved(Image.fromarray(values), format), "a")
    assert np.array_equal(array, np.rint(values / 257).astype(np.uint8))
    assert facts.high == 65535


def test_sixteen_bit_minmax_uses_each_files_own_range():
    values = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    array, _ = pixels.decode(saved(Image.fromarray(values)), "a", deep="minmax")
    assert array.tolist() == [[0, 64], [128, 255]]


def test_big_endian_sixteen_bit_tiff():
    values = np.array([[0, 65535], [32896, 257]], np.uint16)
    array = decode(Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes()), "TIFF")
    assert array.tolist() == [[0, 255], [128, 1]]


def test_sixteen_bit_pgm():
    raw = b"P5 2 1 65535\n" + struct.pack(">HH", 65535, 257)
    assert pixels.decode(raw, "a.pgm")[0].tolist() == [[255, 1]]


def test_unknown_deep_rule_names_the_choices():
    with pytest.raises(ConfigError, match="full, minmax"):
        pixels.decode(saved(Image.new("L", (2, 2))), "a", deep="auto")


def test_palette_becomes_rgb():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert decode(image).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert decode(image, transparency=0).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_rgba_is_composited_on_white():
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [200, 100, 0, 128]]], np.uint8))
    values = decode(image)
    assert values[0, :2].tolist() == [[255, 255, 255], [0, 0, 0]]
    assert np.abs(values[0, 2].astype(int) - [227, 177, 127]).max() <= 1


def test_grey_with_alpha_stays_one_channel():
    image = Image.fromarray(np.array([[[0, 0], [40, 255]]], np.uint8), "LA")
    assert decode(image).tolist() == [[255, 40]]


def test_cmyk_becomes_rgb():
    image = Image.fromarray(
        np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 255, 0, 128]]], np.uint8), "CMYK"
    )
    values = decode(image, "TIFF")
    assert values[0, :3].tolist() == [[255, 255, 255], [0, 0, 0], [0, 255, 255]]
    assert np.abs(values[0, 3].astype(int) - [127, 0, 127]).max() <= 1


def test_cmyk_jpeg_is_not_inverted():
    rgb = Image.new("RGB", (16, 16), (220, 30, 60))
    values = decode(rgb.convert("CMYK"), "JPEG", quality=95)
    assert np.abs(values.astype(int) - [220, 30, 60]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    image = Image.fromarray(texture(3, 20, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = saved(image, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))))
    array, facts = pixels.decode(raw, "a.png")
    assert np.array_equal(array, expected)
    assert facts.orientation == orientation
    assert array.shape[:2] == ((32, 20) if orientation > 4 else (20, 32))


def test_senseless_exif_orientation_counts_as_upright():
    exif = Image.Exif()
    exif[0x0112] = 77
    array = texture(3, 20, 32)
    assert np.array_equal(pixels.decode(saved(Image.fromarray(array), exif=exif), "a")[0], array)


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (4, 4), value) for value in (10, 90, 200)]
    array, facts = pixels.decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "a.gif")
    assert facts.frames == 3 and (array == 10).all()


def test_one_pixel():
    assert decode(Image.new("RGB", (1, 1), (1, 2, 3))).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(("scale", "expected"), [(1.0, [0, 128, 255]), (255.0, [0, 128, 255])])
def test_float_tiff_in_a_known_range(scale, expected):
    values = np.array([[0, 0.5, 1.0]], np.float32) * np.float32(scale)
    assert decode(Image.fromarray(values), "TIFF").tolist() == [expected]


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 1000.0], [0.0, 1.2]])
def test_float_tiff_with_an_unknown_range_is_refused(values):
    with pytest.raises(DataError, match=r"a\.tif: values from .* have no known meaning as brightness") as caught:
        pixels.decode(saved(Image.fromarray(np.array([values], np.float32)), "TIFF"), "a.tif")
    assert 'deep="minmax"' in caught.value.fix


def test_not_finite_float_is_refused():
    with pytest.raises(DataError, match="not finite"):
        pixels.decode(saved(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF"), "a.tif")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_truncated_file_is_named_never_half_read(format):
    raw = saved(Image.fromarray(texture(4, 96, 96)), format)
    with pytest.raises(DataError, match=r"cut\.bin: (truncated|corrupt) ") as caught:
        pixels.decode(raw[: len(raw) // 2], "cut.bin")
    assert "vitkit check" in caught.value.fix


def test_truncated_jpeg_is_called_truncated():
    raw = saved(Image.fromarray(texture(4, 96, 96)), "JPEG")
    with pytest.raises(DataError, match="truncated JPEG file"):
        pixels.decode(raw[: len(raw) // 2], "cut.jpg")


def test_damaged_png_checksum_is_an_error():
    raw = bytearray(saved(Image.fromarray(texture(4))))
    raw[len(raw) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"a\.png: (corrupt|truncated) PNG file"):
        pixels.decode(bytes(raw), "a.png")


def test_text_called_png_is_no_image():
    with pytest.raises(DataError, match=r"note\.png: not an image that can be read") as caught:
        pixels.decode(b"hello there", "note.png")
    assert "68 65 6c 6c" in str(caught.value)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"empty\.jpg: the file is empty \(0 bytes\)"):
        pixels.read_bytes(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read"):
        pixels.read_bytes(tmp_path / "gone.jpg")


def test_decompression_bomb_is_named():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    raw = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"huge\.png: refused as a possible decompression bomb"):
        pixels.decode(raw, "huge.png")


def test_no_global_switch_of_pil_is_touched():
    from PIL import ImageFile

    decode(Image.new("L", (2, 2)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == (1024 * 1024 * 1024 // 4 // 3)


def test_masks_keep_their_numbers():
    numbers = np.array([[0, 1, 2], [11, 255, 7]], np.uint8)
    palette = Image.fromarray(numbers, "L").convert("P")
    palette.putpalette([i % 256 for i in range(768)])
    palette.putdata(numbers.ravel().tolist())
    for image in (Image.fromarray(numbers), palette, Image.fromarray(np.stack([numbers] * 3, -1))):
        assert np.array_equal(pixels.decode_mask(saved(image), "m"), numbers)
    assert pixels.decode_mask(saved(Image.fromarray(numbers > 1)), "m").tolist() == (numbers > 1).astype(int).tolist()
    deep = numbers.astype(np.uint16) * 100
    assert np.array_equal(pixels.decode_mask(saved(Image.fromarray(deep)), "m"), deep)


def test_coloured_mask_is_refused():
    with pytest.raises(DataError, match=r"m\.png: a mask must hold one class number per pixel"):
        pixels.decode_mask(saved(Image.fromarray(texture(1))), "m.png")
