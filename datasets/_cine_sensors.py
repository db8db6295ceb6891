"""What scanners make of anatomy: CT in a soft-tissue window, MR magnitude, ultrasound sectors. All give 0..1."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field, blur, power_noise, smoothstep

# Hounsfield units of the portal venous phase
_CT = {
    "air": -1000, "skin": 20, "fat": -100, "muscle": 55, "bone": 480, "marrow": 190, "disc": 80, "liver": 110,
    "spleen": 120, "kidney": 185, "medulla": 130, "blood": 160, "vein": 135, "bowel": 55, "content": 25, "stomach": 30,
    "gas": -900, "lung": -840, "node": 75, "lesion": 70, "core": 25, "fluid": 8, "heart": 100, "valve": 60,
}  # fmt: skip
# bSSFP: fluid and blood brightest, then fat
_MR = {
    "air": 0.01, "skin": 0.4, "fat": 0.7, "muscle": 0.24, "bone": 0.1, "marrow": 0.45, "disc": 0.4, "liver": 0.4,
    "spleen": 0.55, "kidney": 0.55, "medulla": 0.75, "blood": 0.9, "vein": 0.8, "bowel": 0.45, "content": 0.7,
    "stomach": 0.55, "gas": 0.02, "lung": 0.05, "node": 0.5, "lesion": 0.6, "core": 0.85, "fluid": 1.0, "heart": 0.32,
    "valve": 0.25,
}  # fmt: skip
# amplitude of echoes
_ECHO = {"air": 0.0, "muscle": 0.1, "lung": 0.05, "heart": 0.3, "blood": 0.006, "valve": 0.8, "sac": 0.8}

# contrast agent: seconds until it comes, seconds until its peak, signal there
_BOLUS = {
    "right": (0, 2.5, 0.8), "lung": (2, 2.5, 0.1), "blood": (4, 3, 0.7), "vein": (9, 5, 0.4), "heart": (5, 4, 0.3),
    "spleen": (5, 4, 0.4), "kidney": (5, 3.5, 0.45), "medulla": (8, 8, 0.4), "liver": (8, 9, 0.3),
    "lesion": (6, 4, 0.35),
}  # fmt: skip


@dataclass(frozen=True)
class Palette:
    """Brightness by tissue, and that of one unit of offset and texture.

    `gains`: by tissue what is added to it in each frame.
    """

    values: Mapping[str, float]
    contrast: float
    gains: Mapping[str, Field] = field(default_factory=dict)

    def at(self, frame: int) -> Mapping[str, float]:
        """Brightness by tissue in a frame."""
        return {**self.values, **{k: self.values[k] + float(gain[frame]) for k, gain in self.gains.items()}}


def ct_palette(rng: np.random.Generator) -> Palette:
    """Hounsfield units of a patient and a phase of contrast; in a third of them the bowel holds contrast, too."""
    phase = float(rng.uniform(-0.7, 1.4))  # of the enhancement: 0 is portal venous
    values = {k: v + float(rng.normal(0, 8)) for k, v in _CT.items()}
    for tissue, gain in (("blood", 80), ("vein", 45), ("kidney", 60), ("medulla", 40), ("spleen", 25), ("liver", 20)):
        values[tissue] += phase * gain
    if rng.random() < 0.35:
        values["content"] = float(rng.uniform(150, 500))
    return Palette(values, 16.0)


def mr_palette(rng: np.random.Generator) -> Palette:
    """Signals of a sequence between bSSFP and spoiled gradient echo, in which blood and fluid are grey."""
    spoiled = float(rng.uniform(0, 0.6))
    values = {k: v * float(np.exp(rng.normal(0, 0.12))) for k, v in _MR.items()}
    for tissue in ("blood", "vein", "fluid", "content", "core"):
        values[tissue] *= 1 - spoiled
    return Palette(values, 0.05)


def echo_palette(rng: np.random.Generator) -> Palette:
    """Amplitudes of a patient and a setting of the gain."""
    values = {k: v * float(np.exp(rng.normal(0, 0.25))) for k, v in _ECHO.items()}
    return Palette(values, 0.08)


def bolus(palette: Palette, rng: np.random.Generator, frames: int, seconds: float) -> Palette:
    """Signals weighted by T1, in which blood is dark until contrast agent comes: right heart, left, and then organs."""
    values = {**palette.values, "right": 0.0}
    for tissue in ("right", "blood", "vein"):
        values[tissue] = float(rng.uniform(0.08, 0.2))
    for tissue in ("kidney", "medulla", "spleen", "liver", "heart", "lesion", "fluid"):
        values[tissue] *= 0.6
    start, slow, dose = rng.uniform(0.1, 0.25) * frames * seconds, rng.uniform(0.8, 1.3), rng.uniform(0.8, 1.2)
    times = np.arange(frames) * seconds - start
    gains = {}
    for tissue, (delay, rise, gain) in _BOLUS.items():
        since = np.maximum(times - delay * slow, 0) / (rise * slow)
        again = 0.4 * (1 - np.exp(-since / 3))  # what stays in the body comes round again
        gains[tissue] = np.float32(gain * dose) * (since * np.exp(1 - since) * 0.75 + again).astype(np.float32)
    return Palette(values, palette.contrast, gains)


class CtSensor:
    """Blur, grain, streaks from what is dense, the table, and a window of about -160 to 240 Hounsfield units."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, self.size = rng, size
        self.low, self.high = float(rng.normal(-155, 25)), float(rng.normal(245, 35))
        self.sharpness, self.noise = float(rng.uniform(0.4, 0.9)), float(np.exp(rng.uniform(np.log(5), np.log(24))))
        self.grain = float(rng.uniform(0.5, 0.9))
        self.table = (float(rng.uniform(14, 34)), float(rng.uniform(0.0004, 0.0016)))  # mm below the body, bend

    def __call__(self, brightness: Field, x: Field, y: Field) -> Field:
        """Hounsfield units (H, W) at tissue coordinates in mm -> 0..1."""
        values = self._table(brightness, x, y)
        values = values + self._streaks(values)
        grain = blur(self.rng.standard_normal(self.size, dtype=np.float32), self.grain)
        grain = grain - np.float32(0.6) * blur(grain, 2.0)  # filtered back-projection leaves little of low frequency
        swirl = power_noise(self.rng, self.size, 1.0, outer=12) * np.float32(0.35)
        noise = (grain / np.float32(max(float(grain.std()), 1e-6)) + swirl) * np.float32(self.noise)
        seen = blur(values, self.sharpness) + noise
        return np.asarray(np.clip((seen - self.low) / (self.high - self.low), 0, 1), dtype=np.float32)

    def _table(self, values: Field, x: Field, y: Field) -> Field:
        body = np.argwhere(values > -400)
        if not len(body):
            return values
        across, down = x.mean(0, keepdims=True), y.mean(1, keepdims=True)  # tissue bends, the table does not
        away = down - (float(down[body[:, 0].max(), 0]) + self.table[0]) + self.table[1] * across**2
        line = np.maximum(1 - np.abs(away) / 3, 0) * (np.abs(across) < 200) * (values < -700)
        return np.asarray(values + line * np.float32(1500), dtype=np.float32)

    def _streaks(self, values: Field) -> Field:
        """Fans of light and dark lines from the brightest spot, the stronger the denser it is."""
        smooth = blur(values, 2.0)
        row, column = np.unravel_index(int(smooth.argmax()), self.size)
        dense = float(smooth[row, column]) - 600
        if dense < 0:
            return np.zeros(self.size, np.float32)
        y, x = np.mgrid[: self.size[0], : self.size[1]].astype(np.float32)
        turn = np.arctan2(y - row, x - column)
        fan = np.interp(turn, np.linspace(-np.pi, np.pi, 90), self.rng.normal(0, 1, 90))
        return np.asarray(fan * 0.15 * dense * np.exp(-np.hypot(y - row, x - column) / 40), dtype=np.float32)


