"""Video files: an mp4 that can be played while it is being made, and helpers to read videos and picture them.

`VideoWriter` feeds raw RGB frames to ffmpeg's H.264 encoder block by block. While it grows, FILE.mp4 is *fragmented*
(one fragment a frame, no index at the end), so that whatever has reached the disk plays even after `kill -9` or on
a full disk. `close` copies the stream, without encoding again, into an mp4 with its index in front (what browsers
want) and puts that in FILE.mp4's place in one step.
"""

import contextlib
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import imageio.v3 as iio
import numpy as np

from longlive_jax.config import FPS
from longlive_jax.errors import UserError

VIEWING_SIDE = 480  # pixels; `scale="auto"` enlarges until the shorter side has at least as many
SCALES = 'a whole number from 1 up, or "auto"'


def viewing_scale(height: int, width: int) -> int:
    """The smallest whole factor that brings the shorter side to 480 pixels or more (64 -> 8, 480 -> 1)."""
    return max(1, math.ceil(VIEWING_SIDE / min(height, width)))


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel `factor` times along both sides: uint8 `[T, H, W, 3]` -> `[T, factor H, factor W, 3]`."""
    return frames if factor == 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def pad_to_even(frames: np.ndarray) -> np.ndarray:
    """Repeats the last row or column of `[T, H, W, 3]` where the side is odd: 4:2:0 colour needs even sides."""
    height, width = frames.shape[1:3]
    if height % 2 == 0 and width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def require_free(path: str | os.PathLike, overwrite: bool) -> Path:
    """Returns `path` if a file may be written there.

    Raises:
      UserError: something exists there and `overwrite` is false, or it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file name in it, such as {path / 'video.mp4'}")
    if not overwrite and os.path.lexists(path):
        raise UserError(f"{path} exists and is kept; give another --output, or --overwrite to replace it")
    return path


def _ffmpeg() -> str:
    try:
        import imageio_ffmpeg  # here: pictures are written without it

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (RuntimeError, ModuleNotFoundError) as error:
        raise UserError(
            "no ffmpeg found; reinstall imageio-ffmpeg (pip install --force-reinstall imageio-ffmpeg) "
            "or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
        ) from error


