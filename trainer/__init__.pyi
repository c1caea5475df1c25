from .external_launcher import (
    run_external_worker as run_external_worker,
)
from .loop import (
    train as train,
)
from .worker import (
    connect as connect,
    describe as describe,
    meet as meet,
    root_cause as root_cause,
    run_elastic_worker as run_elastic_worker,
    run_worker as run_worker,
)
