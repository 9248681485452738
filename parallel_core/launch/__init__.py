"""The launcher: starts the ranks through msrun, follows them on the console, and leaves no process behind.

It imports nothing of MindSpore, so that a wrong configuration is answered at once.
"""
