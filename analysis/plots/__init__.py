"""One module a figure; each draws on given Axes and returns them."""
