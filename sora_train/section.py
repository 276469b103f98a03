"""The base of a recipe's sections: frozen, unknown keys are errors, field docstrings are what `--help` shows."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe. It lies below every package, so that a config can stand beside the code it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
