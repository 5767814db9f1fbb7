"""Whether a picture shows its prompt, from what was found in it."""

from dataclasses import dataclass

from icon_world.categories import IconPrompt
from icon_world.recognition import FoundIcon

# The centres of a "position" picture, in pixels along the named axis and across it.
MIN_CENTER_DISTANCE_ALONG = 16
MAX_CENTER_DISTANCE_ACROSS = 14  # exclusive
CENTER_TOLERANCE_PX = 1  # a found box may be half a pixel off on either side of either icon

# Colors are compared by Euclidean distance in RGB, on values of 0 to 255.
MIN_IOU = 0.65
MAX_COLOR_DISTANCE = 60


@dataclass(frozen=True)
class Verdict:
    """Whether the picture shows the prompt, why not (empty if it does), and the icons that were found."""

    right: bool
    reason: str
    icons: tuple[FoundIcon, ...]


def find_difference(prompt: IconPrompt, icons: tuple[FoundIcon, ...]) -> str:
    """In what the icons differ from the prompt, in words; empty if in nothing."""
    if len(icons) != len(prompt.icons):
        return f"{len(icons)} icons in place of {len(prompt.icons)}"
    for icon in icons:
        if icon.iou < MIN_IOU:
            return f"an icon like none of the shapes (nearest: {icon.shape}, IoU {icon.iou:.2f})"
        if icon.color_distance > MAX_COLOR_DISTANCE:
            return f"a {icon.shape} in none of the colors (nearest: {icon.color}, at {icon.color_distance:.0f})"
    found_shapes = sorted(icon.shape for icon in icons)
    if found_shapes != sorted(shape for shape, _ in prompt.icons):
        return f"the shapes are {', '.join(found_shapes)}"
    for shape, color in dict.fromkeys(prompt.icons):
        colors = sorted({icon.color for icon in icons if icon.shape == shape})
        if len(colors) > 1:
            return f"the colors differ: {', '.join(colors)}"
        if color is not None and colors != [color]:
            return f"the {shape} is {colors[0]}"
    if prompt.relation is not None:
        centers = {icon.shape: icon.center for icon in icons}
        first, second = (centers[shape] for shape, _ in prompt.icons)
        offset = second[0] - first[0], second[1] - first[1]
        if not relation_holds(prompt.relation, *offset, tolerance=CENTER_TOLERANCE_PX):
            return f"not {prompt.relation}: the second is {offset[0]:+.1f} px right, {offset[1]:+.1f} px down"
    return ""


def relation_holds(relation: str, offset_x: float, offset_y: float, tolerance: float = 0.0) -> bool:
    """Whether A stands in the relation to B, given where B's centre is, in pixels right of and below A's.

    At most one relation holds for any offset, whatever the tolerance.
    """
    along, across = {
        "left of": (offset_x, offset_y),
        "right of": (-offset_x, offset_y),
        "above": (offset_y, offset_x),
        "below": (-offset_y, offset_x),
    }[relation]
    return (
        along >= MIN_CENTER_DISTANCE_ALONG - tolerance
        and abs(across) < MAX_CENTER_DISTANCE_ACROSS + tolerance
        and along > abs(across)
    )
