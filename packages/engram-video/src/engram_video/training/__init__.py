"""Training a concept from clips: what differs from pictures; the loop is `engram_vision.training.trainer`."""
