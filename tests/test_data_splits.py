"""The splits of one day are those of another, and fingerprints see every change."""

from sevloss import data
from sevloss.inputs import tables


def test_hash_is_the_one_that_runs_were_made_with():
    """If these numbers change, test rows of old runs become training rows of new ones."""
    assert data.hash_fraction("عندي صداع") == 0.3482244766780674
    assert data.hash_fraction("عندي صداع", "fold") == 0.14413964754150663
    assert data.hash_fraction("chest pain") == 0.5538705950265981
    assert data.complaint_id("عندي صداع") == "59253d42ffbf65d0"


SAME = ["عندي صداع، منذ يومين؟", "عِنْدِي صُدَاعٌ منذ يومين", "  عندي\nصـــداع   منذ\tيومين!!", "عندي \u200fصداع. منذ يومين…"]


def test_variants_of_a_complaint_stand_on_the_same_side():
    for i in range(200):
        assert len({data.split_of(f"{text} {i}") for text in SAME}) == 1
    assert len({data.complaint_id(text) for text in SAME}) == 1
    assert data.complaint_id("Chest PAIN") == data.complaint_id("chest pain")
    assert data.complaint_id("؟؟") != data.complaint_id("!!")  # nothing but punctuation: taken as it is
    assert data.complaint_id("ألم 3") != data.complaint_id("ألم 4")


def test_sides_are_80_10_10_and_do_not_depend_on_the_table():
    pairs = [tables.Pair(i, f"عندي صداع منذ {i} يوم", "", None, None, "", {}) for i in range(5000)]
    sides = data.split_pairs(pairs)
    assert [round(len(side) / 5000, 1) for side in sides.values()] == [0.8, 0.1, 0.1]
    assert sorted(p.row for side in sides.values() for p in side) == list(range(5000))
    assert [p.row for p in data.split_pairs(pairs[::-7])["test"]] == [p.row for p in pairs[::-7] if p in sides["test"]]


def test_fingerprint_sees_every_change():
    pair = tables.Pair(1, "a", "b", 2, (0.0, 0.5, 0.5), "", {})
    changed = [("complaint", "c"), ("response", "c"), ("severity", None), ("probabilities", (0.0, 0.4, 0.6))]
    pairs = [pair, *(pair._replace(**{name: to}) for name, to in changed)]
    assert len({str(data.Fingerprint([p])) for p in pairs}) == 5
