from .attention import Work as Work
from .logits import Note as Note
from .operators import ContextParallel as ContextParallel
