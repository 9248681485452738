"""Rules across what a run tells of itself."""

from __future__ import annotations

from parallel_core.config.resolution import Resolution, Rules

WATCHING_CHECKS = Rules()


@WATCHING_CHECKS
def intervals_of_watching(r: Resolution) -> None:
    """Timers have the levels 0, 1 and 2; intervals and queues are above zero."""
    if not 0 <= r["timing_log_level"] <= 2:
        r.fail("timing_log_level", "must be 0, 1 or 2")
    for name in ("tensorboard_log_interval", "tensorboard_queue_size"):
        if r[name] <= 0:
            r.fail(name, "must be above 0")


@WATCHING_CHECKS
def trackers(r: Resolution) -> None:
    """A run of Weights & Biases has a project and a name; what belongs to a tracker comes with it."""
    if bool(r["wandb_project"]) != bool(r["wandb_exp_name"]):
        r.fail("wandb_project wandb_exp_name", "go together; give both or none")
    for names, owner in ((("wandb_save_dir", "wandb_entity"), "wandb_project"),
                         (("mlflow_run_name", "mlflow_tracking_uri"), "mlflow_experiment")):
        for name in names:
            if r[name] and not r[owner]:
                r.fail(name, f"belongs to {owner}, which is not given")
