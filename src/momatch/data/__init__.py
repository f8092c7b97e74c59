"""Images, latents and conditions to learn from. They know nothing of diffusion."""
