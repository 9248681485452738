"""Environment variables that the launcher sets and ranks read, where neither needs to know the other."""

LOG_DIR_VARIABLE = "PARALLEL_CORE_RUN_DIR"
"""Directory of a launched job's logs, reports and metrics."""

HANDOVER_VARIABLE = "PARALLEL_CORE_RESOLVED_CONFIG"
"""Set by the launcher: the file with the configuration it resolved, for the ranks."""
