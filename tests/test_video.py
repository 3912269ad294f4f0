"""The mp4 writer: what is on the disk while it runs, when it is killed, when it fails and when it is done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.video import (
    VideoWriter,
    contact_sheet,
    enlarge,
    pad_to_even,
    read_video,
    save_image,
    viewing_scale,
)

BLOCKS = (9, 12, 12)  # frames of the first and the later blocks of 3 latent frames


def block(count: int, height: int = 48, width: int = 64, level: int = 0) -> np.ndarray:
    """Frames with a red left and a blue right half, and a grey bar whose place tells the frame's number."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, :, : width // 2] = (225, 35, 35)
    frames[:, :, width // 2 :] = (45, 85, 235)
    frames[:, : height // 4] = level
    return frames


def atoms(path: Path) -> list[str]:
    """Names of the mp4's top-level boxes, in order."""
    data, position, names = path.read_bytes(), 0, []
    while position + 8 <= len(data):
        names.append(data[position + 4 : position + 8].decode())
        position += max(8, int.from_bytes(data[position : position + 4], "big"))
    return names


def frames_on_disk(path: Path) -> int:
    try:
        return len(read_video(path))
    except UserError:
        return 0


def wait_for(condition, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_finished_video_has_every_frame_its_colours_and_its_index_in_front(tmp_path):
    with VideoWriter(tmp_path / "new" / "clip.mp4", scale=1) as writer:
        for count in BLOCKS:
            writer.write(block(count))
    assert writer.frames_written == sum(BLOCKS)
    video = read_video(writer.path)
    assert video.shape == (33, 48, 64, 3) and video.dtype == np.uint8
    np.testing.assert_allclose(video[20, 30, 16], (225, 35, 35), atol=4)
    np.testing.assert_allclose(video[20, 30, 48], (45, 85, 235), atol=4)
    boxes = atoms(writer.path)
    assert boxes.index("moov") < boxes.index("mdat") and "moof" not in boxes
    assert os.listdir(writer.path.parent) == ["clip.mp4"], "no temporary file is left"


def test_every_block_reaches_the_disk_before_the_next_and_plays(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, scale=1) as writer:
        written = 0
        for count in BLOCKS:
            writer.write(block(count))
            written += count
            wait_for(lambda wanted=written - 1: frames_on_disk(path) >= wanted)  # the muxer holds one frame back
        assert "moof" in atoms(path)


def test_killed_mid_way_the_file_plays(tmp_path):
    path = tmp_path / "clip.mp4"
    script = (
        "import sys, time, numpy as np; from longlive_jax.video import VideoWriter; w = VideoWriter(sys.argv[1])\n"
        "for n in (9, 12, 12): w.write(np.full((n, 16, 16, 3), 200, np.uint8))\n"
        "print(w._process.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, env=environment)
    try:
        encoder = int(process.stdout.readline())
        wait_for(lambda: frames_on_disk(path) >= 32)
        os.kill(encoder, signal.SIGKILL)  # first, or it would see its input end and finish the file
    finally:
        process.kill()
        process.communicate()
    video = read_video(path)
    assert len(video) >= 32 and video.shape[1:] == (480, 480, 3)
    np.testing.assert_allclose(video[-1], 200, atol=3)


def test_an_exception_keeps_what_was_written(tmp_path):
    path = tmp_path / "clip.mp4"
    with pytest.raises(RuntimeError, match="out of memory"), VideoWriter(path, scale=1) as writer:
        writer.write(block(9))
        raise RuntimeError("out of memory")
    assert len(read_video(path)) == 9
    with pytest.raises(ValueError, match="closed"):
        writer.write(block(1))


def test_existing_file_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="clip.mp4 exists.*--overwrite"):
        VideoWriter(path)
    late = VideoWriter(tmp_path / "late.mp4")
    (tmp_path / "late.mp4").write_bytes(b"came in between")
    with pytest.raises(UserError, match="--overwrite"):
        late.write(block(2))
    assert (tmp_path / "late.mp4").read_bytes() == b"came in between"
    writer = VideoWriter(path, overwrite=True, scale=1)
    assert path.read_bytes() == b"precious", "nothing is lost before the first block"
    writer.write(block(3))
    writer.close()
    assert len(read_video(path)) == 3


def test_a_full_disk_is_a_clear_error(tmp_path):
    path = tmp_path / "clip.mp4"
    path.symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    failure = pytest.raises(UserError, match="No space left on device.*--output")
    with failure, VideoWriter(path, overwrite=True) as writer:
        for _ in range(20):  # the first blocks may still fit into the pipe
            writer.write(noise)
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_an_encoder_that_dies_is_a_clear_error_and_its_file_plays(tmp_path):
    path = tmp_path / "clip.mp4"
    writer = VideoWriter(path, scale=1)
    writer.write(block(9))
    wait_for(lambda: frames_on_disk(path) >= 8)
    writer._process.kill()
    writer._process.wait()
    with pytest.raises(UserError, match="clip.mp4 failed: ffmpeg ended with status -9.*kept and plays"):
        writer.write(block(12))
    assert len(read_video(path)) >= 8


def test_a_failed_remux_is_a_clear_error(tmp_path):
    writer = VideoWriter(tmp_path / "clip.mp4", scale=1)
    writer.write(block(9))
    wait_for(lambda: frames_on_disk(writer.path) >= 8)  # before that ffmpeg may not have opened it yet
    writer.path.unlink()
    with pytest.raises(UserError, match="index could not be moved.*No such file"):
        writer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("height", "width", "scale", "expected"), [(33, 47, 1, (34, 48)), (15, 21, 3, (46, 64))])
def test_odd_sizes_repeat_their_edge(tmp_path, height, width, scale, expected):
    with VideoWriter(tmp_path / "odd.mp4", scale=scale) as writer:
        writer.write(block(4, height, width))
    video = read_video(writer.path)
    assert video.shape == (4, *expected, 3)
    np.testing.assert_allclose(video[2, -1, -1], (45, 85, 235), atol=4)


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 64), 8), ((480, 832), 1), ((100, 60), 8), ((720, 1280), 1), ((300, 200), 3)]
)
def test_viewing_scale(size, factor):
    assert viewing_scale(*size) == factor


