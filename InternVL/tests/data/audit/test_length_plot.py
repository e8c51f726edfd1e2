"""Tests of the length histograms."""

import numpy as np
import pytest
from PIL import Image

from internvl_chat.data.audit import length_plot
from internvl_chat.data.audit.checks import Audit, SetAudit
from internvl_chat.data.audit.length_plot import length_figure, plot_lengths
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.sources.meta import DatasetSpec


def set_audit(name, tokens, supervised, tiles, folder) -> SetAudit:
    lengths = Lengths(*(np.array(column, np.int32) for column in (tokens, supervised, tiles)))
    spec = DatasetSpec(name, folder, folder / "x.jsonl")
    return SetAudit(spec, len(lengths), len(lengths), lengths, [])


@pytest.fixture
def drawn(tmp_path):
    """Return the figure for the given datasets."""

    def drawn(*sets, limit=8192):
        audits = [set_audit(*columns, tmp_path) for columns in sets]
        return length_figure(Audit(audits, [], False, limit))

    return drawn


rng = np.random.default_rng(0)
LONG = ("long", rng.integers(200, 9000, 500), rng.integers(1, 700, 500), rng.integers(0, 14, 500))
SPIKE = ("spike", [700] * 4000, [2] * 4000, [2] * 4000)


def heights(axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def test_histograms_contain_all_records(drawn):
    figure = drawn(LONG, SPIKE)
    panels = np.array(figure.axes).reshape(2, 3)
    assert [[sum(heights(axes)) for axes in row] for row in panels] == [[500] * 3, [4000] * 3]


def test_panels_have_their_own_y_axis(drawn):
    panels = np.array(drawn(LONG, SPIKE).axes).reshape(2, 3)
    for axes in panels[0]:
        assert axes.get_ylim()[1] < 1.2 * max(heights(axes))
    assert [axes.get_xlim() for axes in panels[0]] == [axes.get_xlim() for axes in panels[1]]


@pytest.mark.parametrize("limit", [500, 8192, 100_000])
def test_limit_is_marked_in_the_token_panels(drawn, limit):
    panels = np.array(drawn(LONG, SPIKE, limit=limit).axes).reshape(2, 3)
    for tokens, supervised, tiles in panels:
        [line] = tokens.lines
        assert line.get_xdata() == [limit, limit]
        assert tokens.get_xlim()[0] < limit < tokens.get_xlim()[1]
        assert not supervised.lines
        assert not tiles.lines
    assert f"max_seq_length {limit:,}" in panels[0, 0].get_title("left")


def test_names_and_medians(drawn):
    figure = drawn(("a$b_$", [3], [1], [0]), ("_" + "x" * 50, [5, 7], [1, 1], [2, 4]))
    panels = np.array(figure.axes).reshape(2, 3)
    assert [axes.get_ylabel() for axes in panels[:, 0]] == [r"a\$b_\$", "_" + "x" * 26 + "…"]
    assert [axes.get_title("right") for axes in panels[1]] == ["median 6", "median 1", "median 3"]


def ticks(axis, limits) -> list[float]:
    return [tick for tick in axis.get_majorticklocs() if limits[0] <= tick <= limits[1]]


@pytest.mark.parametrize("sets", [[LONG, SPIKE], [SPIKE], [("narrow", [300, 480], [9, 30], [3, 4])]])
def test_ticks_are_legible(drawn, sets):
    figure = drawn(*sets, limit=1000)
    figure.draw_without_rendering()
    for axes in figure.axes[-3:]:
        shown = ticks(axes.xaxis, axes.get_xlim())
        assert 2 <= len(shown) <= 16
        labels = [axes.xaxis.get_major_formatter()(tick) for tick in shown]
        assert len(set(labels)) == len(labels)


def test_without_tokens(drawn):
    [axes] = drawn(SPIKE, limit=None).axes
    assert axes.get_xlabel() == "tiles per record"


def test_empty_datasets(drawn, tmp_path):
    assert len(drawn().axes) == 3
    audits = [set_audit(name, *[values] * 3, tmp_path) for name, values in (("none", []), ("one", [1]))]
    plot_lengths(Audit(audits, [], False, 8192), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize("most", [1, 2, 13, 59, 60, 61, 500, 20_000])
def test_bins_enclose_all_values(most):
    column = np.arange(1, most + 1)
    for logarithmic in (False, True):
        bins = length_plot._bins([column, np.zeros(0, int)], None, logarithmic=logarithmic)
        assert (np.diff(bins) > 0).all()
        assert bins[0] < 1
        assert bins[-1] > most
        assert len(bins) <= length_plot._BINS + 2
