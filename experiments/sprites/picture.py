"""The README's picture: frames of a video, a row a prompt.

python experiments/sprites/picture.py outputs/demo.mp4 docs/demo.png --rows 3 --columns 6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from longlive_jax.video import contact_sheet, read_video, save_image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--side", type=int, default=128, help="pixels of a frame in the picture")
    args = parser.parse_args()

    frames = read_video(args.video)
    # The middle of each of rows x columns equal stretches.
    count = args.rows * args.columns
    chosen = frames[((np.arange(count) + 0.5) * len(frames) / count).astype(int)]
    every = max(1, chosen.shape[1] // args.side)
    save_image(contact_sheet(chosen[:, ::every, ::every], args.columns), args.picture)


if __name__ == "__main__":
    main()
