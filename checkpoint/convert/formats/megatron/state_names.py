"""The names of optimizer states in torch_dist folders. Pure.

A name is a prefix, the kind's name and the parameter's; master copies have prefixes of their own.
`mappings/megatron.toml` has the same names, as rules.
"""

from __future__ import annotations

from holdfast.parallel.optimizer import MASTER

STATES = "optimizer.state."
PLAIN_COPY = f"{STATES}fp32_param."
"""The prefix of master copies in the plain optimizer; in the distributed one it is a rule's."""


def key_of_state(kind: str, parameter: str) -> str:
    """The plain optimizer's name for a state or a master copy."""
    return PLAIN_COPY + parameter if kind == MASTER else f"{STATES}{kind}.{parameter}"
