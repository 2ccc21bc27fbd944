"""Choosing the next runs: surrogate models, acquisition and samplers over the points of a grid."""