def _reason(stderr: bytes, status: int) -> str:
    """The line of ffmpeg's error output that names the cause: the first, since later ones only follow from it."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    causes = [line for line in lines if "No space left" in line or "File too large" in line]
    return (causes or lines or [f"ffmpeg ended with status {status}"])[0]


def _encode_command(path: Path, width: int, height: int, fps: int, crf: int) -> list[str]:
    raw = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(fps)]
    # bt709 is converted to *and* declared: undeclared, players guess the matrix from the size and shift the colours.
    bt709 = "color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    colour = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,setparams={bt709}"]
    # zerolatency: no look-ahead and no B-frames, else x264 keeps up to 40 frames back and a kill would lose them.
    h264 = ["-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-crf", str(crf), "-g", str(fps)]
    # A fragment a frame rather than a keyframe: a first block of 9 frames would otherwise not reach the disk at all.
    growing = ["-movflags", "+frag_every_frame+empty_moov+default_base_moof", "-flush_packets", "1"]
    common = [_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y"]
    return [*common, *raw, "-i", "pipe:0", "-an", *colour, *h264, *growing, "-f", "mp4", _as_argument(path)]


def _as_argument(path: Path) -> str:
    """`path` as ffmpeg must be given it: "a:b.mp4" would be taken for protocol "a", "-x.mp4" for an option."""
    return f"file:{path}"


class VideoWriter:
    """Writes an H.264 mp4 (yuv420p) that grows on the disk block by block and plays at every moment.

    Use it as a context manager. If the body raises, what was written stays as a playable, fragmented file.
    Nothing is touched on the disk before the first block, so a run that fails early costs no old video.

    Attributes:
      path: the file.
      frames_written: pixel frames handed over so far.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        fps: int = FPS,
        scale: int | Literal["auto"] = "auto",
        overwrite: bool = False,
        crf: int = 17,
    ):
        """Checks that the file may be written.

        Args:
          path: the mp4 to write; missing folders are made.
          fps: frames a second.
          scale: whole factor by which frames are enlarged (nearest pixel), or "auto" (`viewing_scale`).
          overwrite: replace an existing file.
          crf: x264's quality, 0 (lossless) to 51; 17 looks lossless.

        Raises:
          UserError: the file exists and `overwrite` is false, its name does not end in .mp4, or `scale` is no scale.
        """
        self.path = require_free(path, overwrite)
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"videos are written as mp4: name the output {self.path.with_suffix('.mp4')}")
        if scale != "auto" and (isinstance(scale, bool) or not isinstance(scale, int) or scale < 1):
            raise UserError(f"scale is {scale!r}; it must be {SCALES}")
        self.frames_written = 0
        self._fps, self._scale, self._overwrite, self._crf = fps, scale, overwrite, crf
        self._frame_shape: tuple[int, int] | None = None
        self._process: subprocess.Popen | None = None
        self._stderr: IO[bytes] | None = None
        self._closed = False

    def write(self, frames: np.ndarray) -> None:
        """Appends a block of frames, uint8 `[T, H, W, 3]` of one size throughout, and passes it on at once.

        Raises:
          UserError: ffmpeg stopped (full disk, no permission ...), with its reason; what was written stays.
          ValueError: wrong dtype or shape, or the writer is closed.
        """
        frames = np.asarray(frames)
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
        if self._frame_shape not in (None, frames.shape[1:3]):
            raise ValueError(f"this video's frames are {self._frame_shape}, a block has {frames.shape[1:3]}")
        if not len(frames):
            return
        if self._scale == "auto":
            self._scale = viewing_scale(*frames.shape[1:3])
        pixels = np.ascontiguousarray(pad_to_even(enlarge(frames, self._scale)))
        if self._process is None:
            self._start(*pixels.shape[1:3])
            self._frame_shape = frames.shape[1:3]
        try:
            self._process.stdin.write(pixels.data)
            self._process.stdin.flush()
        except OSError:  # a broken pipe: ffmpeg is gone, and its last words say why
            raise self._failure() from None
        self.frames_written += len(frames)

    def close(self) -> Path:
        """Ends the video and moves its index to the front; returns the path. A second call does nothing.

        Raises:
          UserError: no frames were written, or ffmpeg failed; a fragmented file is then kept.
        """
        if self._closed:
            return self.path
        if self._process is None:
            self._closed = True
            raise UserError(f"{self.path} was not written: the video has no frames")
        if self._finish() != 0:
            raise self._failure()
        self._stderr.close()
        self._remux()
        return self.path

    def abort(self) -> None:
        """Ends the file where it is, without moving its index; it plays as it is. Never raises."""
        if self._process is not None and not self._closed:
            self._finish()
            self._stderr.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.close()
        else:
            self.abort()

    def _start(self, height: int, width: int) -> None:
        """Creates the file and starts the encoder."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._overwrite:
                self.path.open("xb").close()  # exclusive: a file made since the check in __init__ is kept too
        except FileExistsError:
            require_free(self.path, self._overwrite)
            raise UserError(f"{self.path.parent} is not a folder; give another --output") from None
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; give another --output") from error
        command = _encode_command(self.path, width, height, self._fps, self._crf)
        # Errors go to a file, since a pipe that nobody reads would block ffmpeg once it is full. A session of its own
        # keeps Ctrl-C from ffmpeg: only we are interrupted, and it ends the file properly when its input closes.
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr, start_new_session=True
        )

    def _finish(self) -> int:
        """Closes ffmpeg's input, waits for it to write the rest, and returns its exit status."""
        self._closed = True
        with contextlib.suppress(OSError):  # it may have ended before us; the exit status tells
            self._process.stdin.close()
        return self._process.wait()

    def _failure(self) -> UserError:
        """Ends a failed ffmpeg and words its reason."""
        status = self._finish()
        self._stderr.seek(0)
        reason = _reason(self._stderr.read(), status)
        self._stderr.close()
        return UserError(
            f"writing {self.path} failed: {reason}; what was written is kept and plays. "
            "Free some space or give another --output"
        )

    def _remux(self) -> None:
        """Replaces the fragmented file by one with the index in front, in one step."""
        front = self.path.with_name(f".{self.path.stem}.{os.getpid()}.remux.mp4")
        command = [_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y", "-i", _as_argument(self.path)]
        command += ["-c", "copy", "-movflags", "+faststart", "-f", "mp4", _as_argument(front)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
            if done.returncode != 0:
                raise UserError(
                    f"{self.path} is complete and plays, but its index could not be moved to the front: "
                    f"{_reason(done.stderr, done.returncode)}; free some space beside it"
                )
            os.replace(front, self.path)
        finally:
            front.unlink(missing_ok=True)


def read_video(path: str | os.PathLike) -> np.ndarray:
    """All frames of a video file, uint8 `[T, H, W, 3]`; fragmented and cut-off files give the frames they have.

    Raises:
      UserError: there is no such file, or it holds no video.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give the path of a video file")
    try:
        return np.stack(list(iio.imiter(path, plugin="FFMPEG")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no frames that ffmpeg can read; give the path of a video") from error


def contact_sheet(
    frames: np.ndarray | Sequence[np.ndarray], columns: int, *, gap: int = 4, scale: int = 1, background: int = 255
) -> np.ndarray:
    """Lays frames out in rows, left to right and top to bottom.

    Args:
      frames: uint8 `[N, H, W, 3]`.
      columns: frames a row; the last row may be shorter.
      gap: pixels between neighbours and round the sheet.
      scale: whole factor by which each frame is enlarged (nearest pixel).
      background: grey level of gaps and empty places.

    Returns:
      uint8 `[rows (scale H + gap) + gap, columns (scale W + gap) + gap, 3]`.
    """
    frames = enlarge(np.asarray(frames), scale)
    if frames.dtype != np.uint8 or frames.ndim != 4 or not len(frames) or columns < 1:
        raise ValueError(f"need columns >= 1 and uint8 [N, H, W, 3] frames, not {frames.dtype} {list(frames.shape)}")
    count, height, width, _ = frames.shape
    rows = math.ceil(count / columns)
    size = (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(size, background, np.uint8)
    for index, frame in enumerate(frames):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def save_image(image: np.ndarray, path: str | os.PathLike) -> Path:
    """Writes a uint8 `[H, W, 3]` image as PNG (or as the name's suffix says), folders included; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, image)
    return path
