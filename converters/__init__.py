"""Converters between Keras, PyTorch, Flax and their files: exact, or refused by name."""

if __name__ != "fwt.converters":
    raise ImportError("import this package as fwt.converters: a copy would double every class")
