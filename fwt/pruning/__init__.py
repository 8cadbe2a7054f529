"""Pruning: masks from scores, a scope and a pattern.

Enters a tree of weights; leaves the tree with zeros, or its masks.
Open ``prune`` first; ``plan`` is what every pruning does, ``scope`` how many weights
each leaf loses, ``chosen`` masks and pruned leaves from what was decided.
"""
