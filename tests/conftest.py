"""Every test runs offline, on the CPU, on one thread and from the same seeds; real data is asked for by a fixture."""

import os

# Before anything imports torch or a hub client: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
import random
from pathlib import Path

import numpy as np
import pytest
import torch

SEED = 20


def pytest_collection_finish():
    """Leaves the modules out of garbage collection, which every `train()` begins with: a third of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in one order, so that two equal runs are equal bit for bit, also when tests run side by side."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def seeds():
    """No test depends on what another one drew."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - libraries under test still draw from the global state
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def folder_named_by(variable: str) -> Path:
    """The folder that an environment variable names, or a skip that says which variable and which path."""
    if not (value := os.environ.get(variable)):
        pytest.skip(f"needs real files: set {variable} to their folder")
    if not (folder := Path(value).expanduser().resolve()).is_dir():
        pytest.skip(f"needs real files: {variable}={folder} is no folder")
    return folder


@pytest.fixture
def data_dir() -> Path:
    """Folder of parquet data sets, one sub-folder each. Mark the test `real_data`."""
    return folder_named_by("RSFT_DATA")


@pytest.fixture
def models_dir() -> Path:
    """Folder of saved models, one sub-folder each. Mark the test `real_data`."""
    return folder_named_by("RSFT_MODELS")
