import json

import numpy as np
import pytest
import torch
import training_utils
from accelerate import Accelerator
from PIL import Image
from training_utils import CroppedPictures, HubDataset, ImageFolder, TrainingOrder


def write_pictures(folder, number=4, size=(40, 32)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def take(order, number):
    batches = iter(order)
    return [next(batches) for _ in range(number)]


def test_every_epoch_sees_every_picture_once_in_another_order():
    flat = [index for batch in take(TrainingOrder(10, 4, 0, 1, 0, 0), 5) for index in batch]
    assert [epoch for epoch, _ in flat] == [0] * 10 + [1] * 10
    first, second = [i for _, i in flat[:10]], [i for _, i in flat[10:]]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert flat != [index for batch in take(TrainingOrder(10, 4, 1, 1, 0, 0), 5) for index in batch]


def test_processes_share_the_batches_of_one():
    one = take(TrainingOrder(10, 8, 0, 1, 0, 0), 4)
    two = [take(TrainingOrder(10, 4, 0, 2, process, 0), 4) for process in range(2)]
    assert one == [first + second for first, second in zip(*two, strict=True)]


def test_order_goes_on_in_the_middle_of_an_epoch():
    assert take(TrainingOrder(10, 4, 0, 1, 0, 3), 4) == take(TrainingOrder(10, 4, 0, 1, 0, 0), 7)[3:]


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
    assert np.array_equal(np.asarray(training_utils.crop(image, 4, 0.5, 0.5)), pixels[:, 2:6])
    assert np.array_equal(np.asarray(training_utils.crop(image, 4, 0.0, 1.0)), pixels[:, 4:])
    dataset = CroppedPictures([{"image": image, "text": ""}], 4, center_crop=True, random_flip=True, seed=0)
    plain = training_utils.to_pixel_values(training_utils.crop(image, 4, 0.5, 0.5))
    mirrored = [not torch.equal(dataset[epoch, 0]["pixel_values"], plain) for epoch in range(40)]
    assert 10 < sum(mirrored) < 30
    assert torch.equal(dataset[mirrored.index(True), 0]["pixel_values"], plain.flip(-1))
    assert plain.min() == 2 / 127.5 - 1


def test_portrait_and_small_pictures_are_resized():
    for size in ((30, 100), (100, 30), (5, 7), (16, 16)):
        assert training_utils.crop(Image.new("RGB", size), 16, 0.3, 0.9).size == (16, 16)


def test_pictures_in_many_sizes():
    pixels = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None] * 10, 16, axis=1).repeat(3, axis=2)
    image = Image.fromarray(pixels)
    halved = np.asarray(training_utils.crop(image, 16, 0.0, 1.0, scale=0.5))
    assert halved.shape == (16, 16, 3) and np.array_equal(halved[:8], halved[:7:-1])
    doubled = np.asarray(training_utils.crop(image, 16, 0.0, 0.0, scale=2.0))
    assert doubled.shape == (16, 16, 3) and doubled.max() < 90
    wide = training_utils.crop(Image.new("RGB", (100, 30)), 16, 0.5, 0.5, scale=0.4)
    assert wide.size == (16, 16)
    dataset = CroppedPictures([{"image": image, "text": ""}], 16, True, False, seed=0, random_scale=(0.5, 2.0))
    plain = training_utils.to_pixel_values(image)
    changed = [not torch.equal(dataset[epoch, 0]["pixel_values"], plain) for epoch in range(40)]
    assert 10 < sum(changed) < 30


