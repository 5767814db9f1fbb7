import json

import numpy as np
import pytest
import torch
from digits import classify, distort, is_held_out, main, read_digits, train_classifier
from evaluate import main as evaluate
from PIL import Image
from training_utils import ClassFolder

from bitdance_diffusers import BitDanceClassPipeline, BitDanceClassTransformer


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


def test_the_folder_holds_the_others(digits, tmp_path, capsys):
    pictures, labels = digits
    main(["--output_dir", str(tmp_path / "digits")])
    folder = ClassFolder(tmp_path / "digits")
    assert folder.label_names == [str(label) for label in range(10)] and len(folder) == 4000
    item = folder[13]  # the second picture of the class 3
    assert item["label"] == 3
    assert np.array_equal(np.asarray(item["image"])[..., 1], pictures[labels == 3][1])
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "digits")])
    assert "exists already" in capsys.readouterr().err


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


def test_score_of_the_shipped_model(tmp_path, capsys):
    evaluate([
        "digits", "--pictures_per_class", "2", "--batch_size", "7", "--num_inference_steps", "10", "--seed", "3",
        "--json", str(tmp_path / "score.json"), "--grid", str(tmp_path / "grid.png"),
    ])  # fmt: skip
    result = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    seen = result["seen"]
    right = sum(one == label for one, label in zip(seen, np.repeat(np.arange(10), 2), strict=True))
    assert right >= 17 and result["scores"]["all"]["value"] == right / 20
    assert result["scores"]["7"]["num_pictures"] == 2
    assert result["accuracy_on_real_digits"] > 0.97
    assert result["settings"]["num_inference_steps"] == 10
    assert Image.open(tmp_path / "grid.png").size == (2 * 32, 10 * 32)
    assert f"all             {right / 20:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures_per_class", "0"], "`pictures_per_class` has to be at least 1, but is 0"),
        (["--model", "absent"], "`model` has to be"),
        (["--guidance_scale", "-1"], "`guidance_scale`"),
    ],
)
def test_bad_arguments(capsys, options, message):
    with pytest.raises(SystemExit):
        evaluate(["digits", *options])
    assert message in capsys.readouterr().err


def test_a_model_of_other_classes(class_pipeline, tmp_path, capsys):
    pipeline = class_pipeline("class_p4")
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    transformer = BitDanceClassTransformer(**config | {"num_classes": 3})
    BitDanceClassPipeline(pipeline.vae, transformer, pipeline.scheduler).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        evaluate(["digits", "--model", str(tmp_path / "other")])
    assert "`model` has to have 10 classes, but has 3" in capsys.readouterr().err
