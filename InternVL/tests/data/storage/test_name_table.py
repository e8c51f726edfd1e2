"""The table of rows by name."""

import numpy as np
import pytest

from internvl_chat.data.storage.name_table import NameTable


def test_lookup():
    names = [f"figures/{number}.jpg" for number in range(1000)] + ["é", "\udcff"]
    table = NameTable(names, np.arange(2004).reshape(-1, 2))
    assert len(table) == 1002
    assert [table.get(name) for name in names] == [[2 * n, 2 * n + 1] for n in range(1002)]
    assert table.get("figures/1000.jpg") is None
    assert NameTable([], np.zeros((0, 2), np.int64)).get("a") is None


def test_repeated_name():
    with pytest.raises(ValueError, match="two names are equal"):
        NameTable(["a", "b", "a"], np.zeros((3, 1), np.int64))
