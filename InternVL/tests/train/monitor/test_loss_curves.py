"""Data of the loss plot: logs, means and limits."""

import json

import numpy as np
import pytest

from internvl_chat.train.monitor.loss_curves import Curve, centered_mean, loss_limits, read_steps

NAN = float("nan")


class TestReadSteps:
    def test_repeated_steps_count_once_and_are_sorted(self, tmp_path):
        """After a crash, the steps since the checkpoint are repeated."""
        rows = [(1, 5.0), (2, 4.0), (3, 9.0), (2, 4.5), (3, 3.5), (4, 3.0)]
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps({"step": s, "loss": loss}) + "\n" for s, loss in rows))
        assert [(r["step"], r["loss"]) for r in read_steps(file)] == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 3.0)]

    def test_truncated_line_and_nan(self, tmp_path):
        (tmp_path / "log").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
        [row] = read_steps(tmp_path / "log")
        assert row["step"] == 1 and np.isnan(row["loss"])

    def test_damaged_lines(self, tmp_path):
        (tmp_path / "log").write_bytes(b'\xff\n5\n{}\n{"step": "1"}\n\n{"step": 3}\n')
        assert read_steps(tmp_path / "log") == [{"step": 3}]

    def test_missing_file(self, tmp_path):
        assert read_steps(tmp_path / "none") == []


class TestMean:
    def test_follows_a_straight_line_without_lag(self):
        line = np.arange(100.0, 0, -1)
        mean = centered_mean(line, 5)
        assert mean[0] == 100
        np.testing.assert_allclose(mean[:-5], line[:-5])
        # At the right end the window is one-sided.
        np.testing.assert_allclose(mean[-5:], line[-5:], atol=2.5 + 1e-9)

    def test_right_end_is_a_mean_of_several_values(self):
        assert centered_mean(np.array([5.0] * 20 + [2.0]), 5)[-1] == pytest.approx((5 * 5 + 2) / 6)

    def test_left_end_of_a_wide_window(self):
        values = np.arange(1000.0)
        assert centered_mean(values, 80)[0] == np.mean(values[:11])

    def test_weights(self):
        mean = centered_mean(np.array([1.0, 4.0, 1.0]), 1, np.array([1.0, 2.0, 3.0]))
        assert mean[1] == pytest.approx((1 + 8 + 3) / 6)

    def test_nan_is_ignored(self):
        mean = centered_mean(np.array([3.0, NAN, 5.0, NAN, NAN, NAN]), 1)
        assert mean[:3].tolist() == [3.0, 4.0, 5.0]
        assert mean[3] == 5.0 and np.isnan(mean[4:]).all()

    def test_empty(self):
        assert len(centered_mean(np.zeros(0), 3)) == 0


class TestLimits:
    NONE = np.zeros(0)

    def test_fit_the_data_and_not_zero(self):
        low, high = loss_limits(np.linspace(2.5, 2.0, 100), self.NONE)
        assert (low, high) == (pytest.approx(1.975), pytest.approx(2.525))

    @pytest.mark.parametrize("spikes", [[50], [50, 51], [99]])
    def test_spikes_are_excluded(self, spikes):
        losses = np.linspace(2.5, 2.0, 100)
        losses[spikes] = 40
        assert loss_limits(losses, self.NONE)[1] < 2.6

    def test_steep_start_is_not_a_spike(self):
        losses = 2 + 10 * np.exp(-np.arange(300.0))
        assert loss_limits(losses, self.NONE)[1] > 12

    def test_noise_is_not_a_spike(self):
        losses = 2 + 0.1 * np.random.default_rng(0).standard_normal(10_000)
        low, high = loss_limits(losses, self.NONE)
        assert low < losses.min() and losses.max() < high

    def test_validation_is_inside(self):
        low, high = loss_limits(np.full(50, 2.0), np.array([5.0, NAN]))
        assert low < 2 and high > 5

    def test_never_below_zero(self):
        assert loss_limits(np.array([0.0, 1.0, 0.01]), self.NONE)[0] == 0

    @pytest.mark.parametrize("losses", [[], [NAN], [3.0], [0.0], [2.0, 2.0]])
    def test_few_losses(self, losses):
        low, high = loss_limits(np.array(losses), self.NONE)
        assert np.isfinite([low, high]).all() and low < high


def test_mean_of_a_curve():
    losses = [2.0, 3.0] * 40
    losses[30] = 50.0
    curve = Curve.from_points((step, loss, 1) for step, loss in enumerate(losses))
    assert curve.half_width == 2
    assert curve.mean((1.9, 3.1)).max() < 3  # without the spike
    assert curve.mean((1.9, 3.1))[20] == pytest.approx(2.4)
    assert curve.mean((1.9, 3.1), factor=2)[20] == pytest.approx(22 / 9)


def test_curve_from_points():
    curve = Curve.from_points([(1, 2.0, 8), (2, None, 8)])
    assert curve.steps.tolist() == [1, 2] and np.isnan(curve.losses[1])
    assert len(Curve.from_points([]).steps) == 0
