"""Pictures to learn from. Leaves: they know nothing of diffusion."""
