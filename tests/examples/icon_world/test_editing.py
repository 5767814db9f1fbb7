import numpy as np
import pytest
from PIL import Image

from icon_world.editing import EDITS, make_edits, show_edit
from icon_world.world import IconWorld


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld()


@pytest.mark.parametrize("kind", EDITS)
def test_the_source_is_not_yet_what_is_asked_for(world, kind):
    edits = make_edits(world, kind, 20, seed=0)
    assert edits[:5] != make_edits(world, kind, 5, seed=1)
    assert [edit.prompt for edit in edits[:5]] == [edit.prompt for edit in make_edits(world, kind, 5, seed=0)]
    for edit in edits:
        assert not world.check(edit.source, edit.prompt)
        parsed = world.parse(edit.prompt)
        assert parsed.category == "single_object" or world.is_held_out(edit.prompt)


@pytest.mark.parametrize("kind", ["replace", "extend"])
def test_the_mask_leaves_all_icons_but_one(world, kind):
    """And room for one of any shape."""
    for edit in make_edits(world, kind, 20, seed=0):
        masked = np.asarray(edit.mask)[..., None] == 255
        rest = Image.fromarray(np.where(masked, world.background, np.asarray(edit.source)))
        asked = world.parse(edit.prompt).icons
        found = world.judge(rest, edit.prompt).icons
        assert len(found) == len(asked) - 1 and masked.sum() >= world.longest_side_px[len(asked)] ** 2
        if kind == "extend":
            assert found[0].shape in dict(asked)


def test_an_edit_is_shown_beside_its_result(world):
    edit = make_edits(world, "extend", 1, seed=0)[0]
    shown = np.asarray(show_edit(edit, Image.new("RGB", (64, 64), "red"))).astype(int)
    source = np.asarray(edit.source).astype(int)
    assert shown.shape == (64, 130, 3) and (shown[:, 66:] == [255, 0, 0]).all()
    assert (shown[:32, :64] == source[:32]).all() and (shown[32:, :64] < source[32:]).all()