class MrSensor:
    """Blur, the sensitivity of the coils, Rician noise, gain that settles over the first frames and wanders."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, self.size = rng, size
        self.coils = np.exp(power_noise(rng, size, 3, outer=500) * np.float32(rng.uniform(0.05, 0.35)))
        self.blur, self.noise = float(rng.uniform(0.4, 1.4)), float(rng.uniform(0.012, 0.06))
        self.settling = float(rng.uniform(0.2, 0.8)) if rng.random() < 0.3 else 0.0
        self.frame = 0

    def __call__(self, brightness: Field, _x: Field, _y: Field) -> Field:
        """Signals (H, W) -> 0..1."""
        gain = 1 + self.settling * float(np.exp(-self.frame / 1.5)) + 0.02 * float(self.rng.standard_normal())
        self.frame += 1
        noise = self.rng.standard_normal((2, *self.size), dtype=np.float32) * np.float32(self.noise)
        signal = blur(brightness, self.blur) * self.coils * np.float32(gain)
        return np.asarray(np.clip(np.hypot(signal + noise[0], noise[1]) * 0.85, 0, 1), dtype=np.float32)


@dataclass(frozen=True)
class _Shadow:
    """Behind a rib or lung: where it is, in half openings, how wide (radians), how dark, its phase and its speed."""

    towards: float
    wide: float
    strength: float
    phase: float
    speed: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> "_Shadow":
        towards, wide, strength = rng.uniform(-0.7, 0.7), rng.uniform(0.03, 0.12), rng.uniform(0.5, 1)
        return cls(*map(float, (towards, wide, strength, rng.uniform(0, 6.28), rng.normal(0, 0.03))))

    def passed(self, turns: Field, opening: float, frame: int) -> Field:
        """Share of the amplitude that gets through, by beam."""
        at = np.float32(self.towards * opening + self.speed * frame)
        now = np.float32(self.strength * (0.6 + 0.4 * np.sin(self.phase + 0.4 * frame)))
        return np.asarray(1 - now * (1 - smoothstep(np.abs(turns - at), self.wide * 0.5, self.wide * 1.5)))


@dataclass(frozen=True)
class Occluder:
    """A rib or an instrument that passes through the sector: bright itself, and no sound gets behind it.

    `depth`: mm from the probe; `wide`: half of it, in radians; `towards`: where it is in the first frame, in half
    openings; `speed`: half openings per frame.
    """

    depth: float
    wide: float
    towards: float
    speed: float

    @classmethod
    def random(cls, rng: np.random.Generator, frames: int) -> "Occluder":
        """One that comes in from a side and crosses the sector, or most of it, in the frames of a clip."""
        depth = 4.0 if rng.random() < 0.5 else float(rng.uniform(15, 60))
        side, travel = float(rng.choice([-1, 1])), float(rng.uniform(1.6, 2.6))
        wide, start = float(rng.uniform(0.12, 0.3)), float(rng.uniform(0.7, 1.4))
        return cls(depth, wide, side * start, -side * travel / max(frames - 1, 1))

    def covers(self, turns: Field, opening: float, frame: int) -> Field:
        """How much of each beam it stops."""
        at = np.float32((self.towards + self.speed * frame) * opening)
        return 1 - smoothstep(np.abs(turns - at), self.wide * 0.85, self.wide * 1.15)


class EchoSensor:
    """A sector of speckle that moves with the tissue, with shadows that come and go, in decibels."""

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int], pixel: float, occluder: Occluder | None = None
    ) -> None:
        self.rng, self.size, self.pixel = rng, size, pixel
        self.opening = float(rng.uniform(0.55, 0.75))
        self.depth = size[0] * pixel * 0.98
        self.range, self.gain = float(rng.uniform(38, 55)), float(rng.uniform(-6, 4))
        self.tissue = rng.standard_normal((2, 512, 512), dtype=np.float32)  # scatterers, half a millimetre apart
        self.beams, self.samples = int(rng.integers(110, 180)), size[0]
        self.width = float(rng.uniform(1.2, 2.2))  # of a beam, in beams
        self.clutter = float(rng.uniform(0, 0.08))
        self.shadows = [_Shadow.random(rng) for _ in range(rng.integers(0, 4))]
        self.occluder = occluder
        self.frame = 0
        self.turns = turns = np.linspace(-self.opening, self.opening, self.beams, dtype=np.float32)
        radii = np.linspace(0, self.depth, self.samples, dtype=np.float32)[:, None]
        self.polar = radii * np.sin(turns) / pixel + np.float32(size[1] / 2), radii * np.cos(turns) / np.float32(pixel)
        y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
        x = x - np.float32(size[1] / 2)
        self.radius, self.turn = radius, turn = np.hypot(x, y) * np.float32(pixel), np.arctan2(x, y)
        self.inside = (np.abs(turn) < self.opening) & (radius < self.depth)
        self.back = np.stack([radius / self.depth * (self.samples - 1),
                              (turn / self.opening + 1) / 2 * (self.beams - 1)])  # fmt: skip
        self.radii = radii

    def __call__(self, brightness: Field, x: Field, y: Field) -> Field:
        """Amplitudes (H, W) at tissue coordinates in mm -> 0..1, black outside the sector."""
        from scipy.ndimage import gaussian_filter1d, map_coordinates

        at = np.stack([self.polar[1], self.polar[0]])
        amplitude, where_x, where_y = (map_coordinates(f, at, order=1, mode="nearest") for f in (brightness, x, y))
        place = (np.rint(where_y * 2).astype(int) % 512, np.rint(where_x * 2).astype(int) % 512)
        fresh = self.rng.standard_normal((2, *amplitude.shape), dtype=np.float32) * np.float32(0.5)
        waves = [amplitude * (part[place] + new) for part, new in zip(self.tissue, fresh, strict=True)]
        waves = [gaussian_filter1d(gaussian_filter1d(w, self.width, axis=1), 0.8, axis=0) for w in waves]
        echo = np.hypot(*waves) * self._loss()
        if self.occluder is not None:
            stopped = self.occluder.covers(self.turns, self.opening, self.frame)
            behind = self.radii - np.float32(self.occluder.depth)
            echo = echo * (1 - stopped * (behind > 0)) + 0.5 * stopped * np.exp(-((behind / 2) ** 2))
        echo = echo + self._clutter(amplitude.shape)
        decibels = 20 * np.log10(echo + 1e-5) + self.gain
        shown = np.clip((decibels + self.range) / self.range + 0.1, 0, 1).astype(np.float32)
        self.frame += 1
        sector = map_coordinates(shown, self.back, order=1, mode="nearest")
        return np.asarray(sector * self.inside, dtype=np.float32)

    def visible(self, frame: int) -> NDArray[np.bool_]:
        """The pixels (H, W) of the sector that nothing hides in a frame: what is behind an occluder is not labelled."""
        if self.occluder is None:
            return self.inside
        hidden = self.occluder.covers(self.turn, self.opening, frame) > 0.5
        return self.inside & ~(hidden & (self.radius > self.occluder.depth - 2))

    def _loss(self) -> Field:
        """What reaches each sample of each beam: the deeper the less, little behind ribs and lung."""
        passed = np.ones(self.beams, np.float32)
        for shadow in self.shadows:
            passed = passed * shadow.passed(self.turns, self.opening, self.frame)
        return np.asarray(passed * np.exp(-self.radii / np.float32(self.depth * 1.4)), dtype=np.float32)

    def _clutter(self, shape: tuple[int, ...]) -> Field:
        """Haze near the probe that stands still while tissue moves."""
        haze = np.exp(-self.radii / np.float32(18)) * np.float32(self.clutter)
        return np.asarray(haze * self.rng.rayleigh(1, shape), dtype=np.float32)
