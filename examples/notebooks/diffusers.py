# %% [markdown]
# # A model of diffusers, in and out
#
# A pipeline made with diffusers alone becomes a teacher; its student goes back as a folder that diffusers
# opens. The teacher is made right here, so that nothing has to be downloaded: a tiny `UNet2DModel` trained
# on 8×8 digits as any tutorial does it. With a pipeline of your own, begin at "Load it as a teacher".

# %%
from dataclasses import replace

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

import momatch
from momatch.config import AlternatingConfig, ScheduleConfig
from momatch.evaluation.report.plots import image_grid

data = momatch.load_data("digits")

# %% [markdown]
# ## A pipeline, by diffusers alone

# %%
torch.manual_seed(0)
network = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
noise_scheduler = DDPMScheduler(num_train_timesteps=1000)  # DDPM's linear table; the network predicts ε
updates = 600
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, updates)
for _ in range(updates):
    x = data.train.images[torch.randint(len(data.train), (64,))]
    noise, t = torch.randn_like(x), torch.randint(1000, (64,))
    loss = (network(noise_scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()
DDPMPipeline(network.eval(), noise_scheduler).save_pretrained("pipeline")
print(f"loss of the last minibatch: {loss.item():.3f}")

# %% [markdown]
# ## Load it as a teacher
#
# Schedule, timesteps, what the network predicts and the clipping of its samples are read from the files.

# %%
teacher = momatch.load_teacher("pipeline")
print(teacher, teacher.denoiser.prediction, teacher.schedule.name)

# %% [markdown]
# ## Distil
#
# `diffusers-8` is the recipe for small models in pixels. The noisy end of DDPM's table was made for large
# images, and of small ones nothing is left there: `logsnr_min` leaves that part out.

# %%
config = momatch.recipe("diffusers-8")
config = replace(
    config,
    teacher="pipeline",
    method=AlternatingConfig("joint"),
    schedule=ScheduleConfig(logsnr_min=-4.2),
    train=replace(config.train, num_steps=120, batch_size=64),
    monitor=replace(config.monitor, every=0),
)
student = momatch.distill(teacher, data, config, "run")
rows = teacher.sample(16, 250, seed=5), teacher.sample(16, 8, seed=5), student.sample(16, seed=5)
print("teacher in 250 calls, teacher in 8, student in 8")
Image.fromarray(image_grid(torch.cat(rows), columns=16))

# %% [markdown]
# ## Give it back to diffusers
#
# The command line writes the folder. The student brings its own timesteps, and a file with its sampler
# where none of diffusers' own takes exactly its steps.

# %%
from momatch.cli import main

assert main(["export", "run", "student-of-diffusers"]) == 0

# %% [markdown]
# From here on momatch is not needed.

# %%
pipe = DiffusionPipeline.from_pretrained("student-of-diffusers", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(5)
images = pipe(batch_size=8, num_inference_steps=8, generator=generator).images
wide = Image.new("L", (8 * 50, 48))
for i, image in enumerate(images):
    wide.paste(image.convert("L").resize((48, 48), Image.Resampling.NEAREST), (50 * i, 0))
print(type(pipe).__name__, "with", type(pipe.scheduler).__name__)
wide
