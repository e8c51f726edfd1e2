"""Downsampling, curves and charts."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_chat.train.report.figure import MAX_POINTS, curve, downsample, make_chart, marks


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.sampled_from([2, 10, 50]))
def test_downsampling_keeps_ends_and_extremes(values, points):
    array = np.array(values)
    chosen = downsample(array, points)
    assert (np.diff(chosen) > 0).all()
    assert (chosen[0], chosen[-1]) == (0, len(array) - 1)
    assert array[chosen].min() == array.min() and array[chosen].max() == array.max()
    assert len(chosen) <= points + 2


def test_every_spike_of_a_long_curve_is_kept():
    values = np.random.default_rng(0).normal(size=100_000)
    spikes = np.arange(500, 100_000, 1000)
    values[spikes] = 100
    chosen = downsample(values)
    assert set(spikes) <= set(chosen) and len(chosen) <= MAX_POINTS + 2


def test_short_curves_are_complete():
    assert downsample(np.zeros(MAX_POINTS)).tolist() == list(range(MAX_POINTS))


def test_values_that_are_not_finite_are_omitted():
    [trace] = curve(np.arange(4), np.array([1.0, np.nan, np.inf, 4.0]), "loss", color="#0072B2")
    assert trace.x.tolist() == [0, 3] and trace.y.tolist() == [1.0, 4.0]
    assert list(curve(np.arange(2), np.full(2, np.nan), "loss", color="#0072B2")) == []
    assert list(curve(np.zeros(0), np.zeros(0), "loss", color="#0072B2")) == []


def test_marks_show_the_values():
    values = np.array([7.25, np.nan])
    [trace] = marks(np.array([3, 9]), values, 5.0, "skipped", symbol="x", color="#B00020", legend=True)
    assert trace.text == ("skipped: 7.25", "skipped") and trace.y.tolist() == [5.0, 5.0]
    assert trace.name == "skipped (2)"


def test_chart_without_curves():
    assert make_chart("loss", "Loss", "", []) is None


@pytest.mark.parametrize(("steps", "limits"), [([5], [4.5, 5.5]), ([0, 100], [-1.0, 101.0])])
def test_axis_includes_all_steps(steps, limits):
    traces = list(chain(*(curve(np.array([s]), np.ones(1), "a", color="#0072B2") for s in steps)))
    chart = make_chart("loss", "Loss", "", traces, dotted=[2])
    layout = json.loads(chart.figure)["layout"]
    assert layout["xaxis"]["range"] == limits
    assert layout["shapes"][0]["x0"] == 2.5
