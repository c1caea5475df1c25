from .dataset import (
    Dataset as Dataset,
)
from .opening import (
    DataConfig as DataConfig,
    open_dataset as open_dataset,
)
from .prepare import (
    prepare as prepare,
)
