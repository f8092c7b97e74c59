"""The training loop and what it needs: batches, optimizers, checkpoints, seeds."""
