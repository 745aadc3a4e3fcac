"""Characters that nobody sees in a prompt, but a tokenizer does."""

import unicodedata

# control and format characters, halves of UTF-16 pairs, and separators, of which only the plain space is seen
_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
# printable, but without a shape of their own: joiners, fillers, variation selectors, the blank Braille pattern
_OTHERS = frozenset(
    chr(code)
    for low, high in (
        *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164)),
        *((0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF)),
    )
    for code in range(low, high + 1)
)
_CONTROL_NAMES = {"\0": "NUL", "\t": "tab", "\n": "line feed", "\r": "carriage return"}


def invisible_character(text: str) -> str | None:
    """Return which character of a text is invisible and what to do about it, to follow the text; None if all are seen.

    Invisible are tabs, line breaks, NUL, byte-order marks, zero-width joiners and the like, and spaces other than the
    plain one.
    """
    for place, character in enumerate(text, start=1):
        unseen = character in _OTHERS or unicodedata.category(character) in _CATEGORIES
        if unseen and character != " ":
            name = unicodedata.name(character, _CONTROL_NAMES.get(character, "a control character"))
            return (
                f"has the invisible character U+{ord(character):04X} ({name}) at position {place}; delete it, or type "
                "a plain space in its place"
            )
    return None
