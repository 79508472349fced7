"""Making and removing servers, as op jobs: a server is no data set. Which server is in the run's configuration; both go on where the last run was ended."""

import dagster as dg

from mail_pipelines.provisioning import store
from mail_pipelines.provisioning.alone import Busy
from mail_pipelines.provisioning.states import State, Step
from mail_pipelines.resources import run_tags
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.provisioning import Provisioning

# A run tries a step again by itself, unless that is later than this: then it is asked for again when it is due.
_LONGEST_WAIT_SECONDS = 120


class ServerByName(dg.Config):
    """A server that is made here, or was."""

    name: str


def _advance(context: dg.OpExecutionContext, name: str, database: CentralDatabase, provisioning: Provisioning) -> store.Provision:
    """Do what can be done now; its place, cost and reason are the metadata of the op."""
    # It loads what asks the DNS, and workers of servers load this module.
    from mail_pipelines.provisioning import making

    if context.run.tags.get(run_tags.SERVER) != name:
        # Started by hand.
        context.instance.add_run_tags(context.run.run_id, run_tags.server(name))
    engine, settings = database.engine, database.settings
    try:
        provision = making.advance(provisioning.parts(engine, settings), name, context.log.info)
    except making.TryAgain as again:
        if again.seconds > _LONGEST_WAIT_SECONDS:
            raise dg.Failure(str(again), allow_retries=False) from again
        # The row counts the attempts.
        raise dg.RetryRequested(max_retries=100, seconds_to_wait=again.seconds) from again
    except Busy as busy:
        raise dg.Failure(str(busy), allow_retries=False) from busy
    context.add_output_metadata({"server": name, "state": provision.state.value, "host source": provision.source or "", "waits for": provision.reason or ""})
    return provision


@dg.op(out=dg.Out(dg.Nothing))
def make_server(context: dg.OpExecutionContext, config: ServerByName, database: CentralDatabase, provisioning: Provisioning) -> None:
    """Take a server from a request to service, or as far as it goes now. Fails with the reason if it could not be made."""
    provision = _advance(context, config.name, database, provisioning)
    if provision.state is State.FAILED and provision.step is Step.NONE:
        raise dg.Failure(f"server {config.name} could not be made, and its parts are removed: {provision.reason}", allow_retries=False)


@dg.job(
    description="Make one server: host, accounts and keys, software, DNS records, verification, service. Started by `mail-pipelines server provision`, or by "
    "capacity_shortage where provisioning.mode is auto.",
    # The row knows where it is: the sensor asks again for what is due.
    tags={"dagster/max_retries": "0", run_tags.MAKING: "server"},
)
def provision_server() -> None:
    make_server()


@dg.op(out=dg.Out(dg.Nothing))
def remove_server(context: dg.OpExecutionContext, config: ServerByName, database: CentralDatabase, provisioning: Provisioning) -> None:
    """Take a server out: what it has in hand it ends, then its accounts, its host and its DNS records go."""
    _advance(context, config.name, database, provisioning)


@dg.job(
    description="Retire one server that was made here and delete its host. Started by `mail-pipelines server remove`.",
    tags={"dagster/max_retries": "0", run_tags.MAKING: "server"},
)
def retire_server() -> None:
    remove_server()
