"""What every backend's training shares, without PyTorch: Ctrl-C, the metrics file, learning rates over the steps."""
