from .bigram import bigram_loss as bigram_loss
from .corpora import (
    corpus_notes as corpus_notes,
    documents_in as documents_in,
    exported_tokenizer as exported_tokenizer,
    prepare as prepare,
)
from .coverage import (
    Coverage as Coverage,
    coverage_of as coverage_of,
    known_coverage as known_coverage,
)
from .dataset import (
    Dataset as Dataset,
)
from .described import (
    described_sample as described_sample,
)
from .opening import (
    DataConfig as DataConfig,
    open_dataset as open_dataset,
    open_samples as open_samples,
    split_tokens as split_tokens,
)
from .synthetic import markov_samples as markov_samples
