"""Experts shared out over ranks: which tokens go where, how they get there, and what is computed of them."""