def test_enlarge_and_pad_repeat_pixels():
    frames = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    big = enlarge(frames, 3)
    assert big.shape == (2, 9, 9, 3)
    np.testing.assert_array_equal(big[:, 1::3, 2::3], frames)
    padded = pad_to_even(frames)
    np.testing.assert_array_equal(padded[:, :3, :3], frames)
    np.testing.assert_array_equal(padded[:, 3, 3], frames[:, 2, 2])


@pytest.mark.parametrize("path", ["clip.avi", "clip"])
def test_only_mp4_is_written(tmp_path, path):
    with pytest.raises(UserError, match="clip.mp4"):
        VideoWriter(tmp_path / path)


@pytest.mark.parametrize("scale", [0, -1, 1.5, True, "big"])
def test_scale_must_be_whole(tmp_path, scale):
    with pytest.raises(UserError, match='"auto"'):
        VideoWriter(tmp_path / "clip.mp4", scale=scale)


def test_unusable_places_and_empty_videos(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        VideoWriter(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output"):
        VideoWriter(tmp_path / "file" / "clip.mp4").write(block(1))
    with pytest.raises(UserError, match="no frames"):
        VideoWriter(tmp_path / "none.mp4").close()
    with pytest.raises(UserError, match="does not exist"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="no frames"):
        read_video(tmp_path / "file")


def test_wrong_frames_are_refused(tmp_path):
    writer = VideoWriter(tmp_path / "clip.mp4", scale=1)
    for wrong in (block(2).astype(np.float32), block(2)[0], block(2)[..., :2]):
        with pytest.raises(ValueError, match="uint8"):
            writer.write(wrong)
    writer.write(block(2))
    with pytest.raises(ValueError, match="48, 64"):
        writer.write(block(2, 50, 64))
    writer.close()


def test_contact_sheet_places_frames_in_reading_order(tmp_path):
    frames = np.stack([np.full((4, 6, 3), level, np.uint8) for level in (10, 20, 30)])
    sheet = contact_sheet(frames, columns=2, gap=1, scale=2)
    assert sheet.shape == (2 * 9 + 1, 2 * 13 + 1, 3)
    assert [sheet[5, 5, 0], sheet[5, 20, 0], sheet[14, 5, 0], sheet[14, 20, 0], sheet[0, 0, 0]] == [
        10,
        20,
        30,
        255,
        255,
    ]
    np.testing.assert_array_equal(iio.imread(save_image(sheet, tmp_path / "pictures" / "sheet.png")), sheet)
