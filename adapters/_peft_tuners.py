"""The tuners that we take from Hugging Face PEFT: their settings, and the values that a layer's widths allow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vfmadapt.contracts import UserError

LINEAR = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Tuner:
    """One tuner.

    `config`: PEFT's class; `options`: all that may be set, with defaults (PEFT's, unless a comment says why not);
    `fixed`: what makes it this tuner. `limits`: option -> (value, in, out) -> the nearest value that fits a layer.
    `shared`: its layers have tensors in common. `roles`: where it acts by default.
    """

    config: str
    options: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Callable[[int, int, int], int]] = field(default_factory=dict)
    shared: bool = False
    roles: tuple[str, ...] = LINEAR


def _divisor(width: int, at_most: int, least: int = 1) -> int:
    """The largest divisor of `width` within least .. at_most; UserError where there is none."""
    found = next((n for n in range(min(at_most, width), least - 1, -1) if width % n == 0), None)
    if found is None:
        raise UserError(
            f"a layer's width of {width} has no divisor from {least} to {at_most} to be split into blocks by"
        )
    return found


def _input_blocks(value: int, width_in: int, _out: int) -> int:
    return _divisor(width_in, value, least=2)  # a block of one has no rotation


def _square_blocks(value: int, width_in: int, width_out: int) -> int:
    return _divisor(math.gcd(width_in, width_out), value)


def _output_pairs(value: int, _in: int, width_out: int) -> int:
    if width_out % 2:
        raise UserError(f"a layer's width of {width_out} is odd, so its outputs cannot be rotated in pairs")
    return 2 * _divisor(width_out // 2, value // 2)


def _entries(value: int, width_in: int, width_out: int) -> int:
    return min(value, width_in * width_out)


def _sparse_rank(value: int, width_in: int, width_out: int) -> int:
    return min(value, width_in * width_out // (width_in + width_out))


def _shard(value: int, width_in: int, _out: int) -> int:
    return min(value, width_in)


def _rank(value: int, width_in: int, width_out: int) -> int:
    if value > min(width_in, width_out):
        raise UserError(f"r={value} is above the rank of a layer of {width_in} x {width_out}; lower it")
    return value


def _half_rank(value: int, width_in: int, width_out: int) -> int:
    return _rank(2 * value, width_in, width_out) // 2  # A and B start from two sets of r singular vectors


def _pairs_of_reflections(value: int, _in: int, _out: int) -> int:
    if value % 2:
        raise UserError(f"r={value} must be even: only pairs of equal reflections start as the identity")
    return value


_LORA: Mapping[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
TUNERS: Mapping[str, Tuner] = {
    "lora": Tuner("LoraConfig", _LORA),
    "dora": Tuner("LoraConfig", _LORA, {"use_dora": True}),
    "rslora": Tuner("LoraConfig", _LORA, {"use_rslora": True}),
    # "pissa", PEFT's default, takes whole SVDs: a minute for ViT-B; 16 power iterations come close in a second
    "pissa": Tuner("LoraConfig", {**_LORA, "init_lora_weights": "pissa_niter_16"}, limits={"r": _rank}),
    "olora": Tuner("LoraConfig", _LORA, {"init_lora_weights": "olora"}, {"r": _rank}),
    # PEFT's rho is 2: ranks move between layers, and tensors have rows to spare; 1 gives every layer r
    "eva": Tuner("LoraConfig", {**_LORA, "rho": 1.0}, limits={"r": _rank}),
    "corda": Tuner("LoraConfig", {**_LORA, "corda_method": "ipm"}, limits={"r": _rank}),
    "lora_ga": Tuner(
        "LoraConfig", {**_LORA, "direction": "ArB2r", "scale": "stable", "stable_gamma": 16}, limits={"r": _half_rank}
    ),
    "adalora": Tuner(
        "AdaLoraConfig",
        {
            "init_r": 12,
            "target_r": 8,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": 1,
            "beta1": 0.85,
            "beta2": 0.85,
            "orth_reg_weight": 0.5,
        },
    ),
    "vera": Tuner(
        "VeraConfig",
        {"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "projection_prng_key": 0},
        {"save_projection": False},  # drawn again from the key: the file holds two vectors per layer
        shared=True,
    ),
    "randlora": Tuner(
        "RandLoraConfig",
        {
            "r": 32,
            "randlora_alpha": 640,
            "randlora_dropout": 0.0,
            "sparse": False,
            "very_sparse": False,
            "projection_prng_key": 0,
        },
        {"save_projection": False},
        shared=True,
    ),
    "loha": Tuner("LoHaConfig", {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0}),
    "lokr": Tuner(
        "LoKrConfig",
        {
            "r": 8,
            "alpha": 8,
            "decompose_both": False,
            "decompose_factor": -1,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
        },
    ),
    "oft": Tuner(
        "OFTConfig",
        {
            "oft_block_size": 32,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
            "module_dropout": 0.0,
        },
        limits={"oft_block_size": _input_blocks},
    ),
    "boft": Tuner("BOFTConfig", {"boft_block_size": 4}, limits={"boft_block_size": _input_blocks}),
    "hra": Tuner("HRAConfig", {"r": 8}, limits={"r": _pairs_of_reflections}),
    "fourierft": Tuner(
        "FourierFTConfig",
        {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        {"init_weights": True},  # zeros; PEFT's default draws the spectrum and is not the identity
        {"n_frequency": _entries},
    ),
    "waveft": Tuner(
        "WaveFTConfig",
        {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "random_loc_seed": 777},
        limits={"n_frequency": _entries},
    ),
    # without a seed PEFT draws other entries for every object, and its file must hold them
    "shira": Tuner("ShiraConfig", {"r": 32, "random_seed": 0}, limits={"r": _sparse_rank}),
    "miss": Tuner("MissConfig", {"r": 64, "miss_dropout": 0.0}, limits={"r": _shard}),
    "c3a": Tuner(
        "C3AConfig",
        {"block_size": 256},
        {"init_weights": True},  # zeros; PEFT's default (Xavier) is not the identity
        {"block_size": _square_blocks},
    ),
    "road": Tuner("RoadConfig", {"variant": "road_1", "group_size": 64}, limits={"group_size": _output_pairs}),
    # the paper scales keys, values and the MLP's hidden units: the outputs of qkv, the inputs of fc2
    "ia3": Tuner("IA3Config", {"feedforward_modules": ["fc2"]}, roles=("qkv", "fc2")),
    "ln_tuning": Tuner("LNTuningConfig", {}, roles=("norm1", "norm2")),
}


def known(name: str) -> Tuner:
    """The tuner of a name; raises UserError with the names that there are."""
    if name not in TUNERS:
        raise UserError(f"peft: unknown tuner={name!r}; known: {', '.join(TUNERS)}")
    return TUNERS[name]


def filled(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a tuner, given ones before defaults; raises UserError for an unknown one, or of another kind."""
    defaults = known(name).options
    for key, value in options.items():
        if key not in defaults:
            raise UserError(f"{name} has no option {key!r}; it has: {', '.join(defaults) or 'none'}")
        kind = type(defaults[key])
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{name}: {key}={value!r} must be of the kind of {defaults[key]!r}")
    return {**defaults, **options}


def fitted(name: str, options: Mapping[str, Any], width_in: int, width_out: int) -> dict[str, Any]:
    """The options as a layer's widths allow them: block sizes, ranks and counts are the largest up to what was set."""
    limits = known(name).limits
    try:
        return {k: limits[k](v, width_in, width_out) if k in limits else v for k, v in options.items()}
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
