"""Text to image from scratch: teacher, student, pictures, figures.

    python examples/text_to_image.py                     # about two hours on one core
    python examples/text_to_image.py --budget 0.01       # a minute: everything runs, nothing is learned

The built-in emoji at 16×16 with their names. A teacher is trained by denoising; a student of 8 steps is
distilled from it with classifier-free guidance; both draw the same prompts from the same noise.
Needs the extra `text` for prompts (pip install 'momatch[text]').
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

import momatch
from momatch.config.schema import DistillConfig, TeacherConfig
from momatch.evaluation.report.plots import image_grid, save_png
from momatch.interop.text_encoders import text_encoder_of
from momatch.training.build import teacher_training

PROMPTS = ["red heart", "green apple", "smiling cat", "green heart with arrow", "blue apple"]


def scaled(config, budget: float):
    """The same config with a fraction of its steps."""
    steps = max(2, round(config.train.num_steps * budget))
    every = max(1, min(config.monitor.every, steps))
    return replace(
        config,
        train=replace(config.train, num_steps=steps),
        monitor=replace(config.monitor, every=every, num_samples=100 if budget < 1 else 200),
    )


def main(budget: float, out: Path, teacher_steps: int) -> None:
    """Run it all; whatever is finished in `out` is kept, so that the same command resumes."""
    data = momatch.load_data("emoji", 16)

    teacher_config = momatch.recipe("emoji16-teacher")
    assert isinstance(teacher_config, TeacherConfig)
    training = teacher_training(data, scaled(teacher_config, budget), out / "teacher")
    for event in training:
        if event.record.step % 100 == 0:
            print("teacher", event.record.step, event.record.metrics.get("loss"))
    training.finish()
    teacher = momatch.load_teacher(str(out / "teacher"))

    config = momatch.recipe("emoji16-8")
    assert isinstance(config, DistillConfig)
    config = replace(scaled(config, budget), teacher=str(out / "teacher"))
    student = momatch.distill(teacher, data, config, out / "student")

    encoder = text_encoder_of(student)
    assert encoder is not None
    asked = encoder.encode(PROMPTS)
    guided = replace(teacher, denoiser=config.guidance.apply(teacher.denoiser))  # as it was distilled
    rows = []
    for name, model, steps in (
        ("teacher", guided, teacher_steps),
        ("student", student, student.steps),
    ):
        start = time.process_time()
        rows.append(model.sample(len(PROMPTS), steps, asked, seed=3))
        seconds = (time.process_time() - start) / len(PROMPTS)
        print(f"{name}: {steps} steps, {seconds:.3f} s a picture")
    out.mkdir(parents=True, exist_ok=True)
    save_png(image_grid(torch.cat(rows), len(PROMPTS)), out / "prompts.png")
    print(f"teacher above, student below, for {', '.join(PROMPTS)}: {out / 'prompts.png'}")
    print(f"figures: momatch evaluate {out / 'student'} --num 191 --teacher-steps {teacher_steps}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.0, help="fraction of the recipes' steps")
    parser.add_argument("--out", type=Path, default=Path("runs/text-to-image"))
    parser.add_argument("--teacher-steps", type=int, default=256)
    asked_for = parser.parse_args()
    main(asked_for.budget, asked_for.out, asked_for.teacher_steps)
