"""Pictures and masks of every kind that Diffusers takes."""

import numpy as np
import PIL.Image
import pytest
import torch

from bitdance_diffusers.pipelines.image_inputs import own_size, read_images, read_masks, resize_images, resize_masks

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255
MASK = np.zeros((6, 4), dtype=np.uint8)
MASK[1:3, 2] = 255
EXPECTED_MASK = torch.from_numpy(MASK)[None, None] / 255

KINDS = {
    "PIL": PIL.Image.fromarray(PIXELS),
    "uint8 array": PIXELS,
    "float array": PIXELS / 255,
    "backwards array": PIXELS[::-1][::-1],
    "batch of arrays": PIXELS[None] / np.float32(255),
    "tensor": EXPECTED[0],
    "uint8 tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "float64 tensor": torch.from_numpy(PIXELS / 255).permute(2, 0, 1),
    "batch of tensors": EXPECTED,
}
MASK_KINDS = {
    "PIL": PIL.Image.fromarray(MASK),
    "PIL of three channels": PIL.Image.fromarray(MASK).convert("RGB"),
    "PIL of two colors": PIL.Image.fromarray(MASK).convert("1"),
    "uint8 array": MASK,
    "array with a channel": MASK[..., None] / 255,
    "batch of arrays": MASK[None] > 0,
    "batch of arrays with a channel": MASK[None, ..., None],
    "bool tensor": torch.from_numpy(MASK > 0),
    "tensor with a channel": EXPECTED_MASK[0],
    "batch of tensors": EXPECTED_MASK,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pictures(kind):
    for given, number in ((KINDS[kind], 1), ([KINDS[kind]], 1), ((KINDS[kind], KINDS["PIL"]), 2)):
        pictures = read_images(given)
        assert own_size(pictures, 2) == (6, 4)
        torch.testing.assert_close(resize_images(pictures, 6, 4), EXPECTED.expand(number, -1, -1, -1))


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_kinds_of_masks(kind):
    for given, number in ((MASK_KINDS[kind], 1), ([MASK_KINDS[kind], MASK_KINDS["PIL"]], 2)):
        found = resize_masks(read_masks(given), 6, 4)
        assert torch.equal(found, EXPECTED_MASK.expand(number, -1, -1, -1))


def test_what_is_transparent_is_white():
    alpha = np.full((6, 4, 1), 51, dtype=np.uint8)  # a fifth
    with_alpha = np.concatenate([PIXELS, alpha], axis=2)
    expected = EXPECTED * 0.2 + 0.8
    for given in (PIL.Image.fromarray(with_alpha), with_alpha, torch.from_numpy(with_alpha).permute(2, 0, 1)):
        torch.testing.assert_close(resize_images(read_images(given), 6, 4), expected, atol=1 / 255, rtol=0)
    palette = PIL.Image.new("P", (4, 6))
    palette.info["transparency"] = 0
    assert resize_images(read_images(palette), 6, 4).min() == 1


def test_gray_pictures_have_three_channels():
    for given in (PIL.Image.fromarray(MASK), MASK, MASK[..., None] / 255, EXPECTED_MASK[0]):
        found = resize_images(read_images(given), 6, 4)
        assert torch.equal(found, EXPECTED_MASK.expand(1, 3, -1, -1))


def test_sizes():
    small, large = PIL.Image.new("RGB", (13, 9)), np.zeros((16, 24, 3), dtype=np.uint8)
    assert own_size(read_images([small, small]), 4) == (8, 12)
    assert own_size(read_images(small), 16) == (16, 16)  # not 0
    with pytest.raises(ValueError, match="`image` holds pictures of the sizes 9 x 13, 16 x 24; give `height`"):
        own_size(read_images([small, large]), 4)
    assert resize_images(read_images([small, large]), 8, 16).shape == (2, 3, 8, 16)


def test_masks_are_resized_by_nearest_neighbour():
    mask = PIL.Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8))
    expected = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert torch.equal(resize_masks(read_masks(mask), 6, 6)[0, 0], expected)


@pytest.mark.parametrize("read, name", [(read_images, "image"), (read_masks, "mask_image")])
@pytest.mark.parametrize(
    "error, message, given",
    [
        (TypeError, "holds None; it has to be a PIL picture", None),
        (TypeError, "holds 'fox.png'", "fox.png"),
        (TypeError, "holds 3", [PIXELS[..., :1], 3]),
        (ValueError, "at least one picture", []),
        (ValueError, r"shape \(0, 1, 4, 4\); it has to hold pixels", torch.zeros(0, 1, 4, 4)),
        (TypeError, "values of int64", MASK.astype(np.int64)),
        (TypeError, "values of object", np.array([[None]])),
        (TypeError, "values of complex64", torch.zeros(4, 4, dtype=torch.complex64)),
        (ValueError, "values from -1 to 1", torch.tensor([[-1.0, 1.0]])),
        (ValueError, "values from 0 to 255", np.array([[0.0, 255.0]])),
        (ValueError, "values from nan to nan", torch.full((4, 4), torch.nan)),
        (ValueError, r"shape \(2, 2, 4, 4, 1\)", np.zeros((2, 2, 4, 4, 1))),
        (ValueError, r"shape \(1, 7, 4, 4\); it has to hold pixels of 1", torch.zeros(1, 7, 4, 4)),
        (ValueError, r"shape \(4,\)", torch.zeros(4)),
        (ValueError, r"shape \(0, 4\)", np.zeros((0, 4))),
        (ValueError, "a picture of 0 x 4 pixels", PIL.Image.new("L", (4, 0))),
    ],
)
def test_what_is_no_picture(read, name, error, message, given):
    with pytest.raises(error, match=f"`{name}` .*{message}"):
        read(given)
