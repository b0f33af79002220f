import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real clips, photographs and small weights; not part of the repository."""
    folder = Path(os.environ.get("ASSETS", ROOT / "../shared/assets")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test assets in {folder}: set ASSETS to a folder with video/, image/ and weights/")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine two threads that wait for each other are slower than one
