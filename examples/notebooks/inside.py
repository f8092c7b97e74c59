# %% [markdown]
# # Looking inside
#
# Three things that the equations say, as pictures: what a student's calls return, which moments are
# matched, and a loss that means something. The data of the first two parts are a mixture of two Gaussians
# in one dimension. Of it everything is known exactly: the teacher is the formula itself.

# %%
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import momatch
from momatch.config import AlternatingConfig
from momatch.diffusion import process, sampling
from momatch.methods import Alternating, Transition
from momatch.methods.base import Batch
from momatch.networks.configs import MLPConfig
from momatch.networks.registry import build

mixture = momatch.analytic.GaussianMixture(
    torch.tensor([0.4, 0.6]), torch.tensor([[-0.9], [0.7]]), torch.full((2, 1, 1), 0.15**2)
)
exact = mixture.denoiser()  # E[x | z], by formula
schedule = momatch.schedules.cosine()
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## A student that starts as its teacher
#
# A network learns the formula first. Student and auxiliary then begin as copies of that network.

# %%
torch.manual_seed(0)
teacher = momatch.Denoiser(build(MLPConfig(dim=1, width=64, depth=2)), "v")
optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
for _ in range(1500):
    x = mixture.sample(512, generator)
    logsnr = schedule(torch.rand(512, generator=generator))
    z = process.diffuse(x, logsnr, torch.randn(512, 1, generator=generator))
    optimizer.zero_grad()
    (teacher(z, logsnr) - x).square().mean().backward()
    optimizer.step()

student, auxiliary = copy.deepcopy(teacher), copy.deepcopy(teacher)
before = copy.deepcopy(student)

# %% [markdown]
# ## Algorithm 2, by hand
#
# `Alternating` is the whole algorithm: `step(n, batch)` says which network learns what. A loop of five
# lines trains it; momatch's own adds learning rates, clipping, checkpoints.

# %%
STEPS = 2
method = Alternating(teacher, student, auxiliary, Transition(schedule, STEPS))
optimizers = {
    "student": torch.optim.Adam(student.parameters(), 3e-4, betas=(0.0, 0.99)),
    "auxiliary": torch.optim.Adam(auxiliary.parameters(), 1e-3, betas=(0.0, 0.99)),
}
student_losses, gaps = [], []
for n in range(3000):
    update = method.step(n, Batch(mixture.sample(512, generator), None, generator))
    for role, loss in update.losses.items():
        optimizers[role].zero_grad()
        loss.backward()
        optimizers[role].step()
        if role == "student":
            student_losses.append(loss.item())
            gaps.append(float(update.metrics()["gap"]))

# %% [markdown]
# ## What the calls return
#
# Each line is one sample: its noise on the left, then the estimate x̂ of every call. The teacher's first
# estimate is a *mean*, the same for nearly any noise, and in two calls it does not get away from it. The
# student's first estimate is spread out already: it leans to one side or the other, as its noise says.

# %%
noise = torch.randn(60, 1, generator=generator)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
for axis, (name, denoiser, calls) in zip(
    axes,
    (("teacher, 64 calls", exact, 64), ("teacher, 2 calls", exact, 2), ("student, 2 calls", student, 2)),
    strict=True,
):
    estimates = [noise, *sampling.trajectory(denoiser, noise, calls, schedule, generator=generator)]
    axis.plot(range(calls + 1), torch.cat(estimates, 1).T, color="tab:blue", alpha=0.3)
    axis.axhline(-0.9, color="grey", lw=0.8)
    axis.axhline(0.7, color="grey", lw=0.8)
    axis.set(title=name, xlabel="call", ylim=(-2.5, 2.5))
axes[0].set_ylabel("x̂")
plt.show()

# %% [markdown]
# ## Moments matched over s
#
# The student is right when its samples, made noisy again, have the teacher's means: E_g[x̃ | z_s] = E_q[x |
# z_s] for every s. Both sides can be seen here. The right one is the formula. The left one is the mean of
# many x̃ in narrow bins of z_s, before training (dotted: the student is a copy of the teacher) and after.


