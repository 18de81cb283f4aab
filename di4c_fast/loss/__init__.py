"""The distillation loss and the likelihoods of a mixture: problem, driver, op, public calls."""
