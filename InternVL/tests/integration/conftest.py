"""What tests of whole runs share."""

import json

import pytest


@pytest.fixture(scope="module")
def augmented(sample_data, tmp_path_factory):
    """The sample data with random augmentation, so that randomness in the loader counts too."""
    meta = json.loads((sample_data / "train.json").read_text())
    for entry in meta.values():
        entry["data_augment"] = True
    path = tmp_path_factory.mktemp("meta") / "augmented.json"
    path.write_text(json.dumps(meta))
    return path
