"""Programs that wait for each other, in worlds without chance, worked out by hand."""

import dataclasses

import pytest

from triton_lstm.perf.step.constants import H100
from triton_lstm.perf.step.waiting import Durations, Rest, Wait, wait_for_each_other

# A load is at L2 after 100 cycles
CALM = dataclasses.replace(H100, l2=200, seen=250, seen_spread=0, jitter=0)


def waited(durations, programs=3, splits=1, **changes):
    constants = dataclasses.replace(CALM, **changes)
    found = wait_for_each_other(durations, programs, constants, splits=splits)
    return found.cycles, found.looks


class TestWait:
    """Rows are stored 500 cycles after the last look, the step ends at 600, the next one looks after 100."""

    FIRST = Rest(rows=500, end=600)
    DURATIONS = Durations(Wait(first=100, period=300), (FIRST,))

    def test_rows_that_are_there(self):
        """The look is on its way 200 cycles after the stores, and at L2 after 300."""
        assert waited(self.DURATIONS) == (pytest.approx(700), 1)
        assert waited(self.DURATIONS, seen=300) == (pytest.approx(700), 1)

    def test_looks_in_vain(self):
        assert waited(self.DURATIONS, seen=301) == (pytest.approx(1000), 2)
        assert waited(self.DURATIONS, seen=901) == (pytest.approx(1600), 4)

    def test_what_was_ready_meanwhile(self):
        """After a look in vain the rest of the step is shorter, because its inputs have come."""
        shorter = dataclasses.replace(self.FIRST, rows=400, end=500)
        durations = dataclasses.replace(self.DURATIONS, rests=(self.FIRST, shorter))
        assert waited(durations, seen=301) == (pytest.approx(900), 2)

    def test_distance_counts(self):
        """Up to 60 cycles more than the look has: some look twice, and who is late makes others late."""
        cycles, looks = waited(self.DURATIONS, programs=16, seen=280, seen_spread=60)
        assert 700 < cycles <= 1000 and 1 < looks <= 2
        assert (cycles, looks) == waited(self.DURATIONS, programs=16, seen=280, seen_spread=60)  # the same every time


class TestParts:
    """A second wait: parts of the sum are stored 400 cycles after the first look, and looked for 50 cycles later."""

    DURATIONS = Durations(
        wait=Wait(first=200, period=300),
        rests=(Rest(rows=700, end=700, parts=400),),
        parts=Wait(first=50, period=200),
    )

    def test_one_more_look(self):
        """Seen 250 cycles after they were stored; the first look sees 150, the second 350."""
        assert waited(self.DURATIONS, splits=3) == (pytest.approx(200 + 700 + 200), 3)

    def test_rows_are_later_by_it(self):
        """The next step's look, 300 cycles after the rows were stored in time, would see them if they had been."""
        assert waited(self.DURATIONS, splits=3, seen=310) == (pytest.approx(200 + 700 + 200 + 300), 4)

    def test_only_the_group_is_waited_for(self):
        """A program's own parts are seen in time, those of a far one are not."""
        alone, all_of_them = (waited(self.DURATIONS, 16, splits=n, seen=120, seen_spread=60)[1] for n in (1, 16))
        assert 2 < alone < all_of_them <= 3

    def test_parts_that_are_there(self):
        assert waited(self.DURATIONS, splits=3, seen=150) == (pytest.approx(200 + 700), 2)
