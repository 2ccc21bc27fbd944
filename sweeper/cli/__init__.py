"""The commands of `srsweep`, one module each."""
