"""Every operator on random arguments: it agrees with the reference computed in float64, or names what does not fit.

``make test`` runs a few derandomized examples of each property, ``make fuzz`` random ones for some minutes. A failure
prints the arguments as code and, by ``@reproduce_failure``, what hypothesis needs to make them again.
"""
