"""Losses over large catalogs that never keep the logits: Triton kernels and torch equals."""
