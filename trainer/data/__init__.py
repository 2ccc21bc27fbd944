"""From raw interaction files to memory-mapped datasets and padding-free batches."""
