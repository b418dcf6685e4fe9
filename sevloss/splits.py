"""The three splits, by a hash of the complaint: stateless, and no complaint stands on two sides."""

import hashlib
import unicodedata

SPLITS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))  # upper ends on [0, 1)


class _Normalised(dict):
    """What str.translate puts in place of a character; found once for each that occurs."""

    def __missing__(self, code):
        character = chr(code)
        if unicodedata.combining(character) or character == "\u0640":
            self[code] = None
        else:
            self[code] = character if unicodedata.category(character)[0] in "LN" else " "
        return self[code]


_NORMALISED = _Normalised()


def normalised(complaint):
    """Equal for complaints that differ only in diacritics, tatweel, punctuation, case or white space."""
    return " ".join(unicodedata.normalize("NFKC", complaint).casefold().translate(_NORMALISED).split()) or complaint


def hash_fraction(complaint, salt=""):
    """A number in [0, 1) that depends on the normalised complaint (and `salt`) alone, the same on every machine."""
    digest = hashlib.blake2b((salt + normalised(complaint)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2 ** 64


def complaint_id(complaint):
    """A short name of the normalised complaint."""
    return hashlib.blake2b(normalised(complaint).encode(), digest_size=8).hexdigest()


def split_of(complaint):
    """'train', 'validation' or 'test': 80, 10 and 10 in a hundred. No complaint stands on two sides."""
    position = hash_fraction(complaint)
    return next(name for name, end in SPLITS if position < end)


def split_pairs(pairs):
    """{'train': [...], 'validation': [...], 'test': [...]}"""
    sides = {name: [] for name, _ in SPLITS}
    for pair in pairs:
        sides[split_of(pair.complaint)].append(pair)
    return sides


def sample_pairs(pairs, most):
    """At most `most` of the pairs, the same ones wherever they are chosen, in an order of their own."""
    return sorted(pairs, key=lambda p: hash_fraction(p.complaint, "order"))[:most]
