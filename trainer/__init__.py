"""Data preparation, models, losses, metrics and the training loop; runs without Ray and SQL."""
