"""ONNX files, written from what a Flax model computes and read back as layers.

Out: ``write``, ``trace``, ``primitives`` and ``operators`` (Conv, LSTM and others as one operator).
In: ``read`` first, then ``graph``, ``line``, ``weights``, ``shapes``, ``recurrent`` and ``blocks``.
"""
