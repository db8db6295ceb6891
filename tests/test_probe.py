"""Linear probes: the table, that it is continued, and bad input."""

import csv
import json

import numpy as np
import pytest

from vfmadapt import train
from vfmadapt.build import compose
from vfmadapt.errors import UserError
from vfmadapt.probe import as_markdown, main, summary


def config(tmp_path, *more):
    given = ["tasks=[clouds,maps]", "+checkpoints.after=w@.pt", "seeds=[0,1]", f"output={tmp_path}"]
    return compose("probe", [*given, *more])


@pytest.fixture
def trained(monkeypatch):
    """The configs that were trained, one metric for each."""
    seen = []

    def fake(cfg):
        seen.append(cfg)
        return {"miou": 0.5 + 0.1 * bool(cfg.backbone.weights) + 0.01 * cfg.seed, "accuracy": 0.9}

    monkeypatch.setattr(train, "main", fake)
    return seen


def test_each_checkpoint_task_and_seed_once(trained, tmp_path):
    result = main(config(tmp_path))
    assert len(trained) == 8
    assert {(c.task.name, c.seed, c.backbone.weights) for c in trained} == {
        (task, seed, weights) for task in ("cloudseg", "maps") for seed in (0, 1) for weights in (None, f"w{seed}.pt")
    }
    assert all(c.adapter._target_.endswith("Frozen") and c.head._target_.endswith("LinearHead") for c in trained)
    assert json.loads(json.dumps(result))["table"]["maps"]["after"]["mean"] == pytest.approx(0.605)
    assert result["table"]["maps"]["after"]["deviation"] == pytest.approx(np.std([0.6, 0.61], ddof=1))
    with (tmp_path / "probe.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert "| after | 0.6050 ± 0.0071 | 0.6050 ± 0.0071 |" in (tmp_path / "probe.md").read_text()


def test_what_stands_there_is_not_trained_again(trained, tmp_path):
    main(config(tmp_path))
    main(config(tmp_path, "+checkpoints.third=other.pt"))
    assert len(trained) == 12
    main(config(tmp_path, "steps=7"))  # another measure: all anew
    assert len(trained) == 20


def test_random_weights_and_a_metric_for_each_task(trained, tmp_path):
    result = main(config(tmp_path, "checkpoints.before=random", "+metrics.clouds=accuracy"))
    assert [c.backbone.pretrained for c in trained] == [False, False, True, True] * 2
    assert result["table"]["clouds"]["before"]["mean"] == 0.9


def test_one_seed_has_no_deviation():
    rows = [{"task": "t", "checkpoint": "c", "seed": "0", "value": "0.25"}]
    table = summary(rows, ["c"], ["t"])
    assert table == {"t": {"c": {"mean": 0.25, "deviation": None, "seeds": 1}}}
    assert as_markdown(table).endswith("| c | 0.2500 |\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("seeds=[]", "give at least one of each"),
        ("tasks=[]", "give at least one of each"),
        ("tasks=[zebras]", "there is no zebras among probes, which has clouds, rooms, maps, radar"),
        ("metric=horses", "metric=horses: task clouds gives miou, accuracy"),
        ("+metrics.clouds=horses", "metric=horses: task clouds gives"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        main(config(tmp_path, more))
    assert "\n" not in str(error.value)
