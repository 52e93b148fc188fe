"""Training: schedule, seeding, data order, loop, checkpoints, and the run over a whole scenario."""
