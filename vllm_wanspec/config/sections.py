"""What all sections of the configuration file have in common: how strictly they are read, and kinds of values."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A mapping of the file; unknown keys and values of another type are errors."""

    # Strict: true is no number and "8" none either. Errors are explained by `settings`, which hides what may be secret.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def one_line(value: str) -> str:
    """Text that can stand in a log line as it is.

    Raises:
        ValueError: It cannot.
    """
    if not value.isprintable():
        raise ValueError("must have no line ends and no other control characters")
    if value != value.strip():
        raise ValueError("must not begin or end with blanks")
    return value


def unless_off(instead: Any) -> BeforeValidator:
    """For keys whose value is no boolean: ``off``, which is false to YAML, can only mean ``instead``."""
    return BeforeValidator(lambda value: instead if value is False else value)


Line = Annotated[str, Field(min_length=1), AfterValidator(one_line)]
