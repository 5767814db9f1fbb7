import json
import pickle
import zlib
from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from icon_world.artwork import find_font
from icon_world.checking import find_difference, relation_holds
from icon_world.dataset import IconDataset
from icon_world.world import CATEGORIES, DrawnIcon, IconWorld
from icons import main


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld()


def some_prompts(world: IconWorld, number_of_color_attr: int) -> list[str]:
    """Every prompt, but only so many of the 5040 of `color_attr`."""
    texts = {category: [prompt.text for prompt in prompts] for category, prompts in world.prompts.items()}
    rng = np.random.default_rng(0)
    texts["color_attr"] = list(rng.choice(texts["color_attr"], number_of_color_attr, replace=False))
    return [str(text) for category in CATEGORIES for text in texts[category]]


def center_offset(first: DrawnIcon, second: DrawnIcon) -> tuple[float, float]:
    return tuple((second.box[i] + second.box[i + 2] - first.box[i] - first.box[i + 2]) / 2 for i in (0, 1))


def paste(world: IconWorld, *icons: tuple[str, str, int, tuple[int, int]]) -> Image.Image:
    """A picture of (shape, color, number of icons that sets its size, (left, top))."""
    pixels = np.full((64, 64, 3), world.background, dtype=np.uint8)
    for shape, color, number, (left, top) in icons:
        patch = world._patches[shape, number, color]
        pixels[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return Image.fromarray(pixels)


# Prompts


def test_every_category_is_enumerated_once(world):
    assert {category: len(prompts) for category, prompts in world.prompts.items()} == {
        "single_object": 10,
        "two_object": 10 * 9,
        "counting": 10 * 3,
        "colors": 10 * 8,
        "position": 10 * 9 * 4,
        "color_attr": 10 * 9 * 8 * 7,
    }
    texts = [prompt.text for prompts in world.prompts.values() for prompt in prompts]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    ("text", "category", "icons", "relation"),
    [
        ("a star", "single_object", (("star", None),), None),
        ("a star and a car", "two_object", (("star", None), ("car", None)), None),
        ("three fish", "counting", (("fish", None),) * 3, None),
        ("an orange key", "colors", (("key", "orange"),), None),
        ("a moon left of a tree", "position", (("moon", None), ("tree", None)), "left of"),
        ("a red fish and an orange crown", "color_attr", (("fish", "red"), ("crown", "orange")), None),
    ],
)
def test_parse(world, text, category, icons, relation):
    prompt = world.parse(text)
    assert (prompt.text, prompt.category, prompt.icons, prompt.relation) == (text, category, icons, relation)


