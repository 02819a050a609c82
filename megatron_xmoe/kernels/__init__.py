"""Implementations of the primitives, and the choice among them."""
