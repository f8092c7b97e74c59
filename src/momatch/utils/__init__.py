"""What every room may use: errors, devices, seeds, files, texts. Knows nothing of diffusion."""
