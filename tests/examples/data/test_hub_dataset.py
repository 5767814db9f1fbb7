import pytest

from data.hub_dataset import HubDataset
from tests.examples.pictures import write_pictures


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
