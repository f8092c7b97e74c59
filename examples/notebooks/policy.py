# %% [markdown]
# # A policy that acts in one or two network calls
#
# A diffusion policy draws a whole path, given what it sees. Sampling takes long, and a robot cannot wait.
# Here a point has to reach a goal behind a block. Left and right of it are both right, the mean of both is
# wrong: a student that only averaged would run into the block. `examples/policy.py` is the longer version,
# with figures.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

import momatch
from momatch.training.build import teacher_training

POINTS, BLOCK, SCALE = 16, 0.35, 0.8


def demonstrations(n, seed):
    """Paths (n, 16, 2) past either side of the block, and their goals (n, 2)."""
    rng = np.random.default_rng(seed)
    goals = np.stack([rng.uniform(-0.4, 0.4, n), rng.uniform(0.8, 1.2, n)], 1)
    t = np.linspace(0, 1, POINTS)[None, :, None]
    paths = (1 - t) * np.array([0.0, -1.0]) + t * goals[:, None]
    side = rng.choice([-1.0, 1.0], (n, 1))
    paths[..., 0] += side * rng.uniform(0.6, 0.9, (n, 1)) * np.sin(np.pi * t[..., 0])
    return paths.astype(np.float32), goals.astype(np.float32)


paths, goals = demonstrations(1000, seed=0)
np.savez("demonstrations.npz", x=paths / SCALE, obs=goals)
data = momatch.load_data("demonstrations.npz")
print(data.train)

# %% [markdown]
# ## Teacher
#
# Vectors and trajectories are data like images. Whatever stands in the file beside `x` is a condition; the
# network is given it as `cond["obs"]`.

# %%
config = momatch.recipe("vectors-teacher")
config = replace(
    config,
    data="demonstrations.npz",
    train=replace(config.train, num_steps=1000, batch_size=64),
    monitor=replace(config.monitor, every=0),
)
run = teacher_training(data, config)
for _ in run:
    pass
teacher = run.finish()

# %% [markdown]
# ## Student of two calls

# %%
config = momatch.recipe("vectors-2")
config = replace(
    config,
    data="demonstrations.npz",
    train=replace(config.train, num_steps=400, batch_size=64),
    monitor=replace(config.monitor, every=0),
)
student = momatch.distill(teacher, data, config)

# %% [markdown]
# ## Forty paths to one goal
#
# The student keeps both ways round, as the teacher does. One call of the *teacher*, on the right, is about
# the mean of both, and leads into the block.

# %%
goal = torch.tensor([[0.2, 1.0]])
asked = {"obs": goal.repeat(40, 1)}
shown = {
    "teacher, 100 calls": teacher.sample(40, 100, asked, seed=1),
    "student, 2 calls": student.sample(40, cond=asked, seed=1),
    "teacher, 1 call": teacher.sample(40, 1, asked, seed=1),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), sharex=True, sharey=True)
for axis, (name, found) in zip(axes, shown.items(), strict=True):
    for path in SCALE * found.numpy():
        axis.plot(*path.T, color="tab:blue", alpha=0.4)
    axis.add_patch(plt.Circle((0, 0), BLOCK, color="black", alpha=0.25))
    axis.plot(*goal[0], "k*")
    axis.set(title=name, aspect="equal")
plt.show()

# %% [markdown]
# ## How often it works

# %%
unseen = torch.from_numpy(demonstrations(500, seed=1)[1])


def success(found):
    """Share of paths that end near their goal and keep out of the block."""
    found = SCALE * found
    ends = (found[:, -1] - unseen).norm(dim=1) < 0.2
    return float((ends & (found.norm(dim=2).min(dim=1).values > BLOCK)).float().mean())


for name, model, steps in (("teacher", teacher, 100), ("student", student, 2), ("teacher", teacher, 1)):
    print(f"{name}, {steps} network calls: {success(model.sample(500, steps, {'obs': unseen}, seed=2)):.0%}")
