from .agent import (
    Agent as Agent,
)
from .fork_server import (
    WorkerMain as WorkerMain,
)
from .lighthouse_process import (
    detached_lighthouse as detached_lighthouse,
)
from .settings import (
    AgentSettings as AgentSettings,
)
