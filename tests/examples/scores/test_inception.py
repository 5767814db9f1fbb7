import json

import numpy as np
import pytest
import torch

from evaluate import main
from scores.inception import import_torch_fidelity, score_pictures
from scores.picture_sets import PictureFolder, open_pictures, write_npz
from tests.examples.pictures import make_pictures


@pytest.fixture(scope="module")
def torch_fidelity():
    try:
        return import_torch_fidelity()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def feature_weights(torch_fidelity, tmp_path_factory):
    """The weights of an Inception network as torch-fidelity wants them, but random."""

    class RandomInception(torch_fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            for module in self.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight)

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = RandomInception("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    torch.save(network.state_dict(), path)
    return path


def statistics_of(pictures, feature_weights):
    """`mu` and `sigma` as they would stand in a published reference."""
    from torch_fidelity.metric_fid import fid_input_id_to_statistics
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=feature_weights, verbose=False
    )
    return fid_input_id_to_statistics(1, network, "2048", input1=pictures, cuda=False, verbose=False)


def test_fid_scores_folders_npz_files_and_statistics(torch_fidelity, feature_weights, tmp_path, capsys):
    folder, dark = make_pictures(tmp_path / "samples"), make_pictures(tmp_path / "dark", seed=1, factor=0.3)
    npz = tmp_path / "samples.npz"
    write_npz(npz, sorted(folder.iterdir()), np.arange(10))

    def score(samples, reference):
        arguments = ["fid", str(samples), str(reference), "--feature_weights", str(feature_weights), "--device", "cpu"]
        main([*arguments, "--json", str(tmp_path / "scores.json"), "--batch_size", "5"])
        lines = capsys.readouterr().out.splitlines()
        result = json.loads((tmp_path / "scores.json").read_text())
        names = ["frechet_inception_distance", "inception_score_mean", "inception_score_std"]
        names += ["precision", "recall", "f_score"] if "precision" in result["scores"] else []
        assert list(result["scores"]) == names and [line.split()[0] for line in lines[: len(names)]] == names
        return result["scores"], lines[len(names) :]

    apart, lines = score(npz, dark)
    assert apart["frechet_inception_distance"] > 1 and apart["inception_score_mean"] >= 1
    assert lines[0] == "10 pictures against 10; the distance is the one to the reference's pictures"
    expected = torch_fidelity.calculate_metrics(
        input1=PictureFolder(folder),
        input2=PictureFolder(dark),
        isc=True,
        fid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=feature_weights,
        cuda=False,
        cache=False,
        verbose=False,
    )
    assert apart == pytest.approx(expected, rel=1e-4)

    # A reference with both: the distance is the one to the statistics, precision and recall are from the pictures.
    with np.load(npz) as arrays:
        both = {**statistics_of(PictureFolder(dark), feature_weights), "arr_0": arrays["arr_0"]}
    np.savez(tmp_path / "both.npz", **both)
    scores, lines = score(folder, tmp_path / "both.npz")
    assert scores["frechet_inception_distance"] == pytest.approx(apart["frechet_inception_distance"], rel=1e-4)
    assert scores["inception_score_mean"] == pytest.approx(apart["inception_score_mean"], rel=1e-6)
    assert scores["precision"] == scores["recall"] == 1
    assert lines[0] == "10 pictures against 10; the distance is the one to the reference's mu and sigma"

    np.savez(tmp_path / "statistics.npz", **statistics_of(PictureFolder(folder), feature_weights))
    scores, lines = score(folder, tmp_path / "statistics.npz")
    assert abs(scores["frechet_inception_distance"]) < 1e-3 * apart["frechet_inception_distance"]
    assert lines[1] == "precision and recall need pictures, and the reference holds statistics alone"


def test_statistics_of_other_features_are_refused(feature_weights, tmp_path):
    pictures = PictureFolder(make_pictures(tmp_path / "samples"))
    statistics = {"mu": np.zeros(64), "sigma": np.eye(64)}
    with pytest.raises(ValueError, match="have to be of 2048 features"):
        score_pictures(pictures, None, statistics, feature_weights, torch.device("cpu"), 5)
    with pytest.raises(ValueError, match="`device` has to be cpu or cuda"):
        score_pictures(pictures, pictures, None, feature_weights, torch.device("meta"), 5)


def test_feature_weights_that_are_missing_or_of_something_else(torch_fidelity, tmp_path, monkeypatch, capsys):
    folder = str(make_pictures(tmp_path / "samples"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({"weight": pytest.approx}, tmp_path / "code.pth")
    for given, message in (
        ([], f"there is no {tmp_path}/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"),
        (["--feature_weights", "no/such.pth"], "there is no no/such.pth"),
        (["--feature_weights", str(tmp_path / "text.pth")], "text.pth is not a state dict of tensors"),
        (["--feature_weights", str(tmp_path / "code.pth")], "code.pth is not a state dict of tensors"),
        (["--feature_weights", str(tmp_path / "other.pth")], "other.pth is of another network"),
    ):
        with pytest.raises(SystemExit):
            main(["fid", folder, folder, *given])
        assert message in capsys.readouterr().err


def test_without_torch_fidelity_the_message_names_it(tmp_path, capsys):
    try:
        import_torch_fidelity()
    except ImportError:
        folder = str(make_pictures(tmp_path / "samples"))
        with pytest.raises(SystemExit):
            main(["fid", folder, folder])
        assert "The scores need torch-fidelity (pip install" in capsys.readouterr().err
    else:
        pytest.skip("torch-fidelity is installed")


def test_statistics_alone_are_a_reference_but_no_samples(tmp_path, capsys):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    pictures, statistics = open_pictures(tmp_path / "reference.npz", "reference")
    assert pictures is None and statistics["sigma"].shape == (2048, 2048)
    with pytest.raises(SystemExit):
        main(["fid", str(tmp_path / "reference.npz"), str(tmp_path / "reference.npz")])
    assert "`samples` has to hold pictures" in capsys.readouterr().err
