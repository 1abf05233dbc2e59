"""Worlds and observations of evaluation, in small."""

from collections.abc import Callable
from functools import partial

import pytest
from hydra.utils import instantiate

from vlaexp.config import compose
from vlaexp.env.tabletop.env import TabletopEnv


@pytest.fixture(scope="session")
def make_env() -> Callable[[], TabletopEnv]:
    """Builds the environment of `env=tabletop_pick`, in worker processes too."""
    return partial(instantiate, compose("record").env, _convert_="all")
