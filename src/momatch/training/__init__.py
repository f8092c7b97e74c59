"""From a config to a trained model: the loop, optimizers, checkpoints, previews, plans."""
