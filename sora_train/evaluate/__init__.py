"""How good a model is: held-out loss, Fréchet video distance, similarity to prompts. No Ray.

`metrics.py` measures, for validation and for `sora eval` (`command.py`); `i3d.py`, `fvd.py`, `heldout.py` and
`similarity.py` are what it measures with.
"""

from sora_train.evaluate.command import evaluate
from sora_train.evaluate.metrics import Figures, measure

__all__ = ["Figures", "evaluate", "measure"]
