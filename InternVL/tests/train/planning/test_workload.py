"""Record lengths of a plan: exact for a meta file, otherwise with the given means."""

import numpy as np
import pytest

from internvl_chat.data.dataset import TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.index.build import index_records
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.model.io.folders import read_config
from internvl_chat.train.planning.workload import (
    PUBLISHED_RECORDS,
    PUBLISHED_SETS,
    meta_workload,
    published_workload,
    uniform_workload,
)


def test_meta_file_has_the_lengths_of_training(tiny_model, sample_data):
    specs = load_meta(sample_data / "train.json", sample_data)
    encoder = RecordEncoder(
        load_tokenizer(tiny_model)[0], Preprocessing.from_folder(tiny_model, read_config(tiny_model))
    )
    found = meta_workload(specs, encoder)
    sets = build_sets(specs, encoder)
    lengths = TrainingData(sets, lengths=[i.lengths for i in index_records(sets)]).epoch_lengths()
    assert found.exact and found.records == len(lengths)
    for name, column in lengths.columns.items():
        assert np.array_equal(found.lengths.columns[name], column)


@pytest.mark.parametrize("limit", [1, 6, 12])
def test_published_distribution_has_the_published_means(limit):
    found = published_workload(limit, 256)
    assert found.records == PUBLISHED_RECORDS == 237_748
    column = {1: 0, 6: 1, 12: 2}[limit]
    total = sum(p.records * (p.tokens[column] + 230) for p in PUBLISHED_SETS.values())
    assert found.mean_tokens == pytest.approx(total / PUBLISHED_RECORDS, rel=0.03)
    assert (found.lengths.supervised < found.lengths.tokens).all()
    # A text-only set has no tiles at any limit.
    assert 0.1 < (found.lengths.tiles == 0).mean() < 0.3


def test_given_means():
    found = uniform_workload(50, 1000, 2, 256)
    assert (found.records, found.exact) == (50, False)
    assert found.mean_tokens == pytest.approx(1000, rel=0.02)
    assert found.mean_tiles == pytest.approx(2, rel=0.02)
    assert (uniform_workload(1, 10, 2, 256).lengths.tokens >= 2).all()
