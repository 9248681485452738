"""Pipeline parallelism: which layers sit where, the schedule as data, and one executor that runs any schedule."""

from parallel_core.pipeline import zero_bubble as zero_bubble  # adds a schedule to those that have a name
