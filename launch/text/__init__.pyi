from .generation import (
    GeneratedText as GeneratedText,
    Prompt as Prompt,
    encode_prompts as encode_prompts,
    generate as generate,
)
from .held_out import (
    held_out_config as held_out_config,
    held_out_scores as held_out_scores,
    load_like_run as load_like_run,
)
from .opening import (
    ModelDescription as ModelDescription,
    choose_device as choose_device,
    describe_model as describe_model,
    load_model as load_model,
    text_form as text_form,
)
from .sampling import Sampling as Sampling
from .scoring import (
    Score as Score,
    text_score as text_score,
)
from .tasks import (
    TaskRequest as TaskRequest,
    task_scores as task_scores,
)