@pytest.mark.parametrize(
    "text", ["", "a dog", "a orange key", "five stars", "a star and a star", "a red star and a red car", "A star"]
)
def test_a_prompt_from_outside_the_world_is_refused_by_name(world, text):
    for refuse in (world.parse, world.is_held_out, lambda t: world.draw(t, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="`prompt` has to be one of the icon world"):
            refuse(text)


def test_a_fifth_of_every_category_but_the_first_is_held_out_by_the_checksum_of_its_sorted_words(world):
    for category, prompts in world.prompts.items():
        held_out = [prompt for prompt in prompts if world.is_held_out(prompt.text)]
        if category == "single_object":
            assert held_out == []
            assert world.held_out_prompts[category] == prompts
            continue
        assert world.held_out_prompts[category] == held_out
        assert 0.1 < len(held_out) / len(prompts) < 0.4
        assert set(held_out) == set(prompts) - set(world.training_prompts[category])
        for prompt in prompts:
            checksum = zlib.crc32(" ".join(sorted(prompt.text.split())).encode())
            assert world.is_held_out(prompt.text) == (checksum % 5 == 0)


def test_a_held_out_prompt_is_held_out_in_either_order(world):
    for prompt in world.held_out_prompts["two_object"]:
        first, second = prompt.text.split(" and ")
        assert world.is_held_out(f"{second} and {first}")


def test_settings_are_chosen_on_a_fifth_of_all_prompts_that_are_training_prompts(world):
    for category, prompts in world.validation_prompts.items():
        assert set(prompts) <= set(world.training_prompts[category])
        assert (
            len(prompts) == 10
            if category == "single_object"
            else 0.1 < len(prompts) / len(world.prompts[category]) < 0.3
        )


def test_sampling_follows_the_weights_and_never_meets_a_held_out_prompt(world):
    rng = np.random.default_rng(0)
    weights = {"counting": 3, "colors": 0}
    drawn = [world.sample_prompt(rng, weights) for _ in range(7000)]
    assert not any(world.is_held_out(prompt.text) for prompt in drawn)
    counts = Counter(prompt.category for prompt in drawn)
    assert counts["colors"] == 0
    for category in set(CATEGORIES) - {"colors"}:
        expected = 7000 * weights.get(category, 1) / 7
        assert abs(counts[category] - expected) < 5 * expected**0.5


def test_mixed_prompts_are_drawn_on_request_and_show_nothing_that_another_prompt_asks_for(world):
    rng = np.random.default_rng(0)
    weights = dict.fromkeys(CATEGORIES, 0) | {"mixed": 1}
    seen = Counter()
    for _ in range(600):
        prompt = world.sample_prompt(rng, weights)
        assert prompt.category == "mixed"
        assert world.parse(prompt.text) == prompt and not world.is_held_out(prompt.text)
        image, icons = world.draw_scene(prompt, rng)
        assert world.check(image, prompt.text)
        shapes = Counter(icon.shape for icon in icons)
        assert 3 <= len(icons) <= 4 and len(shapes) >= 2
        assert len({(icon.shape, icon.color) for icon in icons}) == len(shapes)  # one color a shape
        # The text says what is drawn, and what it does not say is drawn at random
        phrases = []
        for shape, number in shapes.items():
            color = next(color for other, color in prompt.icons if other == shape)
            assert color in (None, *(icon.color for icon in icons if icon.shape == shape))
            seen[number, color is None] += 1
            words = ["a", "an", *world.counts.values(), color or "", shape, world.shapes[shape]]
            phrases.append(next(one for one in prompt.text.split(" and ") if set(one.split()) <= set(words)))
            assert phrases[-1].split()[0] == (
                world.counts[number] if number > 1 else "an" if color == "orange" else "a"
            )
        assert sorted(phrases) == sorted(prompt.text.split(" and "))
    assert {number for number, _ in seen} == {1, 2, 3} and min(seen.values()) > 10


def parts(world: IconWorld, text: str) -> set[str]:
    """What the phrases of a prompt say by themselves and two by two, with numbers and colors said or left out."""
    singular = {plural: shape for shape, plural in world.shapes.items()}
    phrases = []
    for phrase in text.split(" and "):
        number, *colors, shape = phrase.split()
        shape = shape if number in ("a", "an") else singular[shape]
        article = "an" if colors == ["orange"] else "a"
        alone = {f"a {shape}"} | {f"{article} {color} {shape}" for color in colors}
        phrases.append((alone, alone | {f"{number} {world.shapes[shape]}", f"{number} {shape}", phrase}))
    pairs = {
        f"{one} and {other}"
        for (first, _), (second, _) in permutations(phrases, 2)
        for one, other in product(first, second)
    }
    return pairs.union(*(texts for _, texts in phrases))


def test_no_part_of_a_training_prompt_of_several_phrases_is_held_out(world):
    """Of 100,000 drawn prompts: the prompt of a category is none that is held out, and of a mixed one no part is."""
    assert parts(world, "two red stars and a car") >= {
        "two stars",
        "a red star",
        "a star and a car",
        "a red star and a car",
    }
    held_out = {p.text for c in CATEGORIES[1:] for p in world.held_out_prompts[c]}
    rng = np.random.default_rng(0)
    drawn = Counter(world.sample_prompt(rng, {"mixed": 14}) for _ in range(100_000))
    assert 69_000 < sum(times for prompt, times in drawn.items() if prompt.category == "mixed") < 71_000
    for prompt in drawn:
        assert prompt.text not in held_out
        if prompt.category == "mixed":
            assert not parts(world, prompt.text) & held_out
    # Nothing but that is left out
    mixed_parts = set().union(*(parts(world, prompt.text) for prompt in drawn if prompt.category == "mixed"))
    for category in ("colors", "two_object"):
        assert {prompt.text for prompt in world.training_prompts[category]} <= mixed_parts
    assert {p.text for p in world.training_prompts["counting"] if len(p.icons) < 4} <= mixed_parts


def test_a_mixed_prompt_is_held_out_where_a_part_of_it_is(world):
    singles = product(world.shapes, (None, *world.colors))
    phrases = [
        f"{'an' if color == 'orange' else 'a'} {color or ''} {shape}".replace("  ", " ") for shape, color in singles
    ]
    held_out = {p.text for c in CATEGORIES[1:] for p in world.held_out_prompts[c]}
    found = Counter()
    for count, phrase in product(world.prompts["counting"], phrases):
        if count.icons[0][0] not in phrase and len(count.icons) < 4:
            text = f"{phrase} and {count.text}"
            expected = bool(parts(world, text) & held_out)
            assert world.is_held_out(text) == expected, text
            found[expected] += 1
    assert min(found.values()) > 300


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("two red stars and a car", True),
        ("a car and two red stars", True),
        ("two stars and a car", True),
        ("two blue stars and a car", False),
        ("a red star and two cars", False),
        ("a red star and a car and a key", False),
    ],
)
def test_mixed_prompts_are_checked(world, text, right):
    image = world.draw("two red stars and a car", np.random.default_rng(0))
    assert world.check(image, text) == right


