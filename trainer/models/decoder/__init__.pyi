from .family import (
    decoder_family as decoder_family,
)
from .huggingface import (
    WINDOW_KEYS as WINDOW_KEYS,
    Described as Described,
    window_from_json as window_from_json,
    window_to_json as window_to_json,
    windows_from_json as windows_from_json,
    windows_to_json as windows_to_json,
)
from .section import (
    DecoderConfig as DecoderConfig,
    Design as Design,
    ExpertConfig as ExpertConfig,
    ExpertDesign as ExpertDesign,
    LatentDesign as LatentDesign,
    LayeredWindowConfig as LayeredWindowConfig,
    LearnedPositionsConfig as LearnedPositionsConfig,
    MultiTokenDesign as MultiTokenDesign,
    RouterDesign as RouterDesign,
    WindowedConfig as WindowedConfig,
)
