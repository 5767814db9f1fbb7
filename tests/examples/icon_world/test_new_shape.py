import json

import numpy as np
import pytest

from icon_world.dataset import write_image_folder
from icon_world.new_shape import NEW_SHAPES, NewShapeWorld
from icon_world.world import CATEGORIES, IconWorld


@pytest.mark.parametrize("shape", NEW_SHAPES)
def test_prompts_name_the_shape(shape):
    world, known = NewShapeWorld(shape), IconWorld()
    for category in CATEGORIES:
        trained = {prompt.text for prompt in world.training_prompts[category]}
        held_out = {prompt.text for prompt in world.held_out_prompts[category]}
        assert held_out and not trained & held_out
        assert bool(trained) == (category != "single_object")
        for text in trained | held_out:
            assert shape in text
            with pytest.raises(ValueError, match="has to be one of the icon world"):
                known.parse(text)
    assert [p.text for p in world.held_out_prompts["single_object"]] == [f"a {shape}"]


def test_what_is_drawn_is_recognised():
    world = NewShapeWorld("bolt")
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        prompt = world.held_out_prompts[category][0].text
        verdict = world.judge(world.draw(prompt, rng), prompt)
        assert verdict.right and "bolt" in {icon.shape for icon in verdict.icons}


def test_a_folder_of_it(tmp_path):
    write_image_folder(tmp_path / "bolts", 12, 0, "bolt")
    lines = (tmp_path / "bolts" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 12 and all("bolt" in text and text != "a bolt" for text in texts)
    with pytest.raises(ValueError, match="`new_shape` has to be one of bolt, square, but is 'star'"):
        write_image_folder(tmp_path / "stars", 1, 0, "star")
