import numpy as np
import pytest
import torch
from PIL import Image

from mnist_digits.classifier import classify, distort, train_classifier
from mnist_digits.digits import is_held_out, read_digits


@pytest.fixture(scope="module")
def digits():
    return read_digits()


def test_every_fifth_digit_of_a_class_is_held_out(digits):
    pictures, labels = digits
    assert pictures.shape == (5000, 32, 32) and pictures.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    assert not pictures[:, :2].any() and not pictures[:, :, -2:].any() and pictures.max() == 255
    held_out = is_held_out(labels)
    assert np.bincount(labels[held_out]).tolist() == [100] * 10
    assert np.flatnonzero(held_out)[:3].tolist() == [4, 9, 14]


def test_distortions_keep_a_digit_in_sight(digits):
    pictures = torch.from_numpy(digits[0][::50])
    torch.manual_seed(0)
    distorted = distort(pictures)
    ink = distorted.sum((1, 2)) / pictures.float().sum((1, 2))
    assert (ink > 0.6).all() and (ink < 1.5).all()
    assert (distorted - pictures).abs().mean((1, 2)).min() > 1


def test_classifier_knows_digits_it_has_not_seen(digits):
    state = torch.get_rng_state()
    classifier, accuracy = train_classifier(num_epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.8 < accuracy < 1
    pictures, labels = (part[is_held_out(digits[1])] for part in digits)
    seen = classify(classifier, [Image.fromarray(picture).convert("RGB") for picture in pictures])
    assert np.mean(np.array(seen) == labels) == pytest.approx(accuracy)
