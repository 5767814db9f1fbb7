"""A shape that no model of the icon world has seen, to teach it by fine-tuning."""

from functools import cached_property

from icon_world.world import IconPrompt, IconWorld

NEW_SHAPES = {"bolt": ("f0e7", "bolts"), "square": ("f0c8", "squares")}  # with held-out prompts in every category


class NewShapeWorld(IconWorld):
    """
    The icon world with one more shape, and of its prompts those that name it. They are held out as all others are,
    and so is the shape on its own, in no color: it is never trained on.

    Raises:
        ValueError: for another shape than those of `NEW_SHAPES`.
    """

    def __init__(self, shape: str):
        if shape not in NEW_SHAPES:
            raise ValueError(f"`new_shape` has to be one of {', '.join(NEW_SHAPES)}, but is {shape!r}.")
        super().__init__({shape: NEW_SHAPES[shape]})
        self.new_shape = shape

    @cached_property
    def prompts_of_shape(self) -> dict[str, list[IconPrompt]]:
        """All prompts that name the shape, by category."""
        return {
            category: [p for p in prompts if self.new_shape in {shape for shape, _ in p.icons}]
            for category, prompts in self.prompts.items()
        }

    @cached_property
    def training_prompts(self) -> dict[str, list[IconPrompt]]:
        untrained = self.held_out_prompts
        return {
            category: [p for p in prompts if p not in untrained[category]]
            for category, prompts in self.prompts_of_shape.items()
        }

    @cached_property
    def held_out_prompts(self) -> dict[str, list[IconPrompt]]:
        return {
            category: [p for p in prompts if category == "single_object" or self.is_held_out(p.text)]
            for category, prompts in self.prompts_of_shape.items()
        }
