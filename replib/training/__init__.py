"""Data, augmentation, one training loop, checkpoints."""
