"""The bytes of each token of a `tokenizer.json`."""

import json
import re
from typing import Any

from groundup.base.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def token_bytes_of(value: dict[str, Any], name: str) -> tuple[list[bytes], bool]:
    """For a parsed tokenizer.json: what each id adds to the text, and whether decoding drops one leading space."""
    decoder = json.dumps(value["decoder"])
    byte_level = '"ByteLevel"' in decoder
    if not byte_level and '"ByteFallback"' not in decoder:
        raise UserError(f"{name}: neither byte-level BPE nor BPE with byte fallback; such a tokenizer is not supported")
    vocab = value["model"]["vocab"]
    added = {token["id"]: token for token in value["added_tokens"]}
    table = [b""] * (max([*vocab.values(), *added]) + 1)
    for token, index in vocab.items():
        table[index] = _from_alphabet(token) if byte_level else _from_piece(token)
    for index, token in added.items():
        table[index] = b"" if token["special"] else token["content"].encode()
    return table, '"Strip"' in decoder


def _from_alphabet(token: str) -> bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def _from_piece(token: str) -> bytes:
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace("\u2581", " ").encode()
