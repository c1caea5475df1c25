from .loop import (
    train_elastic_worker as train_elastic_worker,
)
from .testimony import (
    leave_failure as leave_failure,
)
