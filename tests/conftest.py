"""Markers and fixtures that all tests share."""
import os

import pytest
import torch
from hypothesis import settings

# `make test` draws the same cases each time, so that a red run means a changed program; INFOTDA_EXPLORE=1 draws new ones.
settings.register_profile("same", derandomize=not os.environ.get("INFOTDA_EXPLORE"))
settings.load_profile("same")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `bench/gpu.sh` runs these on a machine that has one")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
