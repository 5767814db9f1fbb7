import numpy as np
import pytest

from data.folders import ClassFolder
from digits import main
from mnist_digits.digits import read_digits


@pytest.fixture(scope="module")
def digits():
    return read_digits()


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
