"""What happens to blocks over training time."""
