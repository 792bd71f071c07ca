"""Fixtures of the decode tests."""

from __future__ import annotations

import pytest

from abf.model.transformer import Transformer
from tests.decode.tiny import edit_model, tiny_model


@pytest.fixture(scope="session")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="session")
def editor() -> Transformer:
    return edit_model()
