"""Grid files, scheduling with Ray Tune and the command line: the composition root."""
