"""Draw the loss of one or several runs, one after the other, from their TensorBoard logs.

python examples/plot_loss.py runs/icons/logs --per_step 48 --output docs/images/icons_loss.png
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN, SCALE = 720, 400, 52, 2
LINE, FAINT, GRID, TEXT = (35, 90, 220), (190, 205, 240), (225, 225, 225), (60, 60, 60)


def read_losses(logs: list[Path], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, counted over all runs, and the values of `tag`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, values, first = [], [], 0
    for log in logs:
        folders = sorted({path.parent for path in log.rglob("events.out.tfevents*")})
        events = {}
        for folder in folders:  # a run that was resumed wrote several files: the later one counts
            accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            if tag in accumulator.Tags()["scalars"]:
                events |= {event.step: event.value for event in accumulator.Scalars(tag)}
        if not events:
            raise ValueError(f"There is no {tag!r} in the logs {log}.")
        steps += [first + step for step in sorted(events)]
        values += [events[step] for step in sorted(events)]
        first = steps[-1]
    return np.array(steps), np.array(values)


def draw_curve(pictures: np.ndarray, losses: np.ndarray, name: str = "loss") -> Image.Image:
    """What `name` says, on a logarithmic scale over the pictures seen: every step faint, a moving average over it."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12 * SCALE)
    low, high = math.log10(np.quantile(losses, 0.002)) - 0.05, math.log10(losses.max())
    right, bottom = (WIDTH - 20) * SCALE, (HEIGHT - MARGIN) * SCALE
    left, top = MARGIN * SCALE, 20 * SCALE

    def place(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        across = left + (right - left) * x / pictures[-1]
        down = bottom - (bottom - top) * (np.log10(y).clip(low, high) - low) / (high - low)
        return list(zip(across.tolist(), down.tolist(), strict=True))

    for value in (v * 10.0**e for e in range(-3, 2) for v in (1, 2, 5)):
        if low <= math.log10(value) <= high:
            (_, y), _ = place(np.array([0.0, 0.0]), np.array([value, value]))
            draw.line([(left, y), (right, y)], fill=GRID, width=SCALE)
            draw.text((left - 6 * SCALE, y), f"{value:g}", fill=TEXT, font=font, anchor="rm")
    unit = 10 ** math.floor(math.log10(pictures[-1]))
    unit = unit / 5 if pictures[-1] < 2 * unit else unit / 2 if pictures[-1] < 5 * unit else unit
    for value in np.arange(0, pictures[-1], unit):
        (x, _), _ = place(np.array([value, value]), np.array([1.0, 1.0]))
        draw.text((x, bottom + 8 * SCALE), f"{value / 1000:g}k", fill=TEXT, font=font, anchor="mt")
    middle = ((left + right) / 2, bottom + 26 * SCALE)
    draw.text(middle, "pictures seen", fill=TEXT, font=font, anchor="mt")
    draw.text((left + 8 * SCALE, top), name, fill=TEXT, font=font, anchor="lt")

    window = max(1, len(losses) // 100)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    draw.line(place(pictures, losses), fill=FAINT, width=SCALE)
    draw.line(place(pictures[window - 1 :], mean), fill=LINE, width=2 * SCALE)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the loss of runs that follow each other.")
    parser.add_argument("logs", type=Path, nargs="+", help="folders of TensorBoard logs, in the order of the runs")
    parser.add_argument("--per_step", type=int, default=1, help="pictures of an optimizer step")
    parser.add_argument("--tag", default="loss")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        steps, losses = read_losses(args.logs, args.tag)
    except ValueError as error:
        parser.error(str(error))
    draw_curve(steps * args.per_step, losses, args.tag).save(args.output)


if __name__ == "__main__":
    main()
