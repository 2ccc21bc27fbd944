"""Measurements: `python -m bench NAME`, one module a question. Never packaged, never a test."""