@pytest.mark.parametrize(
    "text",
    ["two stars and a star and a car", "four stars and a car", "a red star and a car and", "two star and a car"],
)
def test_what_is_no_mixed_prompt_is_refused(world, text):
    with pytest.raises(ValueError, match="one of the icon world"):
        world.parse(text)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"colours": 1}, "names 'colours'"),
        ({"colors": -1}, "gives colors -1"),
        ({"colors": float("nan")}, "gives colors nan"),
        (dict.fromkeys(CATEGORIES, 0), "at least one category"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        IconDataset(1, seed=0, category_weights=weights)


# Drawing


def test_scenes_obey_the_rules_of_the_world(world):
    rng = np.random.default_rng(1)
    for text in some_prompts(world, 500):
        prompt = world.parse(text)
        image, icons = world.draw_scene(text, rng)
        assert image.size == (64, 64) and image.mode == "RGB"
        assert [icon.shape for icon in icons] == [shape for shape, _ in prompt.icons]
        for icon, (_, color) in zip(icons, prompt.icons, strict=True):
            assert color in (None, icon.color)
            left, top, right, bottom = icon.box
            assert left % 4 == top % 4 == 0
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            assert max(right - left, bottom - top) == {1: 36, 2: 26, 3: 22, 4: 20}[len(icons)]
        for i, first in enumerate(icons):
            for second in icons[:i]:
                gaps = [max(first.box[k] - second.box[k + 2], second.box[k] - first.box[k + 2]) for k in (0, 1)]
                assert max(gaps) >= 4
        if prompt.category == "counting":
            assert len({icon.color for icon in icons}) == 1
        if prompt.category == "position":
            x, y = center_offset(*icons)
            along, across = {"left of": (x, y), "right of": (-x, y), "above": (y, x), "below": (-y, x)}[
                prompt.relation
            ]
            assert along >= 16 and abs(across) < 14


def test_what_a_prompt_does_not_name_varies(world):
    rng = np.random.default_rng(2)
    scenes = [world.draw_scene("a star and a car", rng)[1] for _ in range(300)]
    assert {icon.color for icons in scenes for icon in icons} == set(world.colors)
    assert len({icons[0].box for icons in scenes}) > 60
    assert any(icons[0].color == icons[1].color for icons in scenes)


def test_an_icon_has_its_flat_color_inside_and_blends_into_the_background(world):
    image = np.asarray(world.draw("a blue heart", np.random.default_rng(3))).reshape(-1, 3).astype(int)
    counts = Counter(map(tuple, image))
    assert {color for color, _ in counts.most_common(2)} == {(250, 248, 244), (35, 90, 220)}
    assert 20 < sum(counts.values()) - sum(count for _, count in counts.most_common(2)) < 200


def test_items_are_a_function_of_seed_and_index(tmp_path):
    dataset = IconDataset(8, seed=5)
    items = [dataset[index] for index in range(8)]
    copy = pickle.loads(pickle.dumps(IconDataset(100, seed=5)))
    for index in (7, 0, 3):
        assert copy[index]["text"] == items[index]["text"]
        assert copy[index]["image"].tobytes() == items[index]["image"].tobytes()
    from_workers = [item for batch in DataLoader(dataset, 2, num_workers=2, collate_fn=list) for item in batch]
    assert [item["text"] for item in from_workers] == [item["text"] for item in items]
    assert [item["image"].tobytes() for item in from_workers] == [item["image"].tobytes() for item in items]
    other = IconDataset(8, seed=6)
    assert [other[index]["text"] for index in range(8)] != [item["text"] for item in items]


def test_the_dataset_has_an_end():
    dataset = IconDataset(3, seed=0)
    assert len(dataset) == 3 and len(list(dataset)) == 3
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(ValueError, match="`num_pictures`"):
        IconDataset(0, seed=0)
    with pytest.raises(ValueError, match="`seed`"):
        IconDataset(1, seed=-1)


def test_an_image_folder_is_written_whole_or_not_at_all(tmp_path, capsys):
    main(["--output_dir", str(tmp_path / "icons"), "--num_pictures", "3", "--seed", "4"])
    lines = [json.loads(line) for line in (tmp_path / "icons" / "metadata.jsonl").read_text().splitlines()]
    dataset = IconDataset(3, seed=4)
    assert [line["text"] for line in lines] == [dataset[index]["text"] for index in range(3)]
    with Image.open(tmp_path / "icons" / lines[2]["file_name"]) as image:
        assert image.tobytes() == dataset[2]["image"].tobytes()
    for arguments in (["--output_dir", str(tmp_path / "icons")], ["--output_dir", str(tmp_path / "new"), "--seed=-1"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["icons"]


def test_a_missing_font_package_is_named():
    with pytest.raises(ImportError, match="pip install nosuchfont==1.0"):
        find_font("nosuchfont==1.0", "font.ttf")
    with pytest.raises(ImportError, match="those of numpy==0.0"):
        find_font("numpy==0.0", "font.ttf")


# Checking


def test_every_drawn_picture_is_right(world):
    rng = np.random.default_rng(7)
    checked = Counter()
    for text in some_prompts(world, 1500) + 20 * [p.text for p in world.prompts["counting"] + world.prompts["colors"]]:
        verdict = world.judge(world.draw(text, rng), text)
        assert verdict.right and verdict.reason == "", f"{text}: {verdict}"
        checked[world.parse(text).category] += 1
    assert sum(checked.values()) > 4000 and len(checked) == 6


def test_a_picture_is_right_for_exactly_the_prompts_that_its_scene_fulfils(world):
    """Against the scene as drawn, for every prompt of the world, but for offsets near the bounds of a relation."""

    def fulfils(icons, prompt) -> bool | None:
        if Counter(icon.shape for icon in icons) != Counter(shape for shape, _ in prompt.icons):
            return False
        if prompt.category == "counting":
            return len({icon.color for icon in icons}) == 1
        by_shape = {icon.shape: icon for icon in icons}
        if any(color not in (None, by_shape[shape].color) for shape, color in prompt.icons):
            return False
        if prompt.relation is None:
            return True
        x, y = center_offset(*(by_shape[shape] for shape, _ in prompt.icons))
        along, across = (x, y) if prompt.relation in ("left of", "right of") else (y, x)
        along = along if prompt.relation in ("left of", "above") else -along
        if abs(along - 16) <= 2 or abs(abs(across) - 14) <= 2:
            return None
        return along >= 16 and abs(across) < 14

    rng = np.random.default_rng(8)
    every_prompt = [prompt for prompts in world.prompts.values() for prompt in prompts]
    scenes = Counter()
    for category in CATEGORIES:
        for index in rng.choice(len(world.prompts[category]), 25):
            image, icons = world.draw_scene(world.prompts[category][index].text, rng)
            found = world.find_icons(image)
            for prompt in every_prompt:
                expected = fulfils(icons, prompt)
                if expected is not None:
                    reason = find_difference(prompt, found)
                    assert (reason == "") == expected, (prompt.text, icons, reason)
                    scenes[category, expected] += 1
    assert all(scenes[category, True] >= 25 and scenes[category, False] > 100_000 for category in CATEGORIES)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a star", []),
        ("a star and a car", ["a car and a star"]),
        ("four keys", []),
        ("a red star", []),
        ("a star left of a car", ["a car right of a star"]),
        ("a moon below a fish", ["a fish above a moon"]),
        ("a red star and an orange car", ["an orange car and a red star"]),
    ],
)
def test_within_a_category_only_prompts_that_mean_the_same_are_accepted(world, text, same):
    rng = np.random.default_rng(9)
    for _ in range(10):
        found = world.find_icons(world.draw(text, rng))
        accepted = {p.text for p in world.prompts[world.parse(text).category] if not find_difference(p, found)}
        assert accepted == {text, *same}


def test_noise_blur_and_specks_do_not_matter(world):
    rng = np.random.default_rng(10)
    right = 0
    for _ in range(200):
        category = CATEGORIES[rng.integers(6)]
        text = world.prompts[category][rng.integers(len(world.prompts[category]))].text
        image = world.draw(text, rng).filter(ImageFilter.GaussianBlur(0.6))
        pixels = np.asarray(image) + rng.normal(0, 6, (64, 64, 3))
        pixels[0, 0] = pixels[63, 0] = 128  # two specks, of one pixel each
        right += world.check(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), text)
    assert right >= 198


