"""Connects to a Ray cluster or starts a local one, and exports metrics to it; used by data_prep and training."""
