"""How hard a data set is: class shares, and what a brightness threshold and a per-pixel classifier reach on it."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import DataSource, DataSpec, Samples, UserError
from vfmadapt.metrics import confusion_matrix

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

_BINS = 2048  # of brightness, for the search of a threshold


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Shares of the classes and the scores of the baselines, and of a model where `adapter_file` names one.

    Of data with values what `vfmadapt.check_values.check_values` gives; models of these are for the tool `evaluate`.

    Raises:
        UserError: the split is empty, or a foreground class is unknown.
    """
    from vfmadapt.build import data_source

    source = data_source(cfg)
    source.prepare()
    rng = np.random.default_rng(cfg.seed)
    if source.spec.values:
        from vfmadapt.check_values import check_values

        found = check_values(source, cfg.split, (cfg.fit_pixels, cfg.score_pixels), rng)
        log.info("%(data)s, %(value)s in %(unit)s, scored on %(split)s", found)
        log.info("  best constant                    RMSE %.3f", found["constant"])
        log.info("  gradient boosting per pixel      RMSE %.3f", found["per_pixel"])
        return found
    result = check(source, cfg.split, cfg.foreground, (cfg.fit_pixels, cfg.score_pixels), rng)
    if cfg.adapter_file:
        result["model"] = score_model(cfg.adapter_file, source, cfg.split, result["foreground"], cfg.device)
    for line in _report(result):
        log.info(line)
    return result


