"""What runs a cohort: the simulator in one process."""
