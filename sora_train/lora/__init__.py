"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), through peft: a few trained weights on a frozen base."""
