from .loop import (
    train_elastic_worker as train_elastic_worker,
)
