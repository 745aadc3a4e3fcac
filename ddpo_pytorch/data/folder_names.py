"""Captions as names of folders: `images/<folder>/` of a sample folder."""

import hashlib
import re

LONGEST = 255  # bytes of a file name on common file systems
_HASH_DIGITS = 16


def folder_name(caption: str) -> str:
    """Return the folder of a caption's images: a function of the caption alone, different for different captions.

    Spaces become underscores, as in the official code. What that rule or a file system cannot keep apart is written as
    % and hex digits of its UTF-8 bytes: "_", "/", "\\", unprintable characters, a dot in front, and a "%" that reads as
    such an escape. `urllib.parse.unquote(name.replace("_", " "))` gives the caption back. A name beyond 255 bytes, and
    that of the empty caption, ends in %FF, which no escape contains, and a hash of the caption; image_log.json maps it.
    """
    pieces = [_escaped(caption, place) for place in range(len(caption))]
    name = "".join(pieces)
    if name and len(name.encode()) <= LONGEST:
        return name
    ending = "%FF" + hashlib.sha256(caption.encode(errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]
    head, room = "", LONGEST - len(ending)
    for piece in pieces:
        if (room := room - len(piece.encode())) < 0:
            break
        head += piece
    return head + ending


def _escaped(caption: str, place: int) -> str:
    character = caption[place]
    if character == " ":
        return "_"
    unsafe = character in "_/\\" or not character.isprintable() or (character == "." and place == 0)
    if unsafe or (character == "%" and re.match("[0-9A-Fa-f]{2}", caption[place + 1 : place + 3])):
        return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
    return character
