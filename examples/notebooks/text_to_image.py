# %% [markdown]
# # Text to image
#
# A text-to-image model from nothing in two minutes: a tiny transformer on 16×16 emoji of a few kinds and
# colours, captions encoded by a sentence encoder, guidance distilled into a student of 8 calls. It knows
# some forty images by heart, no more: this shows how the parts fit. `examples/text_to_image.py` trains on
# all 1,720 emoji, in two hours.
#
# Prompts need `pip install 'momatch[text]'`.

# %%
from dataclasses import replace

import torch
from PIL import Image

import momatch
from momatch.config import GuidanceConfig
from momatch.evaluation.report.plots import image_grid
from momatch.networks.configs import UViTConfig
from momatch.training.build import teacher_training

data = momatch.load_data("emoji", 16)
kinds = (" heart", " circle", " square", " book", " apple")
chosen = [i for i, caption in enumerate(data.train.captions) if caption.endswith(kinds)]
few = replace(data, train=data.train.subset(torch.tensor(chosen), "hearts, circles, squares, books, apples"))
print(len(few.train), "images:", ", ".join(few.train.captions[:8]), "…")

# %% [markdown]
# ## Teacher
#
# A tenth of the samples is trained without a caption, so that guidance has something to guide away from.

# %%
config = momatch.recipe("emoji16-teacher")
config = replace(
    config,
    network=UViTConfig(3, (32,), 1, 64, 2, 1, embedding_dim=64),
    train=replace(config.train, num_steps=700, batch_size=32),
    optim=replace(config.optim, warmup_steps=50, learning_rate=2e-3),
    monitor=replace(config.monitor, every=0),
)
run = teacher_training(few, config)
for event in run:
    if event.record.step % 175 == 0:
        print(event.record.step, event.record.metrics.get("loss"))
teacher = run.finish()

# %% [markdown]
# ## Student
#
# The recipe samples on a schedule with less noise, guides the teacher with w = 1, and lets the student
# itself make the noisy images that it learns on.

# %%
config = momatch.recipe("emoji16-8")
config = replace(
    config,
    guidance=GuidanceConfig(scale=1.0, clip="static"),
    train=replace(config.train, num_steps=60, batch_size=32),
    monitor=replace(config.monitor, every=0),
)
student = momatch.distill(teacher, few, config)
print(student)

# %% [markdown]
# ## Prompts
#
# In rows: the teacher, guided, in 64 calls of two passes each; the student in 8 calls of one.

# %%
PROMPTS = ["green heart", "blue heart", "large red circle", "large green square", "green book", "red apple"]
PROMPTS += ["orange heart", "large blue circle"]  # these two were never in training
encoder = momatch.text_encoder_of(student)
asked = encoder.encode(PROMPTS)
guided = replace(teacher, denoiser=config.guidance.apply(teacher.denoiser))
rows = guided.sample(len(PROMPTS), 64, asked, seed=2), student.sample(len(PROMPTS), cond=asked, seed=2)
print(" | ".join(PROMPTS))
Image.fromarray(image_grid(torch.cat(rows), columns=len(PROMPTS)))
