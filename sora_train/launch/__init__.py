"""Ray: starts or joins a cluster, runs training on it, and validation beside it."""
