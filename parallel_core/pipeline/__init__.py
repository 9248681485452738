"""Pipeline parallelism: which layers sit where, the schedule as data, and one executor that runs any schedule."""
