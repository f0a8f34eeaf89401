"""Pictures arrive upright, in RGB and square, or are refused with a reason."""

import contextlib
import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engram_core import InputError
from engram_vision.images import SUFFIXES, fit_square, load_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def gradient(width, height):
    """Return a smooth picture in which every pixel differs from its neighbours."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) * 255 / max(width + height - 2, 1)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def difference(one, other):
    assert one.size == other.size
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def pixels(image):
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def saved(path, image, **options):
    image.save(path, **options)
    return path


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_picture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read(tmp_path, suffix):
    image = load_picture(saved(tmp_path / f"red{suffix}", Image.new("RGB", (20, 10), RED)))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert difference(image, Image.new("RGB", (20, 10), RED)) <= 2  # JPEG and WebP lose a little


def test_content_decides_and_not_the_suffix(tmp_path):
    path = saved(tmp_path / "red.png", Image.new("RGB", (8, 8), RED), format="BMP")
    assert load_picture(path).getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_pictures_are_turned_upright(tmp_path, suffix, orientation):
    upright = gradient(32, 16)
    # What a camera stores under each orientation, by the EXIF standard: where row 0 and column 0 of the scene are.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path / f"turned{suffix}", stored, exif=exif, quality=100)
    assert difference(load_picture(path), upright) < 24


def test_transparent_parts_are_white(tmp_path):
    half = Image.new("RGBA", (4, 1), (*RED, 255))
    half.putpixel((1, 0), (*RED, 0))
    half.putpixel((2, 0), (*RED, 128))
    expected = [RED, WHITE, (255, 127, 127), RED]
    assert pixels(load_picture(saved(tmp_path / "rgba.png", half))) == expected


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palettes_with_and_without_transparency(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    path = tmp_path / f"palette{suffix}"
    assert pixels(load_picture(saved(path, image))) == [RED, BLUE]
    assert pixels(load_picture(saved(path, image, transparency=1))) == [RED, WHITE]


@pytest.mark.parametrize("transparency", [b"\xff\x00", b"\xff"])
def test_palette_with_an_opacity_for_each_colour(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    found = pixels(load_picture(saved(tmp_path / "p.png", image, transparency=transparency)))
    assert found == [RED, WHITE if len(transparency) == 2 else BLUE]


def test_grey_with_transparency(tmp_path):
    image = Image.new("LA", (2, 1), (100, 255))
    image.putpixel((1, 0), (100, 0))
    assert pixels(load_picture(saved(tmp_path / "la.png", image))) == [(100, 100, 100), WHITE]
    image = Image.new("L", (2, 1), 100)
    image.putpixel((1, 0), 7)
    path = saved(tmp_path / "l.png", image, transparency=7)
    assert pixels(load_picture(path)) == [(100, 100, 100), WHITE]


def test_black_and_white(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(load_picture(saved(tmp_path / "bits.png", image))) == [(0, 0, 0), WHITE]


def test_cmyk(tmp_path):
    path = saved(tmp_path / "cmyk.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)))
    assert load_picture(path).getpixel((0, 0)) == RED
    path = saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert difference(load_picture(path), Image.new("RGB", (8, 8), RED)) <= 4


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 300, 32768, 65278, 65535]], np.uint16)
    image = load_picture(saved(tmp_path / f"deep{suffix}", Image.fromarray(values)))
    expected = [0, 1, 1, 128, 254, 255]
    assert pixels(image) == [(value, value, value) for value in expected]


def test_sixteen_bits_in_either_byte_order(tmp_path):
    values = np.array([[0, 0x0101, 0x8080]], np.uint16)
    path = tmp_path / "deep.tif"
    Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes()).save(path)
    assert [red for red, _, _ in pixels(load_picture(path))] == [0, 1, 128]


def test_sixteen_bit_transparency(tmp_path):
    path = saved(tmp_path / "deep.png", Image.fromarray(np.array([[1000, 40000]], np.uint16)))
    data = path.read_bytes()
    at = data.index(b"IDAT") - 4
    chunk = b"tRNS" + (1000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(data[:at] + chunk + data[at:])
    assert [red for red, _, _ in pixels(load_picture(path))] == [255, 156]


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_values_of_unknown_range_are_refused(tmp_path, mode, dtype):
    message = refusal(saved(tmp_path / "deep.tif", Image.fromarray(np.ones((2, 2), dtype))))
    assert f"32-bit values (mode {mode})" in message
    assert "save it with 8 or 16 bits" in message


def test_colour_profiles_are_ignored(tmp_path):
    plain = load_picture(saved(tmp_path / "plain.png", gradient(8, 8)))
    tagged = load_picture(saved(tmp_path / "tagged.png", gradient(8, 8), icc_profile=b"any profile"))
    assert difference(plain, tagged) == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tif"])
def test_truncated_pictures_are_refused(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(tmp_path / f"cut{suffix}", noise)
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        assert "replace it" in refusal(path)


def test_flipped_bit_is_noticed(tmp_path):
    path = saved(tmp_path / "bad.png", gradient(32, 32))
    data = bytearray(path.read_bytes())
    data[data.index(b"IEND") - 8] ^= 1  # the last check sum
    path.write_bytes(data)
    assert "cannot be read as a picture: broken PNG file" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    assert refusal(path) == (
        f"{path}: its {len(content)} bytes are no PNG, JPEG, WEBP, BMP, GIF, TIFF picture, or are damaged; "
        "replace it, or convert it to PNG"
    )


def test_pictures_without_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "flat.png", Image.new("RGB", (1, 1)))
    data = bytearray(path.read_bytes())
    data[16:20] = bytes(4)  # the width
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    assert "bytes are no PNG" in refusal(path)


def test_missing_file_is_refused(tmp_path):
    assert "cannot be read as a picture: No such file" in refusal(tmp_path / "gone.png")


def test_strange_names_stay_on_one_line(tmp_path):
    path = tmp_path / "a\nb.png"
    with pytest.raises(InputError) as caught:
        load_picture(path)
    assert str(caught.value).startswith(f"{str(path)!r}: cannot be read")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_several_frames_are_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    path = saved(tmp_path / f"film{suffix}", frames[0], save_all=True, append_images=frames[1:])
    assert "holds 3 frames or pages; save the one to learn from" in refusal(path)


def test_previews_in_a_camera_picture_do_not_matter(tmp_path):
    path = tmp_path / "camera.jpg"
    small = Image.new("RGB", (8, 8), BLUE)
    Image.new("RGB", (16, 16), RED).save(path, format="MPO", save_all=True, append_images=[small])
    assert difference(load_picture(path), Image.new("RGB", (16, 16), RED)) <= 2


@pytest.mark.parametrize("side", [11, 30])  # Pillow warns above its limit, and raises above twice that
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, side):
    path = saved(tmp_path / "bomb.png", Image.new("RGB", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = refusal(path)
    assert "is too large to decode safely" in message
    assert f"{side * side} pixels" in message
    assert message.endswith("scale it down")


def test_smaller_pictures_are_noted(tmp_path):
    path, notes = saved(tmp_path / "small.png", gradient(100, 60)), []
    load_picture(path, resolution=64, note=notes.append)
    assert notes == [f"{path}: is 100x60, smaller than the resolution 64x64; it is enlarged"]
    load_picture(path, resolution=60, note=notes.append)
    load_picture(path, resolution=64)
    assert len(notes) == 1


def resize_and_crop(image, size, crop):
    """Do as torchvision's Resize, with the Lanczos filter, followed by a crop."""
    width, height = image.size
    if width <= height:
        resized = image.resize((size, int(size * height / width)), Image.Resampling.LANCZOS)
    else:
        resized = image.resize((int(size * width / height), size), Image.Resampling.LANCZOS)
    left = round((resized.width - size) * crop[0])
    top = round((resized.height - size) * crop[1])
    return resized.crop((left, top, left + size, top + size))


