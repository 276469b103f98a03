"""From a clip's frames and pixels to its latents, and the shapes that divide. Imports nothing, so any process may."""


def latent_shape(
    channels: int, factor: int, time_factor: int, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Latent shape `f c h w` of a clip of `frames` x `height` x `width` pixels."""
    return 1 + (frames - 1) // time_factor, channels, height // factor, width // factor


def shape_errors(shape: tuple[int, int, int], factor: int, time_factor: int, patch: int = 1) -> list[str]:
    """Why a clip of `shape` (frames, height, width) gives no whole latents and patches, with the nearest that do.

    A sentence for each of the three that is wrong. `factor` and `time_factor` are the VAE's, `patch` is the model's.
    """
    grid, wrong = factor * patch, list[str]()
    if over := (shape[0] - 1) % time_factor:
        below = shape[0] - over
        wrong.append(
            f"frames {shape[0]} is not {time_factor}k+1, as the VAE needs; use {below} or {below + time_factor}"
        )
    for side, size in (("height", shape[1]), ("width", shape[2])):
        if size % grid or size < 1:
            below = size // grid * grid
            choices = " or ".join(str(n) for n in (below, below + grid) if n > 0)
            parts = f" (VAE {factor} x model.patch {patch})" if patch > 1 else ", the VAE's factor"
            wrong.append(f"{side} {size} does not divide by {grid}{parts}; use {choices}")
    return wrong
