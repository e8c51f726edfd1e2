"""Catalogs of small datasets for the tests of the data browser."""

import pytest
from small_sets import write_set

from internvl_chat.data.browse.catalog import BackgroundIndex, Catalog
from internvl_chat.data.record_set import RecordSet


@pytest.fixture
def make(tmp_path):
    """Write records as a dataset and open it."""

    def make(records, name="qa", **entry) -> RecordSet:
        return write_set(tmp_path, records, name, **entry)

    return make


@pytest.fixture
def catalog_of(tmp_path):
    """Return a function that creates a catalog of datasets and, by default, fills it."""

    def catalog_of(*sets: RecordSet, indexed: bool = True) -> Catalog:
        catalog = Catalog(sets)
        if indexed:
            index = BackgroundIndex(catalog, tmp_path / "cache")
            index.start()
            index.wait()
            assert index.error is None
        return catalog

    return catalog_of
