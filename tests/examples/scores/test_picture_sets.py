import zipfile

import numpy as np
import pytest
import torch

from scores.picture_sets import PictureArray, PictureFolder, open_pictures, write_npz
from tests.examples.pictures import make_pictures


def test_a_folder_and_its_npz_hold_the_same_pictures(tmp_path):
    folder = make_pictures(tmp_path / "pictures")
    write_npz(tmp_path / "stored.npz", sorted(folder.iterdir()), np.arange(10))
    with np.load(tmp_path / "stored.npz") as arrays:
        np.savez(tmp_path / "numpy.npz", arrays["arr_0"])
        np.savez_compressed(tmp_path / "compressed.npz", arrays["arr_0"])
        np.savez(tmp_path / "fortran.npz", np.asfortranarray(arrays["arr_0"]))
    pictures = PictureFolder(folder)
    assert len(pictures) == 10 and pictures[3].dtype == torch.uint8 and pictures[3].shape == (3, 12, 16)
    for name in ("stored", "numpy", "compressed", "fortran"):
        array = PictureArray(tmp_path / f"{name}.npz")
        assert isinstance(array.pixels, np.memmap) == (name != "compressed")  # what is mapped takes no memory
        assert len(array) == 10 and all(torch.equal(array[i], pictures[i]) for i in range(10))


def test_equal_pictures_make_equal_npz_files(tmp_path):
    folder = make_pictures(tmp_path / "pictures")
    for name in ("one.npz", "two.npz"):
        write_npz(tmp_path / name, sorted(folder.iterdir()), np.arange(10))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # none, rather than now
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "pictures", "two.npz"]
    make_pictures(tmp_path / "other", number=1, size=(8, 8))
    with pytest.raises(ValueError, match="000000.png is 8 x 8"):
        write_npz(tmp_path / "three.npz", [*folder.iterdir(), tmp_path / "other" / "000000.png"], np.arange(11))
    assert not (tmp_path / "three.npz").exists()


def test_sets_of_pictures_that_cannot_be_scored(tmp_path):
    folder = make_pictures(tmp_path / "mixed")
    make_pictures(tmp_path / "mixed" / "deeper", number=1, size=(8, 8))
    with pytest.raises(ValueError, match=r"of one size, but .*000000.png is 8 x 8 and .*000000.png 16 x 12"):
        open_pictures(folder, "samples")
    (folder / "000004.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="000004.png cannot be read"):
        open_pictures(folder, "samples")
    with pytest.raises(ValueError, match="`reference` has to hold at least 10 pictures, but .* has 9"):
        open_pictures(make_pictures(tmp_path / "few", number=9), "reference")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no pictures in"):
        open_pictures(tmp_path / "empty", "samples")

    file = tmp_path / "set.npz"
    file.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="`samples` .*set.npz cannot be used"):
        open_pictures(file, "samples")
    for arrays, message in (
        ({"images": np.zeros(3)}, r"neither arr_0 nor mu and sigma but \['images'\]"),
        ({"arr_0": np.zeros((10, 8, 8, 3), np.float32)}, r"has to be uint8 \(N, height, width, 3\), but is float32"),
        ({"arr_0": np.zeros((10, 3, 8, 8), np.uint8)}, r"but is uint8 \(10, 3, 8, 8\)"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=message):
            open_pictures(file, "samples")
