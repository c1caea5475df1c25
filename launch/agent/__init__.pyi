from .agent import (
    Agent as Agent,
)
from .fork_server import (
    WorkerMain as WorkerMain,
    die_with as die_with,
)
from .lighthouse_process import (
    kept_lighthouse as kept_lighthouse,
)
from .settings import (
    AgentSettings as AgentSettings,
)
