# %% [markdown]
# # Digits in five minutes
#
# A diffusion model that makes handwritten digits in 256 network calls ships with momatch. Here it is
# distilled into a student that makes them in 8. All of it runs on a CPU in about a minute.

# %%
import time
from dataclasses import replace

import torch
from PIL import Image

import momatch
from momatch.config import AlternatingConfig
from momatch.evaluation.builtin import classifier, feature_extractor
from momatch.evaluation.metrics import evaluate
from momatch.evaluation.report.plots import image_grid

teacher = momatch.load_teacher("digits")
data = momatch.load_data("digits")
print(teacher)
print(data.train)

# %% [markdown]
# ## What the teacher does
#
# The first row is its own work at 256 network calls. In 8 calls, below, it goes too far to the mean: digits
# get bolder and more alike.

# %%
labels = {"label": torch.arange(10).repeat(2)}
many, few = teacher.sample(20, 256, labels, seed=7), teacher.sample(20, 8, labels, seed=7)
Image.fromarray(image_grid(torch.cat([many, few]), columns=20))

# %% [markdown]
# ## Distil
#
# A recipe is a full set of settings. This one is documented with 1,500 steps of alternating updates; here
# are 200 of the joint variant, a quarter of its training. Nothing is kept unless you give a folder as the
# fourth argument.

# %%
config = momatch.recipe("digits-8")
config = replace(
    config,
    method=AlternatingConfig("joint"),
    train=replace(config.train, num_steps=200),
    monitor=replace(config.monitor, every=0),
)
began = time.perf_counter()
student = momatch.distill(teacher, data, config)
print(f"{student}, made in {time.perf_counter() - began:.0f} s")

# %% [markdown]
# ## Sample
#
# The same noise as above: teacher in 256 calls, student in 8.

# %%
made = student.sample(20, cond=labels, seed=7)
Image.fromarray(image_grid(torch.cat([many, made]), columns=20))

# %% [markdown]
# ## Evaluate
#
# The Fréchet distance compares with digits that neither teacher nor student has seen. It means something
# only beside others of the same features, the same reference and the same number of samples: that of real
# digits, for instance.

# %%
judge, check = feature_extractor(data.train), classifier(data.train)
asked = {"label": torch.arange(2000) % 10}


def measure(samples):
    found = evaluate((samples, asked["label"][: len(samples)]), data.heldout.images, judge, check)
    return {name: found.get(name).value for name in ("frechet", "recall", "class_accuracy")}


for name, samples in {
    "teacher, 64 calls": teacher.sample(2000, 64, asked, seed=1),
    "teacher, 8 calls": teacher.sample(2000, 8, asked, seed=1),
    "student, 8 calls": student.sample(2000, cond=asked, seed=1),
}.items():
    print(f"{name:<20}", {key: round(value, 2) for key, value in measure(samples).items()})

# %% [markdown]
# ## Keep it
#
# A folder of safetensors and JSON. The student knows its own number of steps.

# %%
student.save("digits-student")
again = momatch.load_student("digits-student")
assert torch.equal(again.sample(4, seed=3), student.sample(4, seed=3))
print(again.steps, "steps")

# %% [markdown]
# The documented runs (three seeds, 20,000 samples a row) are on the page of numbers; `momatch distill
# digits-8 --out runs/eight` and `momatch evaluate runs/eight` repeat them.
