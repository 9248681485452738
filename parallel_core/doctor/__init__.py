"""Looks at a machine before a run does: what is there, what is missing, what to do about it."""
