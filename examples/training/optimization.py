"""The accelerator, the optimizer, its schedule, and what keeps anything that is not finite out of the weights."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from transformers import get_wsd_schedule

logger = get_logger(__name__)


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


def create_optimizer(args: argparse.Namespace, parameters: Any) -> torch.optim.Optimizer:
    """
    AdamW over parameters or parameter groups, with states of 8 bits if `--use_8bit_adam`.

    Raises:
        ImportError: for that, without bitsandbytes.
    """
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=True)


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


class Steps:
    """
    Lets a step change the weights only if its losses and gradients are finite, and counts those that do not. What is
    read from the device is read once a step, for all batches and processes together: the step's one wait.

    Raises:
        FloatingPointError: by `read`, after `max_skipped` steps in a row that were not finite.
    """

    def __init__(self, accelerator: Accelerator, max_skipped: int) -> None:
        self.accelerator = accelerator
        self.max_skipped = max_skipped
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._num_batches = 0

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """The losses of a batch, scalars; they stay on the device."""
        for name, loss in losses.items():
            loss = loss.detach().float()
            self._sums[name] = self._sums[name] + loss if self._num_batches else loss
        self._num_batches += 1

    def read(self, step: int, norms: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], bool]:
        """
        The means of the losses since the last call with the gradients' `norms`, and whether all are finite: the same
        in every process. In float16 the gradients often are not at first: the scaler then goes down.
        """
        values = {name: total / self._num_batches for name, total in self._sums.items()}
        values |= {name: norm.float() for name, norm in norms.items()}
        self._sums, self._num_batches = {}, 0
        numbers = self.accelerator.reduce(torch.stack(list(values.values())), reduction="mean").tolist()
        values = dict(zip(values, numbers, strict=True))
        wrong = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            self.skipped_in_a_row = 0
            return values, True
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning(f"Step {step} is skipped: {', '.join(wrong)}.")
        if self.skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"Not finite at step {step} ({', '.join(wrong)}), as in {self.skipped_in_a_row} steps in a row "
                "(--max_skipped_steps). No weights were changed by them; a lower --learning_rate or --max_grad_norm "
                "may help."
            )
        return values, False

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def step_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer, finite: bool) -> None:
    """Change the weights if the step is `finite`; float16's gradient scaler sees the others too, and goes down."""
    if finite or accelerator.mixed_precision == "fp16":
        optimizer.step()
    optimizer.zero_grad()