def check(
    source: DataSource,
    split: str,
    foreground: Sequence[str] | None,
    pixels: tuple[int, int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Class shares of train and of `split`, and both baselines, fitted on train and scored on `split`.

    Args:
        source: the data, prepared.
        split: what is scored.
        foreground: see `foreground_classes`.
        pixels: how many pixels the classifier is fitted on, and how many it is scored on.
        rng: draws those pixels.
    """
    spec = source.spec
    chosen = foreground_classes(spec, foreground)
    train, scored = source.split("train"), source.split(split)
    if not len(train) or not len(scored):
        raise UserError(
            f"data set {spec.name}: split {'train' if not len(train) else split!r} is empty; nothing to check"
        )
    return {
        "data": spec.name,
        "bands": list(spec.bands),
        "split": split,
        "foreground": [spec.classes[k].name for k in chosen],
        "shares": {"train": class_shares(train, spec), split: class_shares(scored, spec)},
        "threshold": threshold_baseline(train, scored, spec, chosen),
        "per_pixel": classifier_baseline(train, scored, spec, chosen, pixels, rng),
    }


def foreground_classes(spec: DataSpec, wanted: Sequence[str] | None) -> list[int]:
    """Labels of the foreground classes: the named ones, else those with "cloud", else all but the first."""
    names = [c.name for c in spec.classes]
    if wanted is not None:
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UserError(f"foreground: {spec.name} has no class {unknown[0]!r}; it has: {', '.join(names)}")
        return [names.index(name) for name in wanted]
    return [k for k, name in enumerate(names) if "cloud" in name] or list(range(1, len(names)))


def class_shares(samples: Samples, spec: DataSpec) -> dict[str, float]:
    """Share of each class among the labelled pixels; "ignored" is the share of valid pixels without a label."""
    counts, valid = np.zeros(len(spec.classes), dtype=np.int64), 0
    for pixels, labels in _labelled(samples, spec, only_labelled=False):
        known = labels[labels != spec.ignore_index]
        counts += np.bincount(known, minlength=len(spec.classes))
        valid += pixels.shape[1]
    shares = {c.name: float(n) / max(int(counts.sum()), 1) for c, n in zip(spec.classes, counts, strict=True)}
    return {**shares, "ignored": 1 - float(counts.sum()) / max(valid, 1)}


def _labelled(
    samples: Samples, spec: DataSpec, *, only_labelled: bool = True
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Of each image the valid (and labelled) pixels: (C, n) values and (n,) labels."""
    for index in range(len(samples)):
        sample = samples[index]
        keep = sample["valid"].numpy()
        if only_labelled:
            keep = keep & (sample["mask"].numpy() != spec.ignore_index)
        yield sample["image"].numpy()[:, keep], sample["mask"].numpy()[keep]


def _brightness(pixels: NDArray[np.float32], spec: DataSpec) -> NDArray[np.float32]:
    """Mean of red, green and blue where the data has them, else of all bands."""
    visible = [i for i, band in enumerate(spec.bands) if band in ("red", "green", "blue")]
    return np.asarray(pixels[visible or slice(None)].mean(axis=0))


def _histograms(
    samples: Samples, spec: DataSpec, foreground: Sequence[int], span: tuple[float, float]
) -> NDArray[np.int64]:
    """Counts (2, bins) of brightness: background, foreground."""
    counts = np.zeros((2, _BINS), dtype=np.int64)
    for pixels, labels in _labelled(samples, spec):
        place = (_brightness(pixels, spec) - span[0]) / (span[1] - span[0]) * _BINS
        bins = np.clip(place, 0, _BINS - 1).astype(np.int64)
        inside = np.isin(labels, foreground)
        counts[0] += np.bincount(bins[~inside], minlength=_BINS)
        counts[1] += np.bincount(bins[inside], minlength=_BINS)
    return counts


def _ious_above(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """IoU (bins,) of the foreground for "brightness in bin t or above"."""
    false, true = (np.cumsum(row[::-1])[::-1] for row in counts)
    return np.asarray(true / np.maximum(counts[1].sum() + false, 1))


def threshold_baseline(train: Samples, scored: Samples, spec: DataSpec, foreground: Sequence[int]) -> dict[str, Any]:
    """The best threshold on brightness, of either side, fitted on train: its IoU of the foreground on both splits."""
    spread = [np.quantile(_brightness(p, spec), (0.001, 0.999)) for p, _ in _labelled(train, spec) if p.shape[1]]
    span = (float(min(s[0] for s in spread)), float(max(s[1] for s in spread)) + 1e-6)
    counts = _histograms(train, spec, foreground, span)
    other = _histograms(scored, spec, foreground, span)
    best: dict[str, Any] = {"train_iou": -1.0}
    for side, order in (("above", slice(None)), ("below", slice(None, None, -1))):
        ious = _ious_above(counts[:, order])
        at = int(ious.argmax())
        if ious[at] > best["train_iou"]:
            edge = at if side == "above" else _BINS - at
            value = span[0] + edge / _BINS * (span[1] - span[0])
            scored_iou = float(_ious_above(other[:, order])[at])
            best = {"side": side, "value": value, "train_iou": float(ious[at]), "iou": scored_iou}
    return {**best, "iou_of_all_foreground": float(_ious_above(other)[0])}


def classifier_baseline(
    train: Samples,
    scored: Samples,
    spec: DataSpec,
    foreground: Sequence[int],
    pixels: tuple[int, int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """scikit-learn's HistGradientBoostingClassifier on single pixels, as many of each image."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    values, labels = _drawn(train, spec, pixels[0], rng)
    model = HistGradientBoostingClassifier(random_state=int(rng.integers(2**31)))
    model.fit(values, labels)
    values, labels = _drawn(scored, spec, pixels[1], rng)
    predicted = model.predict(values)
    matrix = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(labels), len(spec.classes))
    return _scores(matrix.numpy(), spec, foreground)


def _drawn(
    samples: Samples, spec: DataSpec, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """About `count` labelled pixels, as many of each image: (n, C) values and (n,) labels."""
    each = max(1, count // len(samples))
    values, labels = [], []
    for pixels, truth in _labelled(samples, spec):
        take = rng.choice(truth.size, min(each, truth.size), replace=False)
        values.append(pixels[:, take].T)
        labels.append(truth[take])
    return np.concatenate(values), np.concatenate(labels)


def _scores(matrix: NDArray[np.int64], spec: DataSpec, foreground: Sequence[int]) -> dict[str, Any]:
    """Scores of a confusion matrix (row truth, column prediction); a class that occurs nowhere has no IoU."""
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    ious = {c.name: float(matrix[k, k] / union[k]) for k, c in enumerate(spec.classes) if union[k]}
    chosen = np.isin(np.arange(len(matrix)), foreground)
    both = matrix[np.ix_(chosen, chosen)].sum()
    either = both + matrix[np.ix_(chosen, ~chosen)].sum() + matrix[np.ix_(~chosen, chosen)].sum()
    return {"miou": sum(ious.values()) / max(len(ious), 1), "iou": float(both / max(either, 1)), "iou_by_class": ious}


def score_model(path: str, source: DataSource, split: str, foreground: Sequence[str], device: str) -> dict[str, Any]:
    """The same scores for the model of an adapter file, over every labelled pixel of the split.

    Raises:
        UserError: the model's classes or bands are not those of the data.
    """
    from vfmadapt.checkpoint import load
    from vfmadapt.device import choose_device

    spec = source.spec
    where = torch.device(choose_device(device))
    model = load(path).to(where).eval()
    for what, theirs, ours in (
        ("classes", len(model.spec.classes), len(spec.classes)),
        ("bands", model.spec.bands, spec.bands),
    ):
        if theirs != ours:
            raise UserError(
                f"{path}: the model has {what} {theirs}, data set {spec.name} has {ours}; choose matching ones"
            )
    matrix = torch.zeros(len(spec.classes), len(spec.classes), dtype=torch.int64)
    samples = source.split(split)
    for index in range(len(samples)):
        sample = samples[index]
        with torch.inference_mode():
            logits = model(sample["image"][None].to(where), sample["valid"][None].to(where))
        matrix += confusion_matrix(
            logits.argmax(1)[0].cpu(), sample["mask"], len(spec.classes), ignore_index=spec.ignore_index
        )
    return _scores(matrix.numpy(), spec, foreground_classes(spec, foreground))


def _report(result: dict[str, Any]) -> Iterator[str]:
    bands, foreground = ", ".join(result["bands"]), ", ".join(result["foreground"])
    yield f"{result['data']} ({bands}), scored on {result['split']}; foreground: {foreground}"
    for split, shares in result["shares"].items():
        yield f"  shares of {split:<6}" + "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
    best = result["threshold"]
    yield f"  foreground everywhere            IoU {best['iou_of_all_foreground']:.3f}"
    rule = f"brightness {best['side']} {best['value']:.3f}"
    yield f"  {rule:<33}IoU {best['iou']:.3f} (train {best['train_iou']:.3f})"
    for name, key in (("gradient boosting per pixel", "per_pixel"), ("model", "model")):
        if key in result:
            classes = "  ".join(f"{c} {iou:.3f}" for c, iou in result[key]["iou_by_class"].items())
            yield f"  {name:<33}IoU {result[key]['iou']:.3f}  mIoU {result[key]['miou']:.3f}  ({classes})"
