"""Answers of the Hub that are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


@contextmanager
def well_formed() -> Iterator[None]:
    """`OSError` naming the address for an answer that has not the form of the Hub's."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise OSError(
            f"{constants.ENDPOINT} gave an answer that is no Hub's ({type(error).__name__}: "
            f"{error}): is HF_ENDPOINT right, or is a proxy in between?"
        ) from error
