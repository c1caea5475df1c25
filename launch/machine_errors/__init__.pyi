from .error_watch import (
    ErrorWatch as ErrorWatch,
)
from .gpus import (
    gpu_states as gpu_states,
)
from .kinds import (
    MachineError as MachineError,
)
from .roots import (
    MachineRoots as MachineRoots,
)
