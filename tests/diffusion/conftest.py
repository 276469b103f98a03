"""What the tests of diffusion share: the best model of normally distributed data, which is known."""

from collections.abc import Callable

import pytest
from torch import Tensor

from sora_train.diffusion import Model, Objective


@pytest.fixture(scope="session")
def best() -> Callable[..., Model]:
    """best(objective, mean, std): what to predict for data x ~ N(mean, std^2), from E[x | x_t] and E[noise | x_t]."""
    return best_model


def best_model(objective: Objective, mean: float, std: float) -> Model:
    def model(x_t: Tensor, told: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        if objective.config.kind == "flow":
            far = told / 1000
            near = 1 - far
        else:
            alpha = objective.schedule.alphas_cumprod[told.long()]
            near, far = alpha.sqrt(), (1 - alpha).sqrt()
        near, far = (share[:, None, None, None, None] for share in (near, far))  # x_t = near x + far noise
        residual = (x_t - near * mean) / (near**2 * std**2 + far**2)
        x, noise = mean + near * std**2 * residual, far * residual
        if objective.config.kind == "flow":
            return noise - x
        return {"epsilon": noise, "sample": x, "v": near * noise - far * x}[objective.config.prediction]

    return model
