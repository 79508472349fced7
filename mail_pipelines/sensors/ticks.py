"""What a tick needs, at less cost than Dagster's own way to it.

Dagster opens its instance anew for every tick that asks for it, or for a resource, and looks at the schema of each of its storages: that takes longer than most
ticks. So a process that evaluates sensors opens it once, and sensors are given the database by their definition.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster._core.instance.ref import InstanceRef

from mail_pipelines.resources.database import CentralDatabase

# One process evaluates for one instance, several sensors at once.
_opened: list[tuple[InstanceRef, dg.DagsterInstance]] = []
_opening = threading.Lock()
Evaluate = Callable[[dg.SensorEvaluationContext, CentralDatabase], Any]


def instance_of(context: dg.SensorEvaluationContext) -> dg.DagsterInstance:
    """The instance that the sensor is evaluated for."""
    reference = context.instance_ref
    if reference is None:
        # A test gave it.
        return context.instance
    with _opening:
        if not _opened or _opened[0][0] != reference:
            _opened[:] = [(reference, dg.DagsterInstance.from_ref(reference))]
        return _opened[0][1]


def sensor(evaluate: Evaluate, database: CentralDatabase, interval_seconds: int, **options: Any) -> dg.SensorDefinition:
    """The sensor that `evaluate` describes: its name, its docstring, what to ask for now. It runs from the start: nobody has to turn it on."""

    def tick(context: dg.SensorEvaluationContext) -> Any:
        return evaluate(context, database)

    return dg.SensorDefinition(
        name=evaluate.__name__,
        description=inspect.getdoc(evaluate),
        evaluation_fn=tick,
        minimum_interval_seconds=interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        **options,
    )
