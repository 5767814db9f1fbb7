"""A run of reinforcement learning: draw pictures, rate them, and make those that are rated better more likely."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.nn.utils.rnn import pad_sequence

from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline
from bitdance_diffusers.image_sizes import check_size
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions
from bitdance_diffusers.prompt import picture_start_ids, prompt_ids, unconditional_ids
from bitdance_diffusers.training.policy import (
    gaussian_kl,
    group_advantages,
    log_ratios,
    mean_transitions,
    policy_loss,
    predict_transitions,
    subtract_kl_to_go,
)
from bitdance_diffusers.training.rollouts import GaussianSteps, RolloutScheduler, TransitionRecorder
from rewards.loading import Reward, rate
from scores.diversity import pairwise_code_distance
from training.lora import copy_start, starting_weights
from training.randomness import random_generator
from training.transformer_run import Pipeline, Transformer, TransformerRun

logger = get_logger(__name__)

# What pictures are asked for


class TextPrompts:
    """
    The prompts of a text-to-image pipeline.

    Args:
        pipeline ([`BitDancePipeline`]).
        draw (`Callable`): `(rng, number) -> prompts`.
        height, width (`int`, *optional*): pixels; the pipeline's default where None.

    Raises:
        ValueError: if the pipeline cannot draw that size.
    """

    tags = ["text-to-image"]

    def __init__(
        self,
        pipeline: BitDancePipeline,
        draw: Callable[[np.random.Generator, int], list[str]],
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        self.draw, self.tokenizer = draw, pipeline.tokenizer
        self.height, self.width = height or pipeline.config.default_height, width or pipeline.config.default_width
        patch_size, scale = pipeline.transformer.config.patch_size, pipeline.vae_scale_factor
        check_size(self.height, self.width, scale, patch_size)
        tokens = self.height // scale, self.width // scale
        self.start_ids = picture_start_ids(self.tokenizer, *tokens, patch_size)
        self.positions = patch_positions(*tokens, patch_size)  # (M, P, 2)

    def call_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Of the pipeline, for a picture of each."""
        return {"prompt": prompts, "height": self.height, "width": self.width}

    def conditioning(self, prompts: list[str], guided: bool) -> dict[str, torch.Tensor]:
        """Of the transformer, see [`predict_transitions`]."""
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        if guided:
            rows += [unconditional_ids(self.tokenizer)] * len(prompts)
        rows = [torch.tensor(row + self.start_ids) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_side="left"),
            "attention_mask": pad_sequence(
                [torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True, padding_side="left"
            ),
            "condition_positions": self.positions,
        }


