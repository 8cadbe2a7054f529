"""The walk: carries layers and arrays from one framework's form to another's.

Enters a net, layers with their settings and arrays that name what they take; leaves the same net
for the target. Open ``net`` and ``convert`` first, then ``walk``: ``axis`` says how a tensor's axes
are named, ``shapes`` and ``merges`` what moves axes and where tensors meet.
"""
