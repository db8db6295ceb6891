"""Prompts as they are written on the command line and in files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vfmadapt.errors import UserError
from vfmadapt.frames import Clip, ClipInfo
from vfmadapt.frames.labelled import label_map, open_masks
from vfmadapt.tracking.prompts import Prompt, read_prompt

_LISTS = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Asked:
    """Prompts, and the names of their objects by label: the label itself where none was given."""

    prompts: tuple[Prompt, ...]
    names: Mapping[int, str]


def read_prompts(
    given: str | Sequence[Any], info: ClipInfo | None = None, reader: Mapping[str, Any] | None = None
) -> Asked:
    """Prompts from a list of entries, from a YAML or JSON file of such a list, or from a file of masks.

    An entry is a mapping with `frame` (from 0), `object`, a label from 1 or a name (default 1), and one of `points`
    [[x, y], ...] with `labels` (1 on the object, 0 off it, by default 1), `box` [x0, y0, x1, y1], both of these, or
    `mask`, the path of an image or of a clip of masks. Of a mask file with several labels each is an object of its own,
    unless the entry names one: then all that is not 0 belongs to it. Without `frame`, a clip of masks gives each label
    in the frame in which it is largest; an image belongs to frame 0. Paths in a file are relative to its folder.

    Args:
        given: those.
        info: of the clip that they are for: masks are laid onto its frames, see `open_masks`.
        reader: options that it was read with.

    Raises:
        UserError: no such file, not such a list, an empty mask, masks that are not for this clip, an object twice in
            one frame, and as `Prompt` does.
    """
    entries, folder = _entries(given)
    names = _numbered([entry.get("object", 1) for entry in entries])
    labels = {name: label for label, name in names.items()}
    prompts: list[Prompt] = []
    for entry in entries:
        known = {**entry, "object": labels.get(entry["object"], entry["object"])} if "object" in entry else entry
        if isinstance(entry.get("mask"), str):
            masks = open_masks(folder / Path(entry["mask"]).expanduser(), info, reader)
            with masks:
                prompts += _of_masks(masks, known)
        else:
            prompts.append(read_prompt(known))
    called = {p.object: names.get(p.object, str(p.object)) for p in prompts}
    asked: set[tuple[int, int]] = set()
    for prompt in prompts:
        if (place := (prompt.frame, prompt.object)) in asked:
            raise UserError(
                f"prompt: object {called[prompt.object]} is prompted twice in frame {prompt.frame}; give all "
                "points and the box in one entry"
            )
        asked.add(place)
    return Asked(tuple(prompts), called)


def _entries(given: str | Sequence[Any]) -> tuple[list[Mapping[str, Any]], Path]:
    """The entries, and the folder that their paths begin in."""
    folder, listed = Path(), given
    if isinstance(given, str):
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(
                f"prompt={given}: no such file; write prompt=[{{frame: 0, box: [x0, y0, x1, y1]}}], or a file of such "
                "a list (YAML, JSON), or one of masks"
            )
        if path.suffix.lower() not in _LISTS:
            return [{"mask": given}], folder
        folder, listed = path.parent, _parsed(path)
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, Sequence) else []
    if not entries or len(entries) < len(listed):
        raise UserError(f"prompt={given}: wanted is a list of entries such as {{frame: 0, box: [x0, y0, x1, y1]}}")
    for entry in entries:
        if not isinstance(entry.get("object", 1), int | str) or not isinstance(entry.get("frame", 0), int):
            raise UserError(f"prompt: {dict(entry)}: a frame is a whole number, an object a label from 1 or a name")
    return entries, folder


def _parsed(path: Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.load(path))  # JSON is YAML
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"prompt={path} cannot be read ({str(error).splitlines()[0]})") from error


def _numbered(objects: Sequence[Any]) -> dict[int, str]:
    """Labels for the names among `objects`: the least that are free, in the order of the names."""
    taken = {o for o in objects if isinstance(o, int)}
    names = dict.fromkeys(o for o in objects if isinstance(o, str))
    free = (label for label in range(1, len(objects) + len(taken) + 1) if label not in taken)
    return dict(zip(free, names, strict=False))


def _of_masks(masks: Clip, entry: Mapping[str, Any]) -> Iterator[Prompt]:
    """The prompts of a mask file: one for each label, or for the object that the entry names."""
    frames = [int(entry["frame"])] if "frame" in entry and len(masks) > 1 else range(len(masks))
    best: dict[int, tuple[int, int]] = {}  # label -> pixels, frame of the file
    for index in frames:
        labels = label_map(masks, index)
        labels = np.where(labels > 0, entry["object"], 0) if "object" in entry else labels
        for label, pixels in zip(*np.unique(labels[labels > 0], return_counts=True), strict=True):
            best[int(label)] = max(best.get(int(label), (0, 0)), (int(pixels), index), key=lambda b: b[0])
    if not best:
        raise UserError(f"prompt: {masks.info.path} holds no object there, only 0; give a mask with the object in it")
    for label, (_, index) in sorted(best.items()):
        shown = label_map(masks, index) > 0 if "object" in entry else label_map(masks, index) == label
        at = int(entry.get("frame", index))
        yield read_prompt({**entry, "frame": at, "object": label, "mask": shown})
