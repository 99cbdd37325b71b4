"""Training: objectives, the trainer and its state on disk, data, and the evaluation of what was trained."""
