"""Networks: (z, logsnr, cond) → tensor. Leaves: they know nothing of diffusion."""
