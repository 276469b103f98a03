"""`sora train` and `sora preflight`: checks, Ray Train, workers, validation and the monitor."""
