"""Closed forms: laws whose denoiser is known exactly, and distances between samples. Leaves: torch only."""