def test_two_icons_of_one_shape_are_not_one_and_different_colors_do_not_count(world):
    two = paste(world, ("heart", "red", 2, (0, 0)), ("heart", "red", 2, (36, 36)))
    assert world.check(two, "two hearts")
    assert not world.check(two, "a heart")
    assert not world.check(two, "three hearts")
    mixed = paste(world, ("heart", "red", 2, (0, 0)), ("heart", "blue", 2, (36, 36)))
    assert "colors differ: blue, red" in world.judge(mixed, "two hearts").reason


def test_color_and_shape_go_together(world):
    image = paste(world, ("heart", "red", 2, (0, 0)), ("car", "blue", 2, (36, 36)))
    assert world.check(image, "a red heart and a blue car")
    assert world.judge(image, "a blue heart and a red car").reason == "the heart is red"


@pytest.mark.parametrize("offset", [(20, 20), (-20, 20), (0, 0), (14, 5), (30, 16)])
def test_a_diagonal_or_too_near_an_icon_is_in_no_relation(offset):
    assert not any(relation_holds(relation, *offset) for relation in ("left of", "right of", "above", "below"))


def test_at_most_one_relation_holds_even_with_tolerance():
    offsets = np.arange(-40, 40.5, 0.5)
    for x in offsets:
        for y in offsets:
            held = [r for r in ("left of", "right of", "above", "below") if relation_holds(r, x, y, tolerance=2)]
            assert len(held) <= 1
    assert relation_holds("left of", 16, -13.5) and relation_holds("above", 13.5, 16)
    assert relation_holds("left of", 15.5, 0, tolerance=1) and not relation_holds("left of", 14.5, 0, tolerance=1)


