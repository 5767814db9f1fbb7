import numpy as np
import torch
from PIL import Image

from data.crops import CroppedPictures, crop, to_pixel_values
from data.folders import ImageFolder
from tests.examples.pictures import write_pictures


def test_crops_are_a_function_of_seed_epoch_and_index(tmp_path):
    pictures = ImageFolder(write_pictures(tmp_path / "pictures", size=(80, 32)), "text")
    dataset = CroppedPictures(pictures, 16, center_crop=False, random_flip=True, seed=0)
    item = dataset[0, 1]
    assert item["pixel_values"].shape == (3, 16, 16) and item["text"] == "picture 1"
    assert item["pixel_values"].abs().max() <= 1
    assert torch.equal(dataset[0, 1]["pixel_values"], item["pixel_values"])
    for other in (dataset[1, 1], CroppedPictures(pictures, 16, False, True, seed=1)[0, 1]):
        assert not torch.equal(other["pixel_values"], item["pixel_values"])


def test_center_crop_and_flip(tmp_path):
    pixels = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8, 1).repeat(3, axis=2)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(crop(image, 4, 0.5, 0.5)), pixels[:, 2:6])
    assert np.array_equal(np.asarray(crop(image, 4, 0.0, 1.0)), pixels[:, 4:])
    dataset = CroppedPictures([{"image": image, "text": ""}], 4, center_crop=True, random_flip=True, seed=0)
    plain = to_pixel_values(crop(image, 4, 0.5, 0.5))
    mirrored = [not torch.equal(dataset[epoch, 0]["pixel_values"], plain) for epoch in range(40)]
    assert 10 < sum(mirrored) < 30
    assert torch.equal(dataset[mirrored.index(True), 0]["pixel_values"], plain.flip(-1))
    assert plain.min() == 2 / 127.5 - 1


def test_portrait_and_small_pictures_are_resized():
    for size in ((30, 100), (100, 30), (5, 7), (16, 16)):
        assert crop(Image.new("RGB", size), 16, 0.3, 0.9).size == (16, 16)


def test_pictures_in_many_sizes():
    pixels = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None] * 10, 16, axis=1).repeat(3, axis=2)
    image = Image.fromarray(pixels)
    halved = np.asarray(crop(image, 16, 0.0, 1.0, scale=0.5))
    assert halved.shape == (16, 16, 3) and np.array_equal(halved[:8], halved[:7:-1])
    doubled = np.asarray(crop(image, 16, 0.0, 0.0, scale=2.0))
    assert doubled.shape == (16, 16, 3) and doubled.max() < 90
    wide = crop(Image.new("RGB", (100, 30)), 16, 0.5, 0.5, scale=0.4)
    assert wide.size == (16, 16)
    dataset = CroppedPictures([{"image": image, "text": ""}], 16, True, False, seed=0, random_scale=(0.5, 2.0))
    plain = to_pixel_values(image)
    changed = [not torch.equal(dataset[epoch, 0]["pixel_values"], plain) for epoch in range(40)]
    assert 10 < sum(changed) < 30
