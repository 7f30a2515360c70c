"""Training: one loop, its schedules, checkpoints and telemetry."""
