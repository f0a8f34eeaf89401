"""What every backend's training shares, without PyTorch: refusals, Ctrl-C, metrics, learning rates, many concepts."""
