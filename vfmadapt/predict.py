"""The tool `predict`: an adapter file and a raster in, a georeferenced map and a preview picture out."""

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt._settings import check_arguments
from vfmadapt.build import plain
from vfmadapt.device import choose_device
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vfmadapt.automatic import InstanceMapper, ObjectMapper
    from vfmadapt.contracts import DataSpec
    from vfmadapt.model import AdaptedModel
    from vfmadapt.raster.predict import PredictResult
    from vfmadapt.tasks.windows import WholePicture

log = logging.getLogger(__name__)

_PICTURE = 16384  # pixels along the longer side of a picture that is seen as a whole


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Map `cfg.input` with the model in `cfg.adapter_file`; see conf/predict.yaml for the keys.

    Returns:
        "map", "scores", "polygons" and "preview" (paths, None if not asked for), "pixels_per_class", "shares" (of the
        pixels with data), "values" (least, greatest, mean and deviation of each, of a model that gives values),
        "objects" (how many, of a map of objects) and "objects_per_class", "area_km2" (None without a projected CRS),
        "void" (pixels without data), "size" [height, width] and "seconds"; of several adapter files "maps", all that by
        name; of one part of an array job, "blocks": how many were computed now; of a volume or video what
        `predict_clip` gives, or `predict_value_clip`; "formats": paths of further files of values, by format.

    Raises:
        UserError: as `predict_raster` and `vfmadapt.checkpoint.load` do.
    """
    if cfg.engine == "merge":
        return _merge(cfg)
    if not cfg.input or not cfg.adapter_file:
        missing = "input" if not cfg.input else "adapter_file"
        raise UserError(f"{missing}= is missing; write predict input=scene.tif adapter_file=adapter.safetensors")
    if (cfg.engine == "array") != (cfg.index is not None and cfg.of is not None):
        raise UserError("index= and of= go with engine=array, which needs both, for instance index=0 of=4")
    from vfmadapt.frames.reading import is_clip

    if isinstance(cfg.input, str) and (cfg.reader or is_clip(Path(cfg.input).expanduser())):
        return _clip(cfg)
    from vfmadapt.raster.io import raster_info
    from vfmadapt.raster.mosaic import one_raster

    output = Path(cfg.output or Path("runs") / "predict" / f"{Path(cfg.input).stem}_mask.tif")
    source = one_raster(cfg.input, output)
    raster_info(source)  # before the seconds that a model takes to load

    from vfmadapt.bank import load_many
    from vfmadapt.checkpoint import load

    named = _named(cfg)
    if named is None:
        return _mapped(cfg, _mapper(load(cfg.adapter_file), plain(cfg)["objects"]), source, output)
    if cfg.objects.classes is not None:
        raise UserError("objects.classes= goes with one adapter_file=; leave it out, or map the objects by themselves")
    return _mapped(cfg, load_many(named), source, output)


def _mapper(model: "AdaptedModel", settings: dict[str, Any]) -> "AdaptedModel | ObjectMapper | InstanceMapper":
    """What maps with a model: itself, or objects where it answers prompts or the settings name their classes."""
    from vfmadapt.automatic import InstanceMapper, ObjectMapper
    from vfmadapt.promptable import PromptableModel

    classes = settings.pop("classes")
    if classes is not None:
        given = {name: value for name, value in settings.items() if value is not None}
        names = [c.name for c in model.spec.classes] if classes == "all" else classes
        check_arguments(InstanceMapper, "objects", given)
        return InstanceMapper(model, [names] if isinstance(names, str) else names, **given)
    if isinstance(model, PromptableModel):
        check_arguments(ObjectMapper, "objects", settings)
        return ObjectMapper(model, **settings)
    return model


def _clip(cfg: "DictConfig") -> dict[str, Any]:
    from vfmadapt.checkpoint import data_spec, read_header
    from vfmadapt.predict_clip import predict_clip
    from vfmadapt.predict_values import predict_value_clip

    if cfg.objects.classes is not None:
        raise UserError(f"objects.classes= is for rasters; leave it out for a volume or video such as {cfg.input}")
    data = read_header(cfg.adapter_file)["data"]
    if data is not None and data.get("values"):
        return predict_value_clip(cfg, data_spec(data))
    return predict_clip(cfg)


def _mapped(cfg: "DictConfig", model: Any, source: str, output: Path) -> dict[str, Any]:
    """Map with a model of any kind that a raster can be mapped with: a `Segmenter` or a `Bank`."""
    from vfmadapt.bank import Bank
    from vfmadapt.predict_values import check_formats
    from vfmadapt.raster.predict import RayCluster, Settings, predict_many, predict_part, predict_raster

    check_formats(cfg, getattr(model, "spec", None))
    given = plain(cfg)
    if isinstance(model, Bank):
        if any(spec.relative for spec in model.specs.values()):
            raise UserError("a model of relative depth sees a picture as a whole; give its adapter_file= alone")
    elif model.spec.relative:
        model, given["tile"] = _whole_picture(model, source, cfg.tile)
    run: dict[str, Any] = {"restart": cfg.restart, "progress": True}
    if cfg.engine == "ray":  # which device, the cluster says
        run |= {"cluster": RayCluster(**given["ray"]), "device": None if cfg.device == "auto" else cfg.device}
    else:
        model.to(choose_device(cfg.device))
    settings: dict[str, Any] = {f.name: given[f.name] for f in fields(Settings)}
    if cfg.engine == "array":
        blocks = predict_part(model, source, output, Settings(**settings), index=cfg.index, of=cfg.of, **run)
        log.info(
            "part %d of %d: %d blocks; after all parts the same with engine=merge, output=%s",
            cfg.index,
            cfg.of,
            blocks,
            output,
        )
        return {"blocks": blocks}
    if isinstance(model, Bank):
        results = predict_many(model, source, output, Settings(**settings), **run)
        return {"maps": {name: _shown(cfg, source, model.specs[name], result) for name, result in results.items()}}
    return _shown(cfg, source, model.spec, predict_raster(model, source, output, **settings, **run))


def _whole_picture(model: "AdaptedModel", source: str, side: int) -> "tuple[WholePicture, int]":
    """A model of relative depth that sees the raster as one picture, and the tile that holds it all."""
    from vfmadapt.raster.io import raster_info
    from vfmadapt.tasks.windows import WholePicture

    info = raster_info(source)
    if (longest := max(info.height, info.width)) > _PICTURE:
        raise UserError(
            f"{source} has {info.height} x {info.width} pixels; relative depth is of a picture as a whole, at most "
            f"{_PICTURE} pixels a side: shrink it first"
        )
    return WholePicture(model, (info.height, info.width), side), longest


def _merge(cfg: "DictConfig") -> dict[str, Any]:
    from vfmadapt.raster.predict import merge_parts, output_of

    if not cfg.output:
        raise UserError("output= is missing; write predict engine=merge output=NAME.tif, as the parts did")
    if (named := _named(cfg)) is None:
        return _told(merge_parts(cfg.output, polygons=cfg.polygons), None)
    outputs = {name: output_of(Path(cfg.output), name) for name in named}
    return {"maps": {name: _told(merge_parts(path, polygons=cfg.polygons), None) for name, path in outputs.items()}}


def _named(cfg: "DictConfig") -> dict[str, str] | None:
    """Several adapter files by name: the file's stem, or its folder's where stems are equal; None for one file."""
    files = plain(cfg)["adapter_file"]
    if not isinstance(files, list):
        return None
    stems = [Path(file).stem for file in files]
    if len(set(stems)) < len(files):
        stems = [Path(file).resolve().parent.name for file in files]
    if len(set(stems)) < len(files):
        raise UserError(f"adapter_file={files}: files and folders have the same names, so would the maps; rename one")
    return {stem.replace(".", "_"): file for stem, file in zip(stems, files, strict=True)}


def _shown(cfg: "DictConfig", source: str, spec: "DataSpec", result: "PredictResult") -> dict[str, Any]:
    """Told, with a picture and other formats where asked for."""
    from vfmadapt.predict_values import write_formats

    told = _told(result, _preview(cfg, source, spec, result) if cfg.preview else None)
    return told | {"formats": write_formats(cfg, source, result.path, spec)}


def _preview(cfg: "DictConfig", source: str, spec: "DataSpec", result: "PredictResult") -> Path:
    from vfmadapt.raster.io import raster_info
    from vfmadapt.raster.predict import shown_bands
    from vfmadapt.raster.preview import write_preview

    return write_preview(
        source,
        result.path,
        result.path.with_name(f"{result.path.stem}_preview.png"),
        bands=shown_bands(raster_info(source), spec.bands, plain(cfg)["bands"]),
        names=spec.bands,
        classes=spec.classes,
        values=spec.values,
        objects=result.objects,
        shares=result.shares,
        window=plain(cfg)["window"],
    )


def _told(result: "PredictResult", preview: Path | None) -> dict[str, Any]:
    """Log what was made; the same for scripts."""
    for name, share in result.shares.items():
        log.info("  %-16s %6.2f %%", name, 100 * share)
    for name, found in result.values.items():
        log.info("  %-16s %g to %g, mean %g", name, found.least, found.greatest, found.mean)
    if result.objects is not None:
        log.info("  %-16s %d", "objects", result.objects)
    for name, count in result.objects_per_class.items():
        log.info("  %-16s %d", name, count)
    log.info("map: %s", result.path)
    if result.scores is not None:
        log.info("scores: %s", result.scores)
    if result.polygons is not None:
        log.info("polygons: %s", result.polygons)
    if preview is not None:
        log.info("preview: %s", preview)
    return {
        "map": str(result.path),
        "scores": None if result.scores is None else str(result.scores),
        "polygons": None if result.polygons is None else str(result.polygons),
        "preview": None if preview is None else str(preview),
        "pixels_per_class": result.pixels,
        "shares": result.shares,
        "values": {name: asdict(found) for name, found in result.values.items()},
        "objects": result.objects,
        "objects_per_class": result.objects_per_class,
        "area_km2": result.area_km2,
        "void": result.void,
        "size": list(result.size),
        "seconds": result.seconds,
    }
