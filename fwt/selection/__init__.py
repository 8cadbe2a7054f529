"""Exact selection: which k of n numbers are the largest, by counting instead of sorting.

Enter leaves as integer keys (``keys``) and counts in two limbs (``counts``); leaves a cut.
Open ``select`` first; ``sample`` is where it begins, ``passes`` one pass over a leaf, ``stacks``
small leaves counted together.
"""
