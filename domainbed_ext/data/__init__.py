"""From an environment to batches: splits, sampling, augmentation."""
