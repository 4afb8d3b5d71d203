"""Training under DeepSpeed: processes, engine, loop, schedules, checkpoints. Knows no model and no data."""
