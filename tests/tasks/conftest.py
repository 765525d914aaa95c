"""What several files of tests read: a dVAE, codes and a transformer, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import RUN, TINY_DVAE, TINY_TRANSFORMER

from dalle1.data import encoded as codes
from dalle1.tasks import dvae as train_dvae
from dalle1.tasks import transformer as train_transformer


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train everything once, each part from what the one before wrote."""
    runs = tmp_path_factory.mktemp("runs")
    dvae = ["--dvae", str(runs / "dvae")]
    train_dvae.main(["toy", *TINY_DVAE, *RUN, "--out", str(runs / "dvae")])
    encode = [*dvae, "--data", "toybox:4", "--num-workers", "0", "--device", "cpu"]
    codes.main([*encode, "--out", str(runs / "codes")])
    train = ["toy", *dvae, *TINY_TRANSFORMER, *RUN]
    train_transformer.main([*train, "--data", str(runs / "codes"), "--out", str(runs / "model")])
    return runs
