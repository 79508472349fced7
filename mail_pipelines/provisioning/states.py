"""The life of a server that is made here, as one table: what is done in each state, and where that leads.

What belongs here: which way there is. What does not: what a step does (`steps`, `removal`), and the rows (`store`).

```
requested → provisioning → waiting_dns → verifying → warming | active → draining → retired
        any before active → failed
```

A failed server is not over at once: its half-made parts are removed first, step by step like everything else, and only then it costs nothing any more.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class State(enum.StrEnum):
    REQUESTED = "requested"
    PROVISIONING = "provisioning"
    WAITING_DNS = "waiting_dns"
    VERIFYING = "verifying"
    WARMING = "warming"
    ACTIVE = "active"
    DRAINING = "draining"
    RETIRED = "retired"
    FAILED = "failed"


class Step(enum.StrEnum):
    """What is to be done next."""

    # Choose the source, and the host where that has a list of them; within budget and limits.
    RESERVE = "reserve"
    CREATE = "create"
    # Register the server, and give it accounts and keys.
    EQUIP = "equip"
    PLAY = "play"
    PUBLISH = "publish"
    VERIFY = "verify"
    SERVE = "serve"
    DRAIN = "drain"
    # Wait until nothing is in its hands, and the end of its log is read and shipped.
    SETTLE = "settle"
    REVOKE = "revoke"
    DELETE = "delete"
    # Its DNS records, its account at the broker, its files at the centre.
    CLEAR = "clear"
    NONE = ""


class At(NamedTuple):
    state: State
    step: Step


PATH: dict[At, At] = {
    At(State.REQUESTED, Step.RESERVE): At(State.PROVISIONING, Step.CREATE),
    At(State.PROVISIONING, Step.CREATE): At(State.PROVISIONING, Step.EQUIP),
    At(State.PROVISIONING, Step.EQUIP): At(State.PROVISIONING, Step.PLAY),
    At(State.PROVISIONING, Step.PLAY): At(State.WAITING_DNS, Step.PUBLISH),
    At(State.WAITING_DNS, Step.PUBLISH): At(State.VERIFYING, Step.VERIFY),
    At(State.VERIFYING, Step.VERIFY): At(State.VERIFYING, Step.SERVE),
    # Or to `warming`, until the server is warm.
    At(State.VERIFYING, Step.SERVE): At(State.ACTIVE, Step.NONE),
    At(State.DRAINING, Step.DRAIN): At(State.DRAINING, Step.SETTLE),
    At(State.DRAINING, Step.SETTLE): At(State.DRAINING, Step.REVOKE),
    At(State.DRAINING, Step.REVOKE): At(State.DRAINING, Step.DELETE),
    At(State.DRAINING, Step.DELETE): At(State.DRAINING, Step.CLEAR),
    At(State.DRAINING, Step.CLEAR): At(State.RETIRED, Step.NONE),
    At(State.FAILED, Step.REVOKE): At(State.FAILED, Step.DELETE),
    At(State.FAILED, Step.DELETE): At(State.FAILED, Step.CLEAR),
    At(State.FAILED, Step.CLEAR): At(State.FAILED, Step.NONE),
}
MAKING = frozenset({State.REQUESTED, State.PROVISIONING, State.WAITING_DNS, State.VERIFYING})
IN_SERVICE = frozenset({State.WARMING, State.ACTIVE})
# Where a server goes that cannot be made, and one that is not wanted any more.
FAILS = At(State.FAILED, Step.REVOKE)
RETIRES = At(State.DRAINING, Step.DRAIN)
