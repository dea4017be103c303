"""scikit-learn's digits as small videos, nothing to download: a digit crosses the picture in one of 8 directions.

What leaves on one side comes back on the other, so that no single frame tells the direction, which is the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import read_digits
from .found import Found
from .splits import stratified

DIRECTIONS = {  # (down, right) in pixels a frame
    "up left": (-1, -1),
    "up": (-1, 0),
    "up right": (-1, 1),
    "left": (0, -1),
    "right": (0, 1),
    "down left": (1, -1),
    "down": (1, 0),
    "down right": (1, 1),
}
FRAMES, SIDE, DIGIT = 24, 32, 16


@dataclass(frozen=True, eq=False)
class DigitVideo:
    """24 frames of a digit (16, 16) that starts at `start` on a picture of 32 x 32."""

    name: str
    digit: Tensor
    start: tuple[int, int]
    step: tuple[int, int]

    def __len__(self) -> int:
        return FRAMES

    def read(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        canvas = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        canvas[:DIGIT, :DIGIT] = self.digit
        frames = []
        for number in np.asarray(numbers).tolist():
            shift = tuple(at + number * pixels for at, pixels in zip(self.start, self.step, strict=True))
            frames.append(canvas.roll(shift, (0, 1)))
        return torch.stack(frames).unsqueeze(1).expand(-1, 3, -1, -1)

    def picture(self) -> Tensor:
        return self.read([FRAMES // 2])[0]


@dataclass(frozen=True, eq=False)
class DigitStore:
    """One video a digit. See `images.Store`."""

    digits: Tensor  # uint8 (N, 16, 16)
    starts: np.ndarray  # (N, 2)
    labels: np.ndarray  # (N,)
    kind = "video"

    def name(self, row: int) -> str:
        return f"digits[{row}]"

    def stamp(self, row: int) -> str:
        return f"moving {row}"

    def raw(self, row: int) -> None:
        return None

    def array(self, row: int) -> Any:
        step = list(DIRECTIONS.values())[int(self.labels[row])]
        start = int(self.starts[row, 0]), int(self.starts[row, 1])
        return DigitVideo(self.name(row), self.digits[row], start, step)

    @property
    def parts(self) -> Tensor:
        """Pixels are in memory, so that worker processes would not help (`Images.in_memory`)."""
        return self.digits


def read_digit_videos() -> Found:
    """1,797 videos, 8 directions; 1,097 / 200 / 500 for training, validation and test, always the same."""
    images = read_digits()
    small = torch.stack([torch.as_tensor(images.store.array(row)) for row in range(len(images.names))])
    small = torch.nn.functional.interpolate(
        small[:, None].float(), size=(DIGIT, DIGIT), mode="bilinear", antialias=True
    )
    random = np.random.RandomState(0)
    labels = random.randint(len(DIRECTIONS), size=len(small)).astype(np.int64)
    starts = random.randint(SIDE, size=(len(small), 2))
    store = DigitStore(small.round().byte()[:, 0], starts, labels)
    found = Found("digits", store, list(images.names), "single", list(DIRECTIONS), labels)
    found.split = stratified(labels, val=200 / 1797, test=500 / 1797, seed=0)
    found.said = ["1,797 videos of scikit-learn's digits moving in 8 directions, 24 frames of 32 x 32"]
    return found
