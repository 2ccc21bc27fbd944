"""Cross-entropy of a linear layer without materialised logits, full and sampled."""
