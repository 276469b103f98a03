"""The loop, its engine, checkpoints, and what it writes down. No Ray."""