# %%
def moments(model, s, count=200_000):
    """Bins of z_s, and the mean of x̃ in each."""
    s = torch.full((count,), s)
    t = (s + torch.rand(count, generator=generator) / STEPS).clamp(max=1)
    x = mixture.sample(count, generator)
    z_t = process.diffuse(x, schedule(t), torch.randn(count, 1, generator=generator))
    with torch.no_grad():
        x_tilde = model(z_t, schedule(t))
    z_s = process.sample_posterior(z_t, x_tilde, schedule(s), schedule(t), generator)[:, 0]
    edges = torch.linspace(-2, 2, 41)
    index = torch.bucketize(z_s, edges)
    sums = torch.zeros(42).index_add(0, index, x_tilde[:, 0])
    counts = torch.bincount(index, minlength=42)
    kept = counts[1:41] > 200
    return ((edges[1:] + edges[:-1]) / 2)[kept], (sums / counts.clamp(min=1))[1:41][kept]


figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
worst = {}
for axis, s in zip(axes, (0.3, 0.55, 0.8), strict=True):
    line = torch.linspace(-2, 2, 200)[:, None]
    axis.plot(
        line[:, 0], exact(line, schedule(torch.full((200,), s)))[:, 0], "k", lw=1, label="teacher, exact"
    )
    for name, model, style in (("before", before, "r:"), ("after", student, "b.")):
        z, mean = moments(model, s)
        axis.plot(z, mean, style, label=f"student, {name}")
        target = exact(z[:, None], schedule(torch.full((len(z),), s)))[:, 0]
        worst[name, s] = float((mean - target).square().mean().sqrt())
    axis.set(title=f"s = {s}", xlabel="z_s")
axes[0].set_ylabel("mean of x̃ given z_s")
axes[0].legend()
plt.show()
for (name, s), error in worst.items():
    print(f"s = {s}, {name}: off by {error:.3f} (root mean square over bins)")

# %% [markdown]
# ## Losses that mean nothing, and two numbers that do
#
# The student's loss in Algorithm 2 soon goes up and down around 0, and says nothing of how good the student
# is. `gap`, the distance of auxiliary and teacher, is small where the moments agree.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.8))
axes[0].plot(student_losses, lw=0.5)
axes[0].set(title="the student's loss", xlabel="student updates")
axes[1].semilogy(torch.tensor(gaps).unfold(0, 25, 25).mean(1))
axes[1].set(title="gap (means of 25)", xlabel="student updates / 25")
plt.show()

# %% [markdown]
# ## The loss of Algorithm 3
#
# Instant moment matching asks how much the teacher would still learn from the student's samples. That is a
# loss that is 0 for a perfect student, and can be compared between students. One value is noisy; here are
# means over whole minibatches of digits for three students: a fresh copy of the teacher, one after 60
# updates, one after 240.

# %%
from momatch.training.build import distillation

digits, data = momatch.load_teacher("digits"), momatch.load_data("digits")


def trained(updates):
    """A student of 8 calls, after some joint updates."""
    config = momatch.recipe("digits-8")
    config = replace(
        config,
        method=AlternatingConfig("joint"),
        train=replace(config.train, num_steps=updates, batch_size=64),
        monitor=replace(config.monitor, every=0),
    )
    return momatch.distill(digits, data, config)


def instant_loss(model, draws=24):
    """Mean and standard error of Algorithm 3's loss for this student; nothing is trained."""
    config = momatch.recipe("digits-instant-8")
    run = distillation(digits, data, replace(config, train=replace(config.train, num_steps=1, batch_size=64)))
    if model is not None:
        run.model.denoiser.load_state_dict(model.denoiser.state_dict())
    values = []
    labelled = torch.Generator().manual_seed(1)
    for i in range(draws):
        rows = torch.randint(len(data.train), (128,), generator=labelled)
        cond = {"label": data.train.labels[rows]}
        batch = Batch(data.train.images[rows], cond, torch.Generator().manual_seed(i))
        values.append(float(run.method.step(0, batch).metrics()["instant_loss"]))
    values = torch.tensor(values)
    return float(values.mean()), float(values.std() / draws**0.5)


for name, model in (("fresh", None), ("60 updates", trained(60)), ("240 updates", trained(240))):
    value, error = instant_loss(model)
    print(f"{name:<12} {value:.2e} ± {error:.0e}")

# %% [markdown]
# Most of the loss is gone early. What is left is small beside its error, so the last two students cannot be
# told apart by so few draws. In a run, `--method instant` logs this loss itself (`instant_loss` in
# metrics.jsonl), and `--stopping.within-noise` can end the run by it.
