from .document_reading import documents_in as documents_in
from .documents import list_documents as list_documents
from .megatron import (
    megatron_stream as megatron_stream,
    token_count as token_count,
)
from .prepare import prepare as prepare
from .stream import (
    DocumentStarts as DocumentStarts,
    TokenStream as TokenStream,
)
from .text import (
    known_text as known_text,
    text_stream as text_stream,
)
from .tokenizer import (
    FileTokenizer as FileTokenizer,
    corpus_notes as corpus_notes,
    exported_tokenizer as exported_tokenizer,
    load_tokenizer as load_tokenizer,
)