def test_image_folder(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    Image.new("L", (8, 8)).save(folder / "unlisted.png")
    captioned = ImageFolder(folder, "text")
    assert len(captioned) == 4 and captioned[2]["text"] == "picture 2" and captioned[2]["image"].mode == "RGB"
    assert len(ImageFolder(folder)) == 5


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "metadata.jsonl do not exist"),
        ("", "no pictures"),
        ("not json", "line 1, is not JSON"),
        ("[1]", "line 1, has to be an object"),
        ('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}', "line 2, has no column 'text'"),
        ('{"text": "a"}', "line 1, has no column 'file_name'"),
        ('{"file_name": "0.png", "text": 3}', "'text' has to be text but is 3"),
        ('{"file_name": "absent.png", "text": "a"}', "absent.png cannot be read"),
        ('{"file_name": "broken.png", "text": "a"}', "broken.png cannot be read"),
    ],
)
def test_broken_image_folder(tmp_path, metadata, message):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "metadata.jsonl").unlink()
    if metadata is not None:
        (folder / "metadata.jsonl").write_text(metadata, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, "text")


def test_image_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist"):
        ImageFolder(tmp_path / "absent")


def test_dataset_of_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = str(write_pictures(tmp_path / "pictures"))
    dataset = HubDataset(folder, None, "image", "text")
    assert len(dataset) == 4
    assert dataset[1]["text"] == "picture 1" and dataset[1]["image"].size == (40, 32)
    with pytest.raises(ValueError, match="no column 'caption'"):
        HubDataset(folder, None, "image", "caption")
    with pytest.raises(ValueError, match="'text' of .* has to hold pictures"):
        HubDataset(folder, None, "text", None)


def test_random_generators_are_a_function_of_their_position():
    def draw(*position):
        return torch.rand(4, generator=training_utils.random_generator(*position)).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(*position)) for position in ((0, 5), (5, 0), (0, 6), (0, 5, 1))}) == 4


def make_checkpoint(folder, configuration):
    folder.mkdir(parents=True)
    state = {"step": 7, "configuration": configuration}
    (folder / training_utils.TRAINING_STATE).write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_checkpoint_to_go_on_from(tmp_path):
    find = training_utils.find_checkpoint
    out = tmp_path / "out"
    assert find(None, out) is None
    with pytest.raises(ValueError, match="no checkpoint"):
        find("latest", out)
    with pytest.raises(ValueError, match="not a checkpoint"):
        find(str(out / "checkpoint-3"), out)
    for step in (9, 10, 2):
        make_checkpoint(out / f"checkpoint-{step}", {})
    (out / ".checkpoint-11.partial").mkdir()
    assert find("latest", out) == out / "checkpoint-10"
    assert find(str(out / "checkpoint-2"), out) == out / "checkpoint-2"
    with pytest.raises(ValueError, match="holds another run"):
        find(None, out)
    elsewhere = make_checkpoint(tmp_path / "elsewhere" / "checkpoint-4", {})
    assert find(str(elsewhere), tmp_path / "new") == elsewhere
    with pytest.raises(ValueError, match="holds another run"):
        find(str(elsewhere), out)


def test_checkpoint_of_another_configuration(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-7", {"seed": 0, "learning_rate": 0.1})
    assert training_utils.Checkpoints.check(checkpoint, {"seed": 0, "learning_rate": 0.1}) == 7
    with pytest.raises(ValueError, match="learning_rate: 0.1 there, 0.2 here"):
        training_utils.Checkpoints.check(checkpoint, {"seed": 0, "learning_rate": 0.2})
    with pytest.raises(ValueError, match="new: None there, 1 here"):
        training_utils.Checkpoints.check(checkpoint, {"seed": 0, "learning_rate": 0.1, "new": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_the_run(value):
    with pytest.raises(FloatingPointError, match="loss at step 3"):
        training_utils.check_finite(Accelerator(cpu=True), "loss", torch.tensor(value), 3)


def test_image_grid():
    left, right = torch.full((2, 3, 4, 5), -1.0), torch.full((2, 3, 4, 5), 3.0)
    grid = np.asarray(training_utils.image_grid([left, right]))
    assert grid.shape == (8, 10, 3)
    assert (grid[:, :5] == 0).all() and (grid[:, 5:] == 255).all()
