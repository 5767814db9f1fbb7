import json

import pytest
from PIL import Image

from data.folders import ClassFolder, ImageFolder
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
        ('{"file_name": "0.png", "text": null}', "'text' has to be text but is None"),
        ('\n{"file_name": "0.png", "text": "a\\ud800"}', "line 2: 'text' holds a lone surrogate at index 1"),
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


def test_captions_may_hold_what_json_may(tmp_path):
    """A byte-order mark, blank lines, and the characters that a text file does not end lines with."""
    folder = write_pictures(tmp_path / "pictures")
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb"]
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=i == 3) for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_bytes(("\ufeff" + "\n\n".join(lines[:2]) + "\r\n \r\n").encode())
    with (folder / "metadata.jsonl").open("ab") as file:
        file.write("\n".join(lines[2:]).encode())
    assert [text for _, text in ImageFolder(folder, "text").entries] == texts


def test_captions_in_another_encoding_are_named(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "metadata.jsonl").write_bytes(
        b'{"file_name": "0.png", "text": "a"}\n' + '{"file_name": "1.png", "text": "é"}'.encode("latin-1")
    )
    with pytest.raises(ValueError, match="metadata.jsonl has to be UTF-8, but its line 2 is not"):
        ImageFolder(folder, "text")


def test_the_first_10_000_captions_are_checked_at_once_and_the_others_when_met(tmp_path, monkeypatch):
    def check(text):
        if text == "picture 3":
            raise ValueError("too long.")

    folder = write_pictures(tmp_path / "pictures")
    message = "The caption of .*3.png, 'picture 3'...: too long."
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, "text", check_caption=check)
    monkeypatch.setattr("data.folders.MAX_ROWS_CHECKED_FIRST", 3)
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, "text", check_caption=check)[3]
    with pytest.raises(ValueError, match="3.png cannot be read"):
        ImageFolder(folder, "text")[3]


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints", "dog/.ipynb_checkpoints"):
        write_pictures(tmp_path / "classes" / name, number=1)
    (tmp_path / "classes" / "cat" / "._0.png").write_bytes(b"no picture")
    folder = ClassFolder(tmp_path / "classes")
    assert folder.label_names == ["cat", "dog"] and len(folder) == 2


def test_the_background_of_transparent_pictures(tmp_path):
    (tmp_path / "classes" / "square").mkdir(parents=True)
    Image.new("RGBA", (4, 4)).save(tmp_path / "classes" / "square" / "0.png")
    for background, rgb in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        for dataset in (
            ClassFolder(tmp_path / "classes", background),
            ImageFolder(tmp_path / "classes", background=background),
        ):
            assert dataset[0]["image"].getpixel((0, 0)) == rgb
