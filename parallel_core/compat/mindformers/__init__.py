"""MindFormers' `run_mindformer.py`, for those who start runs by it."""
