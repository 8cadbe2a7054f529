"""ONNX files, written from what a Flax model computes and read back as layers.

Enters a Flax model; leaves a file: ``write`` first, then ``trace``, ``pointwise``, ``primitives``
(a Conv is written here) and ``operators`` (layers that ONNX has whole, such as LSTM). Enters a
file; leaves a model: ``read`` first, then ``graph``, ``line``, ``weights``, ``shapes``,
``functions`` and others.
"""
