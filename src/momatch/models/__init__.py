"""A model that can be used: denoiser, schedule and sample shape, saved and loaded as a folder."""
