import pytest
from PIL import Image

from data.folders import ImageFolder
from tests.examples.pictures import write_pictures


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
