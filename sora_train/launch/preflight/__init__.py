"""`sora preflight`: checks of the machines, the storage, the shards and the memory plan before a run."""
