"""Training one concept: the frozen model is run once over the data, then only the denoiser runs."""
