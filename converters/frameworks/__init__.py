"""Live models and their configs: Flax, NNX, Keras and torch, each read and written.

Enters a model of a framework, or its config; leaves a list of layers for the walk.
Writing goes the other way.
Open ``keras`` or ``torch`` first; ``live`` edits a model in place.
"""
