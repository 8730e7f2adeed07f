"""What tests of the core share: the demo cohort, built once."""

from pathlib import Path

import pytest

from tests.slides.demo import build_demo


@pytest.fixture(scope="session")
def demo_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo cohort with its weights, fresh from its makers."""
    return build_demo(tmp_path_factory.mktemp("cohort"))
