"""Files: one module a format, read without its framework and safe on hostile bytes.

Enters a path; leaves a ``fwt.Model``. Saving goes the other way.
Open ``formats`` first: the list, with how each is told by its content; ``fill`` puts weights into
an ``architecture=``; ``source`` keeps what a file says beside its arrays.
"""
