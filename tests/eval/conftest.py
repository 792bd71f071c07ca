"""A packed corpus of real text with a model, shared by the evaluation tests."""

from __future__ import annotations

import pytest

from abf.segment.config import FixedSegmenter
from tests.eval.corpus import Corpus, build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Blocks of 5."""
    return build_corpus(tmp_path_factory.mktemp("corpus"), segmenter=FixedSegmenter(length=5))


@pytest.fixture(scope="session")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The same text in blocks of 1."""
    return build_corpus(tmp_path_factory.mktemp("singles"), segmenter=FixedSegmenter(length=1))