def test_what_is_no_icon_is_refused(world):
    blank = Image.new("RGB", (64, 64), (250, 248, 244))
    assert world.judge(blank, "a star").reason == "0 icons in place of 1"

    cross = blank.copy()
    cross.paste((220, 35, 40), (10, 29, 54, 33))
    cross.paste((220, 35, 40), (30, 10, 34, 54))
    assert "like none of the shapes" in world.judge(cross, "a star").reason

    black = np.asarray(paste(world, ("star", "black", 1, (8, 8))))
    grey = Image.fromarray(np.where(black < 128, 140, 250).astype(np.uint8))
    assert "in none of the colors" in world.judge(grey, "a star").reason

    extra = paste(world, ("star", "red", 1, (0, 0)), ("fish", "blue", 4, (44, 50)))
    assert not world.check(extra, "a star")

    upside_down = paste(world, ("tree", "green", 1, (8, 8))).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert not world.check(upside_down, "a tree")

    with pytest.raises(ValueError, match="64x64 pixels, but is \\(32, 32\\)"):
        world.check(blank.resize((32, 32)), "a star")
    with pytest.raises(ValueError, match="`prompt`"):
        world.check(blank, "a dog")


def test_found_icons_say_what_is_where(world):
    image, drawn = world.draw_scene("a purple key and a yellow fish", np.random.default_rng(11))
    by_shape = {icon.shape: icon for icon in world.find_icons(image)}
    for icon in drawn:
        found = by_shape[icon.shape]
        assert found.color == icon.color and found.color_distance < 3 and found.iou > 0.85
        assert max(abs(a - b) for a, b in zip(found.box, icon.box, strict=True)) <= 1


