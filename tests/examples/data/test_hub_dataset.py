import io

import numpy as np
import pytest
from PIL import Image

from data.hub_dataset import HubDataset
from tests.examples.pictures import write_pictures


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def save(datasets, tmp_path):
    """`save(images, texts, labels)`: a data set of these columns in a folder; its name."""

    def save(images, texts, labels):
        features = datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a"])}
        )
        rows = datasets.Dataset.from_dict({"image": images, "text": texts, "label": labels}, features=features)
        (tmp_path / "rows").mkdir()
        rows.to_parquet(tmp_path / "rows" / "train.parquet")
        return str(tmp_path / "rows")

    return save


def test_dataset_of_datasets(datasets, tmp_path):
    folder = str(write_pictures(tmp_path / "pictures"))
    dataset = HubDataset(folder, None, "image", "text")
    assert len(dataset) == 4
    assert dataset[1]["text"] == "picture 1" and dataset[1]["image"].size == (40, 32)
    with pytest.raises(ValueError, match="no column 'caption'"):
        HubDataset(folder, None, "image", "caption")
    with pytest.raises(ValueError, match="'text' of .* has to hold pictures"):
        HubDataset(folder, None, "text", None)


def test_pictures_are_those_of_folders(save):
    ramp = Image.fromarray(np.array([[0, 1000, 32768, 65535]], np.uint16))
    name = save([png(ramp), png(Image.new("RGBA", (1, 1)))], ["ramp", "nothing"], [0, 0])
    dataset = HubDataset(name, None, "image", "text", background="#102030")
    assert np.asarray(dataset[0]["image"])[0, :, 1].tolist() == [0, 4, 128, 255]
    assert dataset[1]["image"].getpixel((0, 0)) == (16, 32, 48)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", None, "'image' is null"),
        ("image", {"bytes": b"no picture", "path": None}, "cannot identify image file"),
        ("text", None, "'text' is null"),
        ("text", "long", "'long' is refused"),
    ],
)
def test_a_bad_row_is_named_before_it_is_learnt_from(save, monkeypatch, column, value, message):
    def check(text):
        if text == "long":
            raise ValueError("'long' is refused.")

    columns = {"image": [png(Image.new("RGB", (4, 4)))] * 4, "text": ["a"] * 4}
    columns[column][2] = value
    name = save(**{f"{name}s": values for name, values in columns.items()}, labels=[0] * 4)
    message = f"Row 2 of .*rows cannot be used: .*{message}"
    with pytest.raises(ValueError, match=message):
        HubDataset(name, None, "image", "text", check_caption=check)
    monkeypatch.setattr("data.hub_dataset.MAX_ROWS_CHECKED_FIRST", 2)
    dataset = HubDataset(name, None, "image", "text", check_caption=check)
    assert dataset[1]["text"] == "a"
    with pytest.raises(ValueError, match=message):
        dataset[2]


def test_a_row_without_a_class_is_named(save):
    name = save([png(Image.new("RGB", (4, 4)))] * 3, ["a"] * 3, [0, None, 0])
    with pytest.raises(ValueError, match="Row 1 of .*rows has no class in its column 'label'"):
        HubDataset(name, None, "image", "label", "label")