class ClassLabels:
    """The classes of a class-conditional pipeline, by their names if they have such; each is drawn alike."""

    tags = ["class-to-image"]

    def __init__(self, pipeline: BitDanceClassPipeline) -> None:
        config, self.pipeline = pipeline.transformer.config, pipeline
        self.labels = pipeline.config.label_names or list(range(config.num_classes))
        self.num_classes = config.num_classes
        self.positions = patch_positions(config.sample_size, config.sample_size, config.patch_size)
        self.indices = torch.arange(config.sample_size**2).view(len(self.positions), -1)

    def draw(self, rng: np.random.Generator, number: int) -> list[str | int]:
        """Every class as often as any other, but for a rest that is drawn."""
        rounds = [rng.permutation(len(self.labels)) for _ in range(-(-number // len(self.labels)))]
        return [self.labels[i] for i in np.concatenate(rounds)[:number]]

    def call_arguments(self, labels: list[str | int]) -> dict[str, Any]:
        """Of the pipeline, for a picture of each."""
        return {"class_labels": labels, "guidance_schedule": "constant"}

    def conditioning(self, labels: list[str | int], guided: bool) -> dict[str, torch.Tensor]:
        """Of the transformer, see [`predict_transitions`]."""
        ids = self.pipeline.get_label_ids(labels) + [self.num_classes] * (len(labels) if guided else 0)
        return {"class_labels": torch.tensor(ids), "condition_indices": self.indices}


# The run


@dataclass
class Rollout:
    """
    The pictures that one process has drawn for an iteration: N of them, those of a prompt side by side.

    Args:
        prompts: of each picture.
        steps: the K trained ones.
        patches (N, M, P, C): the codes in generation order.
        before, after (K, N, M, P, C): the noisy bits before and after the trained steps, the latter as
            `--action_noise` says.
        rewards (N,).
        diversity: see [`pairwise_code_distance`].
    """

    prompts: list[str | int]
    steps: GaussianSteps
    patches: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    rewards: torch.Tensor
    diversity: float


@contextmanager
def in_float32(transformer: torch.nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate has put around `forward`: the cache of keys and values is float32."""
    wrapped = transformer.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            transformer.forward = wrapped


class PolicyTraining(TransformerRun):
    """
    Iterations of drawing `--num_prompts` x `--num_images_per_prompt` pictures in every process and learning from them.

    Args:
        prompts ([`TextPrompts`] or [`ClassLabels`]): what pictures are asked for.
        reward, score (`Callable`): of [`load_reward`]; the score is only looked at.
        args, accelerator, pipeline, checkpoint: see [`TransformerRun`].
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: Pipeline,
        prompts: TextPrompts | ClassLabels,
        reward: Reward,
        score: Reward,
        checkpoint: Path | None,
    ) -> None:
        self.prompts, self.reward, self.score = prompts, reward, score
        per_iteration = args.num_prompts * args.num_images_per_prompt // args.train_batch_size
        self.steps_per_iteration = args.num_inner_epochs * per_iteration // args.gradient_accumulation_steps
        # The validation's prompts are of the kind that is trained on, and the same throughout
        self.asked = prompts.draw(np.random.default_rng((args.seed, 0, 0)), args.num_validation_prompts)
        asked = [prompt for prompt in self.asked for _ in range(args.num_validation_images)]
        validation: Mapping[str, Any] = prompts.call_arguments(asked)
        self.reference = copy_start(pipeline.transformer, accelerator.device)
        pictures = args.num_prompts * accelerator.num_processes * args.num_images_per_prompt
        super().__init__(
            "train_grpo",
            args,
            accelerator,
            pipeline,
            args.max_train_steps,
            f"reinforced by `train_grpo.py` with the reward `{args.reward}`",
            f"its own pictures, {pictures} drawn anew in every iteration",
            checkpoint,
            validation,
            len(self.asked),
        )
        guidance_scale = args.rollout_guidance_scale
        if guidance_scale is None:
            guidance_scale = pipeline.config.default_guidance_scale
        self.guidance_scale = guidance_scale if guidance_scale > 1 else None  # as the pipelines have it
        self.rollout_scheduler = RolloutScheduler(pipeline.scheduler.config.shift, args.rollout_noise)
        pipeline.set_progress_bar_config(disable=True)

    def train(self) -> None:
        """All iterations that are left."""
        if self.step == 0:
            with self.trained_transformer() as trained:
                if self.accelerator.is_main_process:
                    self.validate(trained)
            self.timer.lap("rest")
        while self.step < self.num_steps:
            iteration = self.step // self.steps_per_iteration
            rollout = self.roll_out(iteration)
            self.timer.lap("data")
            self.learn(rollout)

    def choose_steps(self, iteration: int) -> range:
        """The window of steps that the iteration trains, evenly among those within `--trained_steps`."""
        first, end = self.args.trained_steps
        size = self.args.window_size or end - first
        rng = np.random.default_rng((self.args.seed, iteration, 1))
        start = first + int(rng.integers(end - first - size + 1))
        return range(start, start + size)

    @torch.no_grad()
    def roll_out(self, iteration: int) -> Rollout:
        """Draw the iteration's pictures, each from a seed of its own, and rate them."""
        args, accelerator, pipeline = self.args, self.accelerator, self.pipeline
        window = self.choose_steps(iteration)
        self.rollout_scheduler.stochastic_steps = window if args.stochastic_steps == "window" else None
        self.rollout_scheduler.set_timesteps(args.rollout_steps, accelerator.device)  # the pipeline prepares a copy
        rng = np.random.default_rng((args.seed, iteration))
        asked = self.prompts.draw(rng, args.num_prompts * accelerator.num_processes)
        first = args.num_prompts * accelerator.process_index
        prompts = [one for one in asked[first : first + args.num_prompts] for _ in range(args.num_images_per_prompt)]
        seeds = range(first * args.num_images_per_prompt, first * args.num_images_per_prompt + len(prompts))

        transformer = accelerator.unwrap_model(self.transformer)
        own_scheduler, pipeline.scheduler = pipeline.scheduler, self.rollout_scheduler
        codes, befores, afters, ratings = [], [], [], []
        with in_float32(transformer):
            for start in range(0, len(prompts), args.rollout_batch_size):
                batch = prompts[start : start + args.rollout_batch_size]
                generators = [random_generator(args.seed, iteration, seeds[start + i]) for i in range(len(batch))]
                with TransitionRecorder(transformer, len(batch), args.rollout_steps, window) as recorder:
                    code = pipeline(
                        **self.prompts.call_arguments(batch),
                        num_inference_steps=args.rollout_steps,
                        guidance_scale=self.guidance_scale or 1.0,
                        generator=generators,
                        output_type="latent",
                    ).images
                images = pipeline.decode_latents(code, "pil", generators)
                before, after = recorder.transitions()
                codes.append(code)
                befores.append(before)
                afters.append(after)
                ratings += rate(self.reward, images, batch)
        pipeline.scheduler = own_scheduler
        code = torch.cat(codes)
        steps = self.rollout_scheduler.gaussian_steps(window)
        patches = grid_to_patches(code, transformer.config.patch_size)
        before, after = torch.cat(befores, dim=1), torch.cat(afters, dim=1)
        if args.action_noise == "mean":
            after = mean_transitions(steps, before, patches)
        return Rollout(
            prompts,
            steps,
            patches,
            before,
            after,
            torch.tensor(ratings, device=accelerator.device),
            pairwise_code_distance(code, args.num_images_per_prompt),
        )

    def learn(self, rollout: Rollout) -> None:
        """The optimizer's steps of an iteration."""
        args, accelerator, device = self.args, self.accelerator, self.accelerator.device
        group_size = args.num_images_per_prompt
        # Every batch has pictures of as many prompts as there are: first pictures of all, then the second ones, ...
        order = torch.arange(len(rollout.prompts)).unflatten(0, (-1, group_size)).T.flatten()
        batches = order.split(args.train_batch_size)
        guided = self.guidance_scale is not None
        conditionings = [
            {
                name: tensor.to(device)
                for name, tensor in self.prompts.conditioning([rollout.prompts[i] for i in batch], guided).items()
            }
            for batch in batches
        ]
        positions = self.prompts.positions.to(device)

        def predict(transformer: torch.nn.Module, batch: torch.Tensor, conditioning: dict) -> torch.Tensor:
            return predict_transitions(
                transformer,
                rollout.steps,
                rollout.before[:, batch],
                rollout.patches[batch],
                positions,
                conditioning,
                self.guidance_scale,
            )

        # 1. What the policy that drew the pictures and the reference predict, by the arithmetic of training: a ratio
        # is then exactly 1 until the first step
        old, expected = torch.empty_like(rollout.before), torch.empty_like(rollout.before)
        with torch.no_grad():
            for batch, conditioning in zip(batches, conditionings, strict=True):
                old[:, batch] = predict(self.transformer, batch, conditioning)
                with starting_weights(accelerator, self.transformer, self.reference) as reference:
                    expected[:, batch] = predict(reference, batch, conditioning)

        # 2. Advantages
        kl = gaussian_kl(rollout.steps, old, expected)  # (K, N, M)
        advantages = group_advantages(rollout.rewards, group_size, args.advantage_scale == "group_std")
        advantages = subtract_kl_to_go(advantages, kl, args.kl_weight, group_size)
        logs = {
            "reward": rollout.rewards.mean(),
            "kl": kl.sum(dim=(0, 2)).mean(),
            "diversity": torch.tensor(rollout.diversity, device=device),
        }

        # 3. Steps
        for _ in range(args.num_inner_epochs):
            for batch, conditioning in zip(batches, conditionings, strict=True):
                with accelerator.accumulate(self.transformer):
                    prediction = predict(self.transformer, batch, conditioning)
                    log_ratio = log_ratios(
                        rollout.steps, rollout.before[:, batch], rollout.after[:, batch], prediction, old[:, batch]
                    )
                    result = policy_loss(
                        rollout.steps,
                        log_ratio,
                        advantages[:, batch],
                        gaussian_kl(rollout.steps, prediction, expected[:, batch]),
                        args.kl_weight,
                        args.clip_range,
                        args.ratio_level,
                    )
                    self.optimize(result.loss, logs | {"clip_fraction": result.clip_fraction})

    def draw_validation(self, transformer: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        """As ever, by the pipeline's own scheduler and defaults; what the score makes of it is logged."""
        code, images = super().draw_validation(transformer)
        group_size = self.args.num_validation_images
        asked = [prompt for prompt in self.asked for _ in range(group_size)]
        pictures = self.pipeline.image_processor.pt_to_numpy(images)
        ratings = rate(self.score, self.pipeline.image_processor.numpy_to_pil(pictures), asked)
        logs = {"validation_score": float(np.mean(ratings))}
        if group_size > 1:
            logs["validation_diversity"] = pairwise_code_distance(code, group_size)
        logger.info(f"Step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in logs.items()))
        self.accelerator.log(logs, step=self.step)
        return code, images
