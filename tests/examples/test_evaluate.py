import json
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from evaluate import main, mean_score, rate_pictures, sample_prompts, score_categories, wilson_score
from generate import make_grid
from icons import CATEGORIES, IconWorld
from image_sets import PictureArray, PictureFolder, import_torch_fidelity, open_pictures, score_pictures, write_npz
from PIL import Image


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld()


def test_wilson_intervals():
    """Against Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for num_right, num_pictures, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        score = wilson_score(num_right, num_pictures)
        assert score.value == num_right / num_pictures and score.num_pictures == num_pictures
        assert (round(score.low, 4), round(score.high, 4)) == (low, high)
    assert wilson_score(20, 20).high == 1.0


def test_the_interval_of_the_mean_holds_it_95_times_in_100():
    rng = np.random.default_rng(0)
    shares = np.array([0.99, 0.9, 0.8, 0.95, 0.7, 0.85])
    held = 0
    for _ in range(2000):
        score = mean_score([wilson_score(rng.binomial(100, share), 100) for share in shares])
        held += score.low <= shares.mean() <= score.high
    assert 0.935 < held / 2000 < 0.975
    one, mean = wilson_score(50, 100), mean_score([wilson_score(50, 100)] * 6)
    assert mean.high - 0.5 == pytest.approx((one.high - 0.5) / 6**0.5)
    assert 0.5 - mean.low == pytest.approx((0.5 - one.low) / 6**0.5)


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_the_prompts_are_of_the_split_and_enough_of_each_category(world, split):
    split = getattr(world, f"{split}_prompts")
    prompts = sample_prompts(split, 100, seed=0)
    counts = Counter(prompts)
    for category in CATEGORIES:
        of_category = [prompt for prompt in prompts if world.parse(prompt).category == category]
        of_split = [prompt.text for prompt in split[category]]
        assert len(of_category) >= 100 and set(of_category) <= set(of_split)
        assert len({counts[prompt] for prompt in of_category}) == 1  # all count alike
        if len(of_split) < 100:
            assert set(of_category) == set(of_split)
        else:
            assert len(of_category) == 100
    assert prompts == sample_prompts(split, 100, seed=0) != sample_prompts(split, 100, seed=1)
    with pytest.raises(ValueError, match="`pictures_per_category`"):
        sample_prompts(split, 0, seed=0)


def test_a_perfect_artist_scores_1_and_one_that_cannot_count_loses_that_category(world):
    def artist(prompts, seeds):
        return [world.draw(prompt, np.random.default_rng(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one_for_all(prompts, seeds):
        return artist([p if world.parse(p).category != "counting" else "a star" for p in prompts], seeds)

    prompts = sample_prompts(world.held_out_prompts, 20, seed=0)
    scores = score_categories(rate_pictures(world, prompts, artist, seed=7, batch_size=32))
    assert list(scores) == [*CATEGORIES, "mean"]
    assert all(score.value == 1.0 and score.low < 1.0 for score in scores.values())
    assert scores["mean"].num_pictures == len(prompts)

    rated = rate_pictures(world, prompts, one_for_all, seed=7, batch_size=32)
    scores = score_categories(rated)
    assert scores["counting"].value == 0.0
    assert scores["mean"].value == pytest.approx(5 / 6)
    assert {one.category for one in rated if one.reason} == {"counting"}


def test_the_batch_size_changes_no_picture(world):
    def artist(prompts, seeds):
        return [world.draw(prompt, np.random.default_rng(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    prompts = sample_prompts(world.held_out_prompts, 2, seed=0)
    one, five = (rate_pictures(world, prompts, artist, seed=3, batch_size=size) for size in (1, 5))
    assert [rated.seed for rated in one] == [rated.seed for rated in five] == list(range(3, 3 + len(prompts)))
    assert [rated.image.tobytes() for rated in one] == [rated.image.tobytes() for rated in five]


@pytest.mark.parametrize("guidance", [[], ["--guidance_scale", "2"]])
def test_icons_scores_a_pipeline(t2i_pipeline, t2i_pipeline_path, tmp_path, capsys, world, guidance):
    arguments = ["icons", "--model", str(t2i_pipeline_path), "--pictures_per_category", "1", "--seed", "4"]
    arguments += ["--num_inference_steps", "1", "--batch_size", "4", *guidance]
    main([*arguments, "--json", str(tmp_path / "scores.json"), "--grid", str(tmp_path / "grid.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == [*CATEGORIES, "mean"]
    assert lines[8:] == [str(tmp_path / "scores.json"), str(tmp_path / "grid.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "scores.json"]

    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["settings"]["num_inference_steps"] == 1
    assert result["settings"]["guidance_scale"] == (2.0 if guidance else 7.5)  # the pipeline's own
    assert list(result["scores"]) == [*CATEGORIES, "mean"]
    pictures = result["pictures"]
    assert [picture["seed"] for picture in pictures] == [4, 5, 6, 7, 8, 9]
    assert all(world.is_held_out(picture["prompt"]) for picture in pictures[1:])

    pipe = t2i_pipeline()
    pipe.vae.enable_slicing()
    images = pipe(
        [picture["prompt"] for picture in pictures],
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=result["settings"]["guidance_scale"],
        generator=[torch.Generator().manual_seed(picture["seed"]) for picture in pictures],
    ).images
    captions = [f"WRONG, {picture['reason']}: {picture['prompt']}" for picture in pictures]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.tobytes() == make_grid(images, captions).tobytes()


def test_icons_scores_a_pipeline_on_training_prompts_to_choose_settings_on(t2i_pipeline_path, tmp_path, world):
    arguments = ["icons", "--model", str(t2i_pipeline_path), "--pictures_per_category", "1", "--split", "validation"]
    main([*arguments, "--num_inference_steps", "1", "--json", str(tmp_path / "scores.json")])
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["settings"]["split"] == "validation"
    for picture in result["pictures"]:
        prompt = world.parse(picture["prompt"])
        assert prompt in world.validation_prompts[prompt.category] and not world.is_held_out(prompt.text)


def test_icons_tokenizer_scores_reconstructions(t2i_pipeline, t2i_pipeline_path, world, tmp_path, capsys):
    for vae in (t2i_pipeline_path, t2i_pipeline_path / "vae"):
        arguments = ["icons-tokenizer", "--vae", str(vae), "--pictures_per_category", "1"]
        main([*arguments, "--json", str(tmp_path / f"{vae.name}.json")])
        assert capsys.readouterr().out.startswith("PSNR ")
    results = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert results[0]["settings"]["psnr"] == results[1]["settings"]["psnr"]

    vae = t2i_pipeline().vae
    psnr = []
    for picture in results[0]["pictures"]:
        drawn = world.draw(picture["prompt"], np.random.default_rng(picture["seed"]))
        image = torch.from_numpy(np.asarray(drawn) / np.float32(127.5) - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            error = vae(image).sample.clamp(-1, 1) - image
        psnr.append(-10 * torch.log10((error / 2).square().mean()).item())
    assert results[0]["settings"]["psnr"] == pytest.approx(np.mean(psnr), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icons", "--model", "/no/such/folder"], "`model` has to be a pipeline's folder"),
        (["icons", "--batch_size", "0"], "`batch_size` has to be at least 1"),
        (["icons", "--pictures_per_category", "0"], "`pictures_per_category` has to be at least 1"),
        (["icons", "--json", "/no/such/folder/scores.json"], "there is no folder /no/such/folder"),
        (["icons-tokenizer", "--vae", "/no/such/folder"], "`vae` has to be the folder of a BitDanceTokenizer"),
        (
            ["fid", "/no/such/folder", "."],
            "`samples` has to be a folder of pictures or an .npz, but is /no/such/folder",
        ),
        (["fid", "/no/such/file.npz", "."], "`samples` has to be a folder of pictures or an .npz"),
        (["fid", ".", ".", "--batch_size", "0"], "`batch_size` has to be at least 1"),
        (["fid", ".", ".", "--device", "toaster"], "`device` has to be one of cpu"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments_are_refused_by_name(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def make_pictures(folder, number=10, seed=0, size=(16, 12), factor=1.0):
    """Smooth random pictures, `{i:06d}.png`."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(number):
        coarse = Image.fromarray((rng.integers(0, 256, (3, 4, 3)) * factor).astype(np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")
    return folder


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


def test_statistics_alone_are_a_reference_but_no_samples(tmp_path, capsys):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    pictures, statistics = open_pictures(tmp_path / "reference.npz", "reference")
    assert pictures is None and statistics["sigma"].shape == (2048, 2048)
    with pytest.raises(SystemExit):
        main(["fid", str(tmp_path / "reference.npz"), str(tmp_path / "reference.npz")])
    assert "`samples` has to hold pictures" in capsys.readouterr().err


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
