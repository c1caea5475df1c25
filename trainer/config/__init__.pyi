from .changes import (
    EVERY_CHANGE as EVERY_CHANGE,
    advice_to_allow as advice_to_allow,
    allowed_changes as allowed_changes,
    refused_changes as refused_changes,
)
from .data_section import (
    HELD_OUT as HELD_OUT,
    DataConfig as DataConfig,
    Removal as Removal,
    check_data_config as check_data_config,
    lacking_removals as lacking_removals,
    removed_before as removed_before,
    validation_data as validation_data,
    validation_names as validation_names,
)
from .flat import (
    flat_keys as flat_keys,
)
from .installation import (
    require_elastic as require_elastic,
)
from .loading import (
    check_config as check_config,
    convert_config as convert_config,
    dump_toml as dump_toml,
    load_config as load_config,
    removals_of as removals_of,
    with_removals as with_removals,
)
from .memory import machine_memory_bytes as machine_memory_bytes
from .optimizer_section import OptimizerConfig as OptimizerConfig
from .places import (
    anchored as anchored,
)
from .rules import config_notes as config_notes
from .sections import (
    ChaosConfig as ChaosConfig,
    ElasticConfig as ElasticConfig,
    NumericsConfig as NumericsConfig,
    RunConfig as RunConfig,
    TrainConfig as TrainConfig,
)
from .suggestions import known_keys as known_keys
from .vocabulary import too_few_ids as too_few_ids
