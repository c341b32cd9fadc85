"""Long trainings of every family at small size: memory that stays, and results that keep to the reference.

Two trainings drift apart whatever computes them: a rounding grows with each step. So it is one training, of the
operator; every now and then its results and gradients, on the parameters and the batch of that moment, are held against
the plain PyTorch reference in float64, beside that reference in the operator's dtype.

    python -m tests.soak [--steps 10000] [FAMILY ...]
"""
