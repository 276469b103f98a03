"""What a recipe takes of a GPU's memory and time, estimated without a GPU."""
