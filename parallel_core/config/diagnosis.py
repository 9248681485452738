"""What a run checks of its own numbers, and what it does about one that cannot be right."""

from __future__ import annotations

from dataclasses import dataclass

RERUN_MODES = ("disabled", "validate_results", "report_stats")
INJECTED = ("correct_result", "transient_error", "persistent_error")


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig:
    """Checks of results, iterations that are computed twice, and the replay of one that went wrong."""

    replay: int = 0
    """Run this iteration again, every layer checked, and end; 0: train."""
    check_for_spiky_loss: bool = False
    """A microbatch's loss that is ten times the largest of the first hundred is told."""
    check_for_large_grads: bool = False
    """The same of the gradient norm."""
    rerun_mode: str = "disabled"
    """validate_results: an iteration with an unexpected result is computed again and compared; report_stats: every
    iteration is, and the differences are counted."""
    error_injection_rate: int = 0
    """One of so many validations is taken for failed; 0: none."""
    error_injection_type: str = "transient_error"
    """What the injected failure is to look like."""
    result_rejected_tracker_filename: str = ""
    """File to which every unexpected result adds a line; empty: none."""
