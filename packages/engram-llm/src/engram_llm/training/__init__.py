"""Training: the run, what learns in it, and what it keeps."""
