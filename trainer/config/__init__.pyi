from .data_section import (
    DataConfig as DataConfig,
    check_data_config as check_data_config,
)
from .loading import (
    check_config as check_config,
    dump_toml as dump_toml,
    load_config as load_config,
)
from .model_section import (
    ModelConfig as ModelConfig,
)
from .sections import (
    ChaosConfig as ChaosConfig,
    RunConfig as RunConfig,
)
