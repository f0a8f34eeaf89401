"""Contact sheets show frames where and as they should be."""

import numpy as np
import pytest
from video_files import grey, moving

from engram_core import InputError
from engram_video.sheet import _GAP, _LABEL_WIDTH, _SEAM, draw_sheet

INK = 128  # labels are darker


def ink(sheet, top, bottom):
    """Return how many dark pixels are in the place of a label."""
    return int((np.asarray(sheet)[top:bottom, :_LABEL_WIDTH].max(axis=-1) < INK).sum())


def cells(sheet, width, columns, y):
    """Return the grey level in the middle of each column."""
    pixels = np.asarray(sheet)
    return [int(pixels[y, _LABEL_WIDTH + column * (width + _SEAM) + width // 2, 0]) for column in range(columns)]


def test_frames_stand_in_the_order_of_time():
    levels = list(range(0, 243, 3))
    sheet = draw_sheet([("base", grey(levels, 100, 60)), ("engram", grey(levels[::-1], 100, 60))], columns=9)
    assert sheet.width == _LABEL_WIDTH + 9 * (100 + _SEAM) - _SEAM + _GAP
    wanted = [levels[index] for index in range(0, 81, 10)]
    bottom = sheet.height - _GAP - 30
    assert cells(sheet, 100, 9, bottom) == wanted[::-1]
    assert cells(sheet, 100, 9, bottom - 60 - _GAP) == wanted


def test_small_frames_are_enlarged_by_whole_factors():
    frames = np.random.default_rng(0).integers(0, 256, (1, 20, 40, 3)).astype(np.uint8)
    sheet = np.asarray(draw_sheet([("", frames)]))
    shown = sheet[-_GAP - 60 : -_GAP, _LABEL_WIDTH : _LABEL_WIDTH + 120]
    assert np.array_equal(shown, frames[0].repeat(3, axis=0).repeat(3, axis=1))


def test_large_frames_are_reduced():
    sheet = draw_sheet([("", moving(2, 960, 480))])
    assert sheet.width == _LABEL_WIDTH + 2 * (240 + _SEAM) - _SEAM + _GAP
    assert sheet.height < 120 + 60


def test_frames_of_a_fitting_size_stay_as_they_are():
    frames = moving(1, 200, 120)
    sheet = np.asarray(draw_sheet([("", frames)]))
    assert np.array_equal(sheet[-_GAP - 120 : -_GAP, _LABEL_WIDTH : _LABEL_WIDTH + 200], frames[0])


def test_clips_may_differ_in_size_and_length():
    sheet = draw_sheet([("one", grey([10] * 9, 100, 60)), ("two", grey([200, 90], 120, 40))], columns=4)
    assert sheet.size == (_LABEL_WIDTH + 4 * 102 - _SEAM + _GAP, _GAP + 60 + _GAP + 40 + _GAP)
    assert cells(sheet, 100, 4, _GAP + 30) == [10] * 4
    assert cells(sheet, 120, 3, _GAP + 60 + _GAP + 20) == [200, 90, 255]


def test_labels_stay_beside_their_rows():
    rows = [("", grey([255], 100, 60)), ("a red ball " * 60, grey([255], 100, 60)), ("", grey([255], 100, 60))]
    sheet = draw_sheet(rows)
    bottom = sheet.height - _GAP
    starts = [bottom - 60 - (60 + _GAP) * number for number in (2, 1, 0)]
    assert [ink(sheet, start, start + 60) > 0 for start in starts] == [False, True, False]
    assert (np.asarray(sheet)[:, _LABEL_WIDTH - 4 : _LABEL_WIDTH] == 255).all()


def test_labels_of_all_kinds_are_drawn():
    for label in ("", "\n", "a" * 500, "Zörbit 猫\t\N{ROBOT FACE}\n(seed 3)"):
        draw_sheet([(label, grey([10], 8, 8))])


@pytest.mark.parametrize(("rows", "columns"), [([], 8), ([("a", grey([1]))], 0)])
def test_nothing_to_show(rows, columns):
    with pytest.raises(InputError, match=f"{len(rows)} clips and {columns} frames of each has nothing to show"):
        draw_sheet(rows, columns=columns)
