"""Operators: definition, kernels and registration."""
