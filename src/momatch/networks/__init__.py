"""Networks: (z, logsnr, cond) → tensor. They know nothing of diffusion."""