sides = st.integers(1, 70)
fractions = st.floats(0, 1)


@given(width=sides, height=sides, size=st.integers(1, 40), crop=st.tuples(fractions, fractions))
def test_square_is_that_of_resize_and_crop(width, height, size, crop):
    image = gradient(width, height)
    square = fit_square(image, size, crop)
    assert square.size == (size, size)
    assert difference(square, resize_and_crop(image, size, crop)) <= 2


@given(width=sides, height=sides, size=st.integers(1, 40))
def test_centre_is_the_default(width, height, size):
    image = gradient(width, height)
    assert difference(fit_square(image, size), fit_square(image, size, (0.5, 0.5))) == 0
    assert difference(fit_square(image, size), fit_square(image, size, "centre")) == 0


@given(size=sides)
def test_square_of_the_right_size_is_kept(size):
    assert difference(fit_square(gradient(size, size), size), gradient(size, size)) == 0


@pytest.mark.parametrize(
    ("crop", "box"), [((0, 0), (0, 0, 8, 8)), ((1, 0), (12, 0, 20, 8)), ((0.25, 1), (3, 0, 11, 8))]
)
def test_crop_cuts_at_the_fraction_of_what_is_left(crop, box):
    image = gradient(20, 8)
    assert difference(fit_square(image, 8, crop), image.crop(box)) == 0


def test_thin_pictures_need_little_memory():
    assert fit_square(Image.new("RGB", (1, 60_000), RED), 512).getpixel((0, 0)) == RED  # whole: 47 GB


@pytest.mark.parametrize("crop", [(-0.1, 0), (0, 1.1), (float("nan"), 0)])
def test_crop_outside_the_picture_is_refused(crop):
    with pytest.raises(InputError, match="expected fractions from 0 to 1") as caught:
        fit_square(gradient(4, 4), 4, crop)
    assert str(crop) in str(caught.value)


def test_size_below_one_is_refused():
    with pytest.raises(InputError, match="size is 0, expected at least 1"):
        fit_square(gradient(4, 4), 0)


def test_import_without_torch():
    code = "import sys, engram_vision.dataset; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "False\n"


def test_damaged_bytes_raise_nothing_else(tmp_path):
    """Decoders raise almost anything on junk; all of it must arrive as InputError."""
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpeg", "webp", "gif", "tiff", "bmp"):
        buffer = io.BytesIO()
        gradient(24, 24).save(buffer, format=suffix)
        for _ in range(20):
            data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            data[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            path = tmp_path / f"junk.{suffix}"
            path.write_bytes(data.tobytes())
            with contextlib.suppress(InputError):
                assert load_picture(path).mode == "RGB"
