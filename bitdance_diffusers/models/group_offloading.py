"""Group offloading of the transformers: which weights are one group, and which come while others are used.

With streams Diffusers traces one forward, and from then on every module prefetches what came after it there. Calls of
a transformer run different parts of it (a text, a patch, modulations, an evaluation of the head), so that a chain from
one of them would load what the next does not use. What always runs whole and in order are its stacks: each layer
prefetches the next of its stack, and all else waits for its own weights.
"""

from itertools import pairwise

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    GroupOffloadingHook,
)
from torch import nn

PREFETCH_WITHIN_STACKS = "prefetch_within_stacks"


def offload_blocks(transformer: nn.Module) -> list[str]:
    """
    Names for Diffusers' `block_modules`: with them every child of the transformer, the head and its last norm that is
    no stack of layers is a group of its own, loaded when it runs and not whenever its parent does.
    """
    parents = (transformer, transformer.head, transformer.head.norm_out)
    return [
        name for parent in parents for name, child in parent.named_children() if not isinstance(child, nn.ModuleList)
    ]


def prefetch_within_stacks(transformer: nn.Module) -> None:
    """
    Let each layer prefetch the next of its stack. Call it once after Diffusers has applied group offloading; its hook
    does it again where Diffusers applies it again, as it does for a LoRA.
    """
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(PREFETCH_WITHIN_STACKS) is None:
        registry.register_hook(PrefetchWithinStacksHook(transformer), PREFETCH_WITHIN_STACKS)


def group_hook(module: nn.Module) -> GroupOffloadingHook | None:
    return module._diffusers_hook.get_hook(_GROUP_OFFLOADING) if hasattr(module, "_diffusers_hook") else None


class PrefetchWithinStacksHook(ModelHook):
    """On the transformer: before every forward it looks whether group offloading has been applied again."""

    def __init__(self, transformer: nn.Module):
        self.first_module = next(module for module in transformer.layers.modules() if group_hook(module) is not None)
        self.first_hook = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.apply(module)
        return module

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        if group_hook(self.first_module) is not self.first_hook:
            self.apply(module)
        return args, kwargs

    def apply(self, transformer: nn.Module) -> None:
        self.first_hook = group_hook(self.first_module)
        for module in transformer.modules():
            if hasattr(module, "_diffusers_hook"):
                lazy = module._diffusers_hook.get_hook(_LAZY_PREFETCH_GROUP_OFFLOADING)
                if lazy is not None:  # it may be under way: it is not to warn that nothing was traced
                    lazy._layer_execution_tracker_module_names.clear()
                for name in (_LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING):
                    module._diffusers_hook.remove_hook(name, recurse=False)

        def streamed(module: nn.Module) -> list[GroupOffloadingHook]:
            """In the order in which the modules are registered: in a stack, that in which they run."""
            hooks = [group_hook(submodule) for submodule in module.modules()]
            return [hook for hook in hooks if hook is not None and hook.group.stream is not None]

        for hook in streamed(transformer):
            hook.group.non_blocking = False
        for stack in (transformer.layers, transformer.head.modulations, transformer.head.blocks):
            for before, after in pairwise(streamed(stack)):
                before.next_group = after.group
                after.group.onload_self = False
                after.group.non_blocking = True
