"""What a recipe takes of a GPU's memory and of its time, reckoned without one."""
