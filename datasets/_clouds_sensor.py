"""Sensors of the procedural scenes: path radiance, stretch, colour cast, blur, noise, saturation."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._clouds_surface import Stack
from vfmadapt.datasets._procedural import Field

Range = tuple[float, float]
Ranges = tuple[Range, Range, Range, Range]


@dataclass(frozen=True)
class Preset:
    """A sensor family: the ranges that a scene's sensor is drawn from, uniformly.

    A band's output is floor + (ceiling - floor) * tone(clip((reflectance + veil - black) / (white - black), 0, 1)).

    Args:
        name: of the family.
        haze: reflectance of an even aerosol veil over the scene.
        path: factor on molecular path radiance.
        white: reflectance that is stored as the brightest value, as a multiple of the brightness of the ground;
            (0, 0) stores reflectance as it is.
        dehaze: share of the veil that the stretch takes away again.
        floor: darkest output value, for blue, green, red, and all infrared bands.
        ceiling: brightest output value, likewise.
        tint: how far the gains of the bands differ (standard deviation of their logarithm).
        tone: 0 is linear, 1 a square root (lifts the dark), -1 a square.
        blur: standard deviation of the point spread, pixels.
        noise: standard deviation of the noise, output units.
        sharpen: strength of an unsharp mask.
        levels: number of output levels; 0 is continuous.
    """

    name: str
    haze: Range = (0.0, 0.06)
    path: Range = (0.2, 1.2)
    white: Range = (1.6, 3.2)
    dehaze: Range = (0.2, 0.9)
    floor: Ranges = ((0.0, 0.05),) * 4
    ceiling: Ranges = ((0.9, 1.0),) * 4
    tint: float = 0.04
    tone: Range = (0.0, 0.8)
    blur: Range = (0.3, 1.2)
    noise: Range = (0.001, 0.010)
    sharpen: Range = (0.0, 0.0)
    levels: int = 256


TRAIN_PRESETS = (
    Preset("toa", path=(0.7, 1.3), white=(0.0, 0.0), tint=0.02, noise=(0.001, 0.006), levels=0),
    Preset("display", white=(1.6, 4.0), floor=((0.05, 0.25),) * 4, tone=(0.2, 0.9)),
    Preset(
        "flat",
        haze=(0.02, 0.06),
        white=(1.6, 3.2),
        floor=((0.18, 0.34), (0.18, 0.32), (0.16, 0.30), (0.05, 0.30)),
        tone=(-0.2, 0.5),
    ),
    Preset(
        "cast_green",
        haze=(0.02, 0.06),
        floor=((0.20, 0.34), (0.20, 0.32), (0.14, 0.26), (0.10, 0.30)),
        ceiling=((0.80, 1.0), (0.88, 1.0), (0.75, 1.0), (0.80, 1.0)),
        blur=(0.5, 1.5),
    ),
    Preset(
        "cast_blue",
        haze=(0.02, 0.06),
        white=(1.6, 4.0),
        floor=((0.30, 0.46), (0.16, 0.32), (0.06, 0.24), (0.05, 0.30)),
        ceiling=((0.80, 1.0), (0.70, 1.0), (0.50, 1.0), (0.70, 1.0)),
        blur=(0.5, 1.6),
    ),
    Preset(
        "globe",
        path=(0.0, 0.5),
        white=(1.7, 4.5),
        ceiling=((0.80, 1.0),) * 4,
        tint=0.06,
        tone=(0.4, 1.0),
        sharpen=(0.0, 0.6),
        blur=(0.4, 1.5),
    ),
)
"""Sensor families of the training and validation scenes."""

TEST_PRESET = Preset(
    "test",
    haze=(0.0, 0.08),
    path=(0.2, 1.0),
    white=(1.6, 3.0),
    floor=((0.02, 0.26), (0.04, 0.29), (0.08, 0.33), (0.02, 0.25)),
    ceiling=((0.86, 0.96), (0.88, 1.0), (0.90, 1.0), (0.85, 1.0)),
    tint=0.06,
    tone=(0.2, 0.9),
    blur=(0.6, 1.1),
    noise=(0.003, 0.009),
    sharpen=(0.1, 0.5),
    levels=1024,
)
"""Sensor family of the test scenes only: a warm cast, sharpened, noisier, 10 bits."""

# Path radiance as reflectance (Rayleigh: it falls with the fourth power of wavelength) and aerosol, per band.
_PATH = np.asarray((0.11, 0.07, 0.04, 0.015, 0.0, 0.0), dtype=np.float32)[:, None, None]
_HAZE = np.asarray((1.0, 0.92, 0.85, 0.7, 0.4, 0.25), dtype=np.float32)[:, None, None]


@dataclass(frozen=True)
class Sensor:
    """A sensor of a family, every number fixed; arrays are (6, 1, 1), `haze` may be (6, H, W)."""

    haze: Stack
    path: Stack
    black: Stack
    white: Stack
    floor: Stack
    ceiling: Stack
    tone: np.float32
    blur: float
    noise: np.float32
    sharpen: np.float32
    levels: int

    def veil(self, image: Stack) -> Stack:
        """Reflectance at the ground (6, H, W) -> at the sensor."""
        return np.asarray(image * (1 - self.haze) ** 2 + (self.haze + self.path), dtype=np.float32)

    def respond(self, image: Stack) -> Stack:
        """Reflectance at the sensor (6, H, W) -> stored values without noise."""
        scaled = (image - self.black) / (self.white - self.black)
        scaled = np.clip(scaled, 0, 1 if self.levels else 2)  # only an unstretched product stores values above white
        if self.tone > 0:
            scaled += self.tone * (np.sqrt(scaled) - scaled)
        elif self.tone < 0:
            scaled += self.tone * (scaled - scaled * scaled)
        return np.asarray(self.floor + (self.ceiling - self.floor) * scaled, dtype=np.float32)

    def _green(self) -> "Sensor":
        green = slice(1, 2)
        return replace(
            self,
            haze=self.haze[green],
            path=self.path[green],
            black=self.black[green],
            white=self.white[green],
            floor=self.floor[green],
            ceiling=self.ceiling[green],
        )

    def change(self, first: Stack, second: Stack) -> Field:
        """How much the stored green value differs between two ground reflectances (6, H, W), pixel by pixel: (H, W)."""
        green = self._green()
        stored = [green.respond(green.veil(image[1:2])) for image in (first, second)]
        return np.asarray(np.abs(stored[0] - stored[1])[0])

    def saturates(self, image: Stack) -> NDArray[np.bool_]:
        """Where a ground reflectance (6, H, W) is stored as the brightest green: (H, W)."""
        green = self._green()
        return np.asarray((green.veil(image[1:2]) >= green.white)[0] & (self.levels > 0))

    def sense(self, rng: np.random.Generator, image: Stack) -> Stack:
        """Reflectance at the ground (6, H, W) -> what the product stores, float32, about 0..1."""
        image = self.veil(image)
        for plane in image:
            plane[:] = proc.blur(plane, self.blur)
            if self.sharpen > 0:
                plane += self.sharpen * (plane - proc.blur(plane, 1.2))
        out = self.respond(image)
        out += self.noise * rng.standard_normal(out.shape, dtype=np.float32)
        if self.levels:
            out = np.round(np.clip(out, 0, 1) * (self.levels - 1)) / np.float32(self.levels - 1)
        return np.clip(out, 0, 1.6).astype(np.float32)


def _draw(rng: np.random.Generator, span: Range) -> np.float32:
    return np.float32(rng.uniform(*span))


def _per_band(rng: np.random.Generator, spans: Ranges) -> Stack:
    place = rng.uniform()  # the bands move together, give or take
    values = [
        low + (high - low) * np.clip(place + rng.normal(0, 0.15), 0, 1) for low, high in (*spans, spans[3], spans[3])
    ]
    return np.asarray(values, dtype=np.float32)[:, None, None]


def draw_sensor(rng: np.random.Generator, preset: Preset, surface: Stack) -> Sensor:
    """A sensor of a family, its stretch set for the brightness of the cloud-free surface (6, H, W)."""
    size = (surface.shape[1], surface.shape[2])
    haze = _draw(rng, preset.haze) * _HAZE
    path = _draw(rng, preset.path) * _PATH
    levels = preset.levels
    black = np.zeros_like(path)
    white = np.ones_like(path)
    if preset.white[1] > 0:
        black += _draw(rng, preset.dehaze) * (haze + path)
        ground = np.asarray([proc.quantile(band, 0.9) for band in surface], dtype=np.float32)
        grey = np.float32(ground[:3].mean())
        ground = np.concatenate([np.full(3, grey), ground[3:]])[:, None, None]  # one exposure for the visible bands
        white = black + np.clip(_draw(rng, preset.white) * ground, 0.16, 1.1)
    white = white * rng.lognormal(0, preset.tint, (6, 1, 1)).astype(np.float32)
    if rng.random() < 0.5:  # the veil thins out towards one side, too slowly to be a cloud
        haze = haze * (1 + np.float32(0.25) * np.tanh(proc.power_noise(rng, size, 2.5, outer=500)))
    ceiling = _per_band(rng, preset.ceiling) if levels else np.ones_like(path)
    floor = _per_band(rng, preset.floor) if levels else np.zeros_like(path)
    tone = _draw(rng, preset.tone) if levels else np.float32(0)
    blur, noise, sharpen = (_draw(rng, span) for span in (preset.blur, preset.noise, preset.sharpen))
    return Sensor(haze, path, black, white, floor, ceiling, tone, float(blur), noise, sharpen, levels)
