"""Batches for the eye: which tokens carry loss, where documents begin, what the model is given besides text."""

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from groundup.data.batches import Batch
from groundup.text.tokenizer import Tokenizer

TARGET_STYLE, CONTEXT_STYLE, CONTROL_STYLE, FRAME_STYLE = "bold green", "dim", "magenta", "cyan"
_SHORTEST_FOLDED_RUN = 4


def render_row(batch: Batch, row: int, tokenizer: Tokenizer) -> Text:
    """One row: a heading, then a block for each stretch with or without loss, marked by colour and by its label.

    `.plain` of the result says the same without colours. Control tokens appear as ⟨name⟩, line ends as ↵, ids without
    text as ⟨id⟩, and the same one many times over once, with its count.
    """
    tokens = [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
    carries_loss = [False, *batch.is_target[row].tolist()]
    if batch.document_ids is None:
        documents = [0] * len(tokens)
    else:
        documents = batch.document_ids[row].tolist()
        documents.append(documents[-1])
    num_targets = sum(carries_loss)
    share = num_targets / (len(tokens) - 1)
    text = Text(f"row {row}: {len(tokens) - 1} tokens, {num_targets} carry loss ({share:.1%})", style=FRAME_STYLE)
    if batch.document_ids is not None:
        text.append(f", {len(set(documents))} documents apart from each other")
    text.append("\n")
    last_document = None
    for (document, is_target), stretch in groupby(range(len(tokens)), lambda i: (documents[i], carries_loss[i])):
        if document != last_document and batch.document_ids is not None:
            text.append(f"document {document}\n", FRAME_STYLE)
        last_document = document
        text.append("  loss | " if is_target else "       | ", FRAME_STYLE)
        style = TARGET_STYLE if is_target else CONTEXT_STYLE
        for piece, is_text in _pieces([tokens[i] for i in stretch], tokenizer):
            text.append(piece, style if is_text else f"{CONTROL_STYLE} {style}")
        text.append("\n")
    return text


def _pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Pieces to print, and whether each is text (or a control token)."""
    names = {token_id: name for name, token_id in tokenizer.control_tokens.items()}
    runs = [(token_id, len(list(run))) for token_id, run in groupby(ids)]
    for is_text, group in groupby(runs, lambda run: run[0] not in names and bool(tokenizer.token_bytes(run[0]))):
        if is_text:
            content = b"".join(tokenizer.token_bytes(token_id) * count for token_id, count in group)
            yield content.decode("utf-8", "replace").replace("\n", "↵\n       | "), True
            continue
        for token_id, count in group:
            name = f"⟨{names.get(token_id, token_id)}⟩"
            yield (f"{name}×{count}" if count >= _SHORTEST_FOLDED_RUN else name * count), False
