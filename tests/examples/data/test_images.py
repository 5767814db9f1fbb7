import numpy as np
import pytest
from PIL import Image

from data.images import find_images, read_image, to_rgb

RAMP = [0, 1000, 32768, 65535]


def grey(path):
    """The values of a picture of one row, which has to be grey."""
    pixels = np.asarray(read_image(path))
    assert pixels.shape[0] == 1 and (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, order, suffix):
    mode = "I;16" if order == "<u2" else "I;16B"
    Image.frombytes(mode, (4, 1), np.array(RAMP, order).tobytes()).save(tmp_path / f"ramp.{suffix}")
    assert grey(tmp_path / f"ramp.{suffix}") == [0, 4, 128, 255]


def test_32_bit_grey_has_the_range_of_16_bits(tmp_path):
    Image.fromarray(np.array([RAMP], np.int32)).save(tmp_path / "ramp.tiff")
    assert grey(tmp_path / "ramp.tiff") == [0, 4, 128, 255]
    for values in ([0, 65536], [-1, 5]):
        Image.fromarray(np.array([values], np.int32)).save(tmp_path / "wide.tiff")
        with pytest.raises(ValueError, match=r"wide.tiff cannot be read: .* in \[0, 65535\], but are in"):
            read_image(tmp_path / "wide.tiff")


def test_floats_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32)).save(tmp_path / "ramp.tiff")
    assert grey(tmp_path / "ramp.tiff") == [0, 64, 128, 255]
    for values in ([0, 255], [-0.1, 1], [0, np.nan]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "wide.tiff")
        with pytest.raises(ValueError, match=r"wide.tiff cannot be read: .* in \[0, 1\], but are in"):
            read_image(tmp_path / "wide.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16"])
@pytest.mark.parametrize("background", ["white", "#00ff00"])
def test_what_is_transparent_shows_the_background(tmp_path, mode, background):
    """A square drawn in alpha alone: black is opaque on the left, nothing is on the right."""
    path, options = tmp_path / "square.png", {}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1))
        image.putpixel((0, 0), (0,) * (len(mode) - 1) + (255,))
    else:  # one color, or one value, is named as the transparent one
        image = Image.new(mode, (2, 1))
        image.putpixel((1, 0), (1, 2, 3) if mode == "RGB" else 1)
        if mode == "P":
            image.putpalette([0, 0, 0, 0, 0, 0])
        options["transparency"] = (1, 2, 3) if mode == "RGB" else 1
    image.save(path, **options)
    behind = (0, 255, 0) if background == "#00ff00" else (255, 255, 255)
    for rgb in (read_image(path, background), to_rgb(Image.open(path), background)):
        assert [rgb.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), behind]
    assert read_image(path).getpixel((1, 0)) == (255, 255, 255)


def test_half_transparent_colors_are_mixed(tmp_path):
    Image.new("RGBA", (1, 1), (200, 0, 0, 128)).save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png").getpixel((0, 0)) == (227, 127, 127)
    image = Image.new("P", (1, 1))
    image.putpalette([200, 0, 0])
    image.save(tmp_path / "palette.png", transparency=b"\x80")
    assert read_image(tmp_path / "palette.png").getpixel((0, 0)) == (227, 127, 127)


def test_other_modes_are_converted_upright(tmp_path):
    pixels = np.array([[[200, 30, 60], [10, 220, 90]]], np.uint8)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tiff")
    assert np.array_equal(np.asarray(read_image(tmp_path / "cmyk.tiff")), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name, image in (("rgb.png", Image.fromarray(pixels)), ("grey.png", Image.new("I;16", (2, 1)))):
        image.save(tmp_path / name, exif=exif)
        assert read_image(tmp_path / name).size == (1, 2)


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    folder = tmp_path / ".hidden" / "pictures"
    for name in ("a.png", "b/c.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "b/.trash/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    assert find_images(folder) == [folder / "a.png", folder / "b" / "c.png"]
