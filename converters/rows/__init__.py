"""The table: what each layer is in Flax, Keras and torch, one row a layer.

Enters a layer's class, settings and arrays in one framework; leave their names in another.
Open ``table`` first, then a family: ``weights``, ``pooling``, ``shapes``, ``functions`` and so on.
"""
