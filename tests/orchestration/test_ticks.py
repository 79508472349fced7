"""A tick opens nothing that another one has opened: Dagster's instance takes longer to open than most ticks take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg

from mail_pipelines.definitions import build_defs
from mail_pipelines.sensors.ticks import instance_of


def test_all_ticks_of_a_process_share_one_instance(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def ask(_: int) -> dg.DagsterInstance:
            return instance_of(dg.SensorEvaluationContext(instance.get_ref(), None, None, None, None))

        with ThreadPoolExecutor(4) as threads:
            first, *others = threads.map(ask, range(8))
        assert all(other is first for other in others)
        assert first.root_directory == str(tmp_path)


def test_no_sensor_has_dagster_open_a_resource() -> None:
    sensors = build_defs().get_repository_def().sensor_defs
    assert len(sensors) == 10
    assert [sensor.name for sensor in sensors if sensor.required_resource_keys and sensor.name != "failed_runs"] == []
