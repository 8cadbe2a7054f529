"""The walk: carries layers and arrays from one framework's form to another's.

Enters a list of layers with their settings and arrays; leaves the same list for the target.
Open ``convert`` first, then ``walk``; ``axis`` says how a tensor's axes are named.
"""
