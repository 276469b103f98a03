"""`sora bench`: speed and memory of the model, data, prep, training, checkpoints and validation.

Each module is a bench: its `Options`, and a function `bench(options, …)` that returns tables. `command.py` runs them.
`model.py`, `data.py` and `checkpoint.py` don't need Ray.
"""
