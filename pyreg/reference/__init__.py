"""The definition of every operator in plain PyTorch, one module an operator.

Each module is short enough to check by eye, imports nothing of pyreg, and is differentiable and traceable as it stands.
The tests hold every kernel against it, and it serves the devices that have no kernel.
"""
