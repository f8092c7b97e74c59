"""From things outside (a run's folder, a built-in model) to a `Model`."""
