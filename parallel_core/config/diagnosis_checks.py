"""Rules across what a run checks of its own numbers."""

from __future__ import annotations

from parallel_core.config.resolution import Resolution, Rules

DIAGNOSIS_CHECKS = Rules()


@DIAGNOSIS_CHECKS
def replayed_iteration(r: Resolution) -> None:
    """A replay is of an iteration of the run, from data that can be read again."""
    if not r.is_given("replay"):
        return
    number, last = r["replay"], r["train_iters"]
    if number < 1:
        r.fail("replay", "is the number of an iteration, from 1")
        return
    if last and number > last:
        r.fail("replay train_iters", f"the run has iterations 1 to {last}")
    if r["skip_train"]:
        r.fail("replay skip_train", "a run without training has no iteration to replay; leave skip_train out")
    if r["dataloader_type"] == "external":
        r.fail("replay dataloader_type", "an iterator of one's own cannot be brought to an iteration; use single or "
               "cyclic")


@DIAGNOSIS_CHECKS
def results_that_are_validated(r: Resolution) -> None:
    """Errors are injected into validations, so there must be some."""
    if r["error_injection_rate"] < 0:
        r.fail("error_injection_rate", "must not be negative")
    elif r["error_injection_rate"] and r["rerun_mode"] != "validate_results":
        r.fail("error_injection_rate rerun_mode", "only validations have errors injected; give --rerun-mode "
               "validate_results")
    if r["result_rejected_tracker_filename"] and not (
        r["check_for_spiky_loss"] or r["check_for_large_grads"] or r["rerun_mode"] == "validate_results"
    ):
        r.fail("result_rejected_tracker_filename", "no result is checked; give --rerun-mode validate_results, "
               "--check-for-spiky-loss or --check-for-large-grads")