def test_blurred_edges_have_no_say_in_the_color(world):
    rng = np.random.default_rng(12)
    for plural in world.shapes.values():
        image = world.draw(f"four {plural}", rng).filter(ImageFilter.GaussianBlur(0.6))
        assert max(icon.color_distance for icon in world.find_icons(image)) < 20


def test_smaller_icons_are_still_what_the_prompt_says(world):
    """Each number of icons also in the sizes of more, and never in a size of fewer."""
    sides = {number: set() for number in (1, 2, 3, 4)}
    rng = np.random.default_rng(0)
    for prompt in ("a fish", "a red star", "two fish", "a car and a key", "three stars", "four stars") * 12:
        image, icons = world.draw_scene(prompt, rng, smaller=True)
        assert world.check(image, prompt)
        for left, top, right, bottom in (icon.box for icon in icons):
            sides[len(icons)].add(max(right - left, bottom - top))
    longest = [world.longest_side_px[number] for number in (1, 2, 3, 4)]
    assert [sides[number] for number in (1, 2, 3, 4)] == [set(longest[i:]) for i in range(4)]
    with pytest.raises(ValueError, match="`smaller_share` has to be in \\[0, 1\\], but is 1.5"):
        IconDataset(1, seed=0, smaller_share=1.5)


def test_smaller_share_leaves_the_prompts_alone():
    plain, smaller = IconDataset(40, seed=3), IconDataset(40, seed=3, smaller_share=0.5)
    pairs = [(plain[i], smaller[i]) for i in range(40)]
    assert all(a["text"] == b["text"] for a, b in pairs)
    assert 0 < sum(a["image"] != b["image"] for a, b in pairs)
