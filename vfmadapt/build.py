"""Configs -> objects: the only module that instantiates. The registry is the package's `conf/` folder."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt._settings import check_arguments, check_overrides
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from vfmadapt.contracts import Adapter, BackboneSpec, DataSource, DataSpec, Head
    from vfmadapt.host import AdaptedBackbone
    from vfmadapt.model import AdaptedModel
    from vfmadapt.tracking.model import TrackingModel

MODEL_PACKAGES = ("vfmadapt.adapters.", "vfmadapt.heads.", "vfmadapt.backbones.")
"""Where a `_target_` of a model's config may point: an adapter file must not name any other code."""

TRAINED_COPIES = {"train_patch_embed": "patch_embed", "train_decoder": "decoder"}
"""Settings of a backbone that add a trained copy of its tensors, and the role of these."""


def names(group: str) -> list[str]:
    """Names of the entries of a config group ("adapter", "backbone", "head", "task", "data", "experiment")."""
    folder = resources.files("vfmadapt.conf") / group
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def compose(tool: str, overrides: Sequence[str] = ()) -> "DictConfig":
    """Compose conf/TOOL.yaml with Hydra overrides.

    Raises:
        UserError: an unknown entry, key or a malformed override, with the known ones; a value of the wrong kind.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a tool may compose another's config
    try:
        with initialize_config_module("vfmadapt.conf", version_base="1.3"):
            cfg = hydra_compose(tool, overrides=list(overrides))
            entries = [o for o in overrides if _is_group(o.lstrip("+").split("=", 1)[0])]
            if len(entries) < len(overrides):
                check_overrides(plain(cfg), plain(hydra_compose(tool, overrides=entries)))
            return cfg
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last: GROUP=null
        raise UserError(_explain(error, overrides)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def _is_group(key: str) -> bool:
    return (resources.files("vfmadapt.conf") / key.split("@")[0]).is_dir()


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line for a Hydra error: the override at fault, what is known, the closest."""
    given = [o.lstrip("+~").split("=", 1) for o in overrides if "=" in o]
    for group, value in given:
        if _is_group(group) and value not in ("null", *(known := names(group))):
            close = get_close_matches(value, known, 1)
            return (
                f"{group}={value}: unknown {group}"
                + (f", did you mean {close[0]}?" if close else ";")
                + f" known: {', '.join(known)}"
            )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} (overrides: {' '.join(overrides)}; --help lists the keys)"


def instantiate(node: Any, *args: Any, packages: Sequence[str] = MODEL_PACKAGES, **kwargs: Any) -> Any:
    """Call the `_target_` of a config node with its keys as keyword arguments.

    Raises:
        UserError: a target outside `packages`, or settings that the target does not take.
    """
    from hydra.utils import get_object

    settings = plain(node)
    target = str(settings.pop("_target_", ""))
    settings.pop("_partial_", None)
    if not target.startswith(tuple(packages)):
        raise UserError(
            f"_target_ {target!r} is not allowed here; it must lie in {', '.join(p.rstrip('.') for p in packages)}"
        )
    try:
        made = get_object(target)
    except Exception as error:
        raise UserError(f"_target_ {target!r} cannot be imported: {error}") from error
    check_arguments(made, target.rpartition(".")[2], {**settings, **kwargs})
    return made(*args, **settings, **kwargs)


def data_source(cfg: "DictConfig") -> "DataSource":
    """The data set that `cfg.data` describes; how much of it trains (`data.shots`) is no business of its own."""
    settings = {key: value for key, value in plain(cfg.data).items() if key != "shots"}
    source: DataSource = instantiate(settings, packages=("vfmadapt.datasets.",))
    return source


def adapter(node: Any, backbone: Any) -> "Adapter":
    """The adapter of a config node for a frozen backbone."""
    made: Adapter = instantiate(node, backbone.spec)
    return made


