"""The accelerator, the optimizer, its schedule, and the checks that keep what is not finite out of the weights."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from transformers import get_wsd_schedule


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a run, with its trackers' folder made and the global seeds set."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(args.seed, device_specific=True)
    return accelerator


def create_optimizer(args: argparse.Namespace, parameters: Any) -> torch.optim.AdamW:
    """AdamW over parameters or parameter groups."""
    return torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )


def create_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over optimizer steps. It is not to be prepared by accelerate, which would step it per process."""
    if args.lr_decay_steps > 0:  # warm-up, stable, decay
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=args.lr_warmup_steps if args.lr_scheduler == "constant_with_warmup" else 0,
            num_decay_steps=args.lr_decay_steps,
            num_training_steps=num_steps,
            decay_type="linear",
        )
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
    )


def check_finite(accelerator: Accelerator, name: str, value: torch.Tensor, step: int) -> float:
    """
    The mean over the processes of a scalar, before it can do harm.

    Raises:
        FloatingPointError: if it is NaN or infinite, in every process at once.
    """
    mean = accelerator.gather(value.detach().reshape(1)).mean().item()
    require_finite(name, mean, step)
    return mean


def require_finite(name: str, value: float, step: int) -> None:
    """Raises a `FloatingPointError` that says what to do."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The {name} at step {step} is {value}. The last checkpoint is from before; a lower --learning_rate or "
            "--max_grad_norm may help."
        )


def clip_gradients(accelerator: Accelerator, parameters: Any, max_norm: float, step: int) -> None:
    """
    Clip the norm of the gradients of all parameters together.

    Raises:
        FloatingPointError: if the norm is NaN or infinite, which in float16 the gradient scaler skips by itself.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if accelerator.mixed_precision != "fp16":
        check_finite(accelerator, "gradient's norm", norm, step)


class StepValues:
    """
    Scalars of a step, means over the processes, on their way to the host. On CUDA the host runs ahead of the device:
    read when the next step is queued, they cost no wait.
    """

    def __init__(self, accelerator: Accelerator, step: int, values: Mapping[str, torch.Tensor]) -> None:
        self.step = step
        self.names = list(values)
        on_cuda = accelerator.device.type == "cuda"
        mean = accelerator.gather(torch.stack([value.detach().float() for value in values.values()])[None]).mean(0)
        self._mean = mean.to("cpu", non_blocking=on_cuda)
        self._copied = torch.cuda.current_stream().record_event() if on_cuda else None

    def read(self) -> dict[str, float]:
        """
        The values by name.

        Raises:
            FloatingPointError: if one is NaN or infinite, in every process at once.
        """
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self.names, self._mean.tolist(), strict=True))
        for name, value in values.items():
            require_finite(name, value, self.step)
        return values
