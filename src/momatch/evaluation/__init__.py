"""How good are the samples? Samples (iterable) → features → statistics → metric → report."""
