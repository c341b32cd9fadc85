"""Triton kernels with their launchers: what needs tensor cores. Importing one needs Triton >= 3.6."""
