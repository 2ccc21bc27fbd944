"""Sequential recommenders on padding-free batches."""
