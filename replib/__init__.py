"""replib: train rich multi-branch blocks, deploy one plain convolution."""
