import io

import pytest

from domainbed_ext.system import progress
from domainbed_ext.system.progress import BYTES, Bar, Pace, format_rate


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bar(clock):
    bar = Bar(None, "decoding", 1000, "images")
    bar.pace = Pace(clock)
    return bar


def test_a_rate_is_what_was_done_over_the_time_it_took(clock, bar):
    for _ in range(10):
        clock.now += 2
        bar.advance(50)
    assert bar.pace.rate == pytest.approx(25)
    assert bar.seconds_left == pytest.approx(500 / 25)


def test_two_that_end_at_once_are_no_rate_yet(clock, bar):
    clock.now += 0.001
    bar.advance(64)
    clock.now += 0.001
    bar.advance(64)
    assert bar.pace.rate is None and bar.seconds_left is None
    clock.now += 3.998
    bar.advance(72)
    assert bar.pace.rate == pytest.approx(200 / 4)


def test_what_is_there_already_counts_neither_towards_the_rate_nor_the_rest(clock, bar):
    bar.leave_out(600)  # out of a cache, in no time
    assert (bar.done, bar.total, bar.pace.rate) == (0, 400, None)
    clock.now += 10
    bar.advance(100)
    assert bar.pace.rate == pytest.approx(10) and bar.seconds_left == pytest.approx(30)


def test_a_download_that_resumes_is_as_fast_as_what_comes_now(clock, bar):
    bar.follow(900, 1000)
    clock.now += 5
    bar.follow(950, 1000)
    assert bar.pace.rate == pytest.approx(10) and bar.seconds_left == pytest.approx(5)


def test_a_rate_forgets_what_is_long_past(clock, bar):
    clock.now += 10
    bar.advance(500)
    for _ in range(100):
        clock.now += 10
        bar.advance(1)
    assert bar.pace.rate == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("rate", "unit", "words"),
    [
        (1234.5, "images", "1,234 images/s"),
        (2.25, "steps", "2.2 steps/s"),
        (0.5, "steps", "2.0 s each"),
        (1 / 120, "runs", "2 min each"),
        (2_500_000, BYTES, "2.5 MB/s"),
    ],
)
def test_rates_read_well(rate, unit, words):
    assert format_rate(rate, unit) == words


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def terminal(monkeypatch):
    """In place of the one that pytest puts in the way of each test."""
    monkeypatch.setattr("sys.stderr", screen := Screen())
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_a_bar_within_another_is_a_line_of_the_same_display(monkeypatch):
    screen = terminal(monkeypatch)
    with progress.bar("outer", 2, "runs") as outer:
        with progress.bar("inner", 3, "images") as inner:
            assert inner.display is outer.display is not None
            inner.advance(3)
        outer.advance(2)
    assert "inner" in screen.getvalue()
    last = screen.getvalue().splitlines()[-2:]
    assert any("outer" in line and "2/2 runs" in line for line in last) and not any("inner" in line for line in last)
    with progress.bar("another") as another:
        assert another.display is not outer.display


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": ""}])
def test_a_terminal_that_cannot_move_its_cursor_gets_no_bar(monkeypatch, variables):
    screen = terminal(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with progress.bar("outer", 2):
        pass
    assert screen.getvalue() == ""


def test_a_variable_that_asks_for_colour_makes_no_terminal_of_a_pipe(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.bar("outer", 2) as outer:
        outer.advance()
        print("trained")
    assert capsys.readouterr() == ("trained\n", "")


def test_what_is_piped_stays_piped(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    with progress.bar("outer", 2):
        print("trained")
    assert capsys.readouterr().out == "trained\n" and "trained" not in screen.getvalue()


def test_figures_stay_in_one_line_on_a_narrow_terminal(monkeypatch, clock):
    monkeypatch.setenv("COLUMNS", "80")
    screen = terminal(monkeypatch)
    with progress.bar("evaluating environments", 80_000, "images") as line:
        line.pace = Pace(clock)
        clock.now += 10
        line.advance(29_000)
    assert "29,000/80,000 images 2,900 images/s" in screen.getvalue()
