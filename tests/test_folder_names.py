"""Captions as names of folders: injective, reversible, and as in the official code for ordinary captions."""

import hashlib
import itertools
from urllib.parse import unquote

import numpy as np

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import folder_name

ODD = [
    *("cup/disc ratio 0.6", "x/../../../../escape/x", "/etc/passwd", "C:\\images\\x", ".hidden", ".", "..", ""),
    *("a b", "a_b", "a%5Fb", "a%5fb", "a\tb", "a\nb", "a\0b", "a b ", " a b", "a  b", "A b", "\udc80"),
    *("50% drusen", "50%20drusen", "50%2", "%", "%%2F", "ä/ß", "😀‍/"),
    *("x" * 255, "x" * 256, "ä" * 128, "ä" * 127 + "/", "/" * 86, "y" * 400 + "1", "y" * 400 + "2"),
]


def test_ordinary_captions_name_folders_as_in_the_official_code():
    ordinary = ["Fundus: The left eye shows drusen, 50% of the macula (grade 2).", "a.b", "ä b", "%", "x" * 255]
    for caption in (*CAPTIONS, *ordinary):
        assert folder_name(caption) == caption.replace(" ", "_")


def test_different_captions_name_different_folders():
    names = [folder_name(caption) for caption in ODD]
    assert len(set(names)) == len(ODD)
    for caption, name in zip(ODD, names, strict=True):
        assert 0 < len(name.encode()) <= 255 and name.isprintable()
        assert name[0] != "." and not set("/\\ ") & set(name)
        if "%FF" not in name:
            assert unquote(name.replace("_", " "), errors="surrogatepass") == caption
        else:
            assert len(caption.encode()) > 85 or not caption
            assert name.endswith(hashlib.sha256(caption.encode()).hexdigest()[:16])


def test_names_of_all_short_strings_are_reversible():
    alphabet = ["%", "2", "F", "f", "_", " ", "/", ".", "é"]
    captions = ["".join(letters) for size in range(1, 6) for letters in itertools.product(alphabet, repeat=size)]
    chosen = np.random.default_rng(0).choice(len(captions), 20000, replace=False)
    names = {folder_name(captions[place]): captions[place] for place in chosen}
    assert len(names) == len(chosen)
    assert all(unquote(name.replace("_", " ")) == caption for name, caption in names.items())
