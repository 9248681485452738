"""The rows of the argument table."""
