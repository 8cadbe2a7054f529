"""``verify``: two models side by side, layer by layer.

Enter two models of any two frameworks, or files; leaves a report.
Open ``verify`` first; ``report`` compares arrays, ``sides`` runs a model of each framework.
"""