def entry(group: str, name: str) -> dict[str, Any]:
    """An entry of a config group as a plain dict; raises UserError with the known ones."""
    from omegaconf import OmegaConf

    if name not in (known := names(group)):
        close = get_close_matches(name, known, 1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise UserError(f"{group}={name}: unknown {group}{hint} known: {', '.join(known)}")
    node = OmegaConf.create((resources.files("vfmadapt.conf") / group / f"{name}.yaml").read_text())
    return plain(node)


def build_backbone(cfg: Any, adapter_cfg: Any, bands: Sequence[str]) -> "AdaptedBackbone":
    """Frozen backbone of node `cfg` for `bands` with the adapter of node `adapter_cfg`.

    `train_patch_embed` in `cfg` adds a trained copy of the first layer, `train_decoder` one of SAM2's mask decoder.
    """
    from vfmadapt.host import AdaptedBackbone

    config = {"backbone": plain(cfg), "adapter": plain(adapter_cfg)}
    settings = dict(config["backbone"])
    for key in TRAINED_COPIES:
        settings.pop(key, None)
    frozen = instantiate(settings, bands=tuple(bands))
    return AdaptedBackbone(frozen, adapters(config, frozen), config=config)


def adapters(config: Mapping[str, Any], frozen: Any) -> dict[str, "Adapter"]:
    """The adapters of a plain config (nodes `adapter`, `backbone`) for a frozen backbone, by name."""
    made: dict[str, Adapter] = {"main": adapter(config["adapter"], frozen)}
    for key, role in TRAINED_COPIES.items():
        if not config["backbone"].get(key):
            continue
        from vfmadapt.adapters.owned import TrainedTensors

        if getattr(made["main"], "role", None) == "all" and role != "patch_embed":
            continue  # trained already
        if role == "patch_embed" and isinstance(made["main"], TrainedTensors):
            raise UserError(
                f"backbone.{key}=true: {type(made['main']).__name__} trains frozen tensors already; leave it false"
            )
        made[role] = TrainedTensors(frozen.spec, role=role)
    return made


def build_model(cfg: Any, spec: "DataSpec") -> "AdaptedModel":
    """Backbone, adapter and head of `cfg` (nodes `backbone`, `adapter`, `head`) for the data of `spec`.

    A `PromptableModel` where the head answers prompts; a `TrackingModel` where `head` is null: SAM2's video model has
    its own.
    """
    if cfg.get("head") is None:
        return build_tracker(cfg, spec)
    from vfmadapt.contracts import PromptHead
    from vfmadapt.model import AdaptedModel
    from vfmadapt.promptable import PromptableModel

    backbone = build_backbone(cfg["backbone"], cfg["adapter"], spec.bands)
    settings = plain(cfg["head"])
    backbone.config["head"] = {k: v for k, v in settings.items() if k != "weights"}  # an adapter file holds the head
    made = head(settings, backbone.spec, spec)
    if isinstance(made, PromptHead):
        return PromptableModel(backbone, made, spec=spec)
    return AdaptedModel(backbone, made, spec=spec)


def build_tracker(cfg: Any, spec: "DataSpec") -> "TrackingModel":
    """SAM2's video model with the adapter of `cfg` (nodes `backbone`, `adapter`), for frames of the data of `spec`.

    Its frames are red, green and blue from 0 to 1, whatever the data's units.
    """
    from dataclasses import replace

    from vfmadapt.backbones._weights import RGB
    from vfmadapt.tracking.model import TrackingModel

    backbone = build_backbone(cfg["backbone"], cfg["adapter"], RGB)
    return TrackingModel(
        backbone,
        spec=replace(spec, bands=RGB, mean=backbone.spec.mean or (0.0,) * 3, std=backbone.spec.std or (1.0,) * 3),
    )


def head(node: Any, backbone: "BackboneSpec", spec: "DataSpec") -> "Head":
    """The head of a config node for the features of a backbone and the classes, or values, of the data."""
    made: Head = instantiate(node, backbone, num_classes=spec.outputs)
    return made


def plain(node: Any) -> dict[str, Any]:
    """A config node or mapping -> resolved plain dict."""
    from omegaconf import OmegaConf

    made: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(k): v for k, v in made.items()}


def adapt(model: "nn.Module", adapter_name: str | Path, **settings: Any) -> "AdaptedBackbone":
    """Attach an adapter to a timm model of one's own, or attach what was saved from one.

    Args:
        model: a timm ViT built with `dynamic_img_size=True`; it is frozen in place.
        adapter_name: an entry of conf/adapter ("earth"), or a file written by `vfmadapt.save`.
        settings: override the entry's defaults.

    Returns:
        Callable as `adapted(image, layers) -> Features`; `adapted.trainable_parameters()` go to the optimiser.
    """
    from vfmadapt.backbones.timm_models import wrap_timm
    from vfmadapt.checkpoint import read_adapter
    from vfmadapt.host import AdaptedBackbone

    frozen = wrap_timm(model)
    if Path(adapter_name).suffix != ".safetensors":
        node = {**entry("adapter", str(adapter_name)), **settings}
        return AdaptedBackbone(frozen, {"main": adapter(node, frozen)}, config={"adapter": node})
    header, state = read_adapter(adapter_name, frozen.spec)
    adapted = AdaptedBackbone(frozen, {"main": adapter(header["config"]["adapter"], frozen)}, config=header["config"])
    adapted.load_adapter_state(state)
    return adapted
