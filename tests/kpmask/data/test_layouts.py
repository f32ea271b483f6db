"""Folders of videos: which files are one video, whose, and in which split."""

from __future__ import annotations

from kpmask.data.layouts import assign_splits, find_sources, frame_key, partition_of


def test_original_layout() -> None:
    sources = find_sources(
        [
            "train/id1#abc#000000#000064.mp4",
            "train/id1#abc#000064#000128/0000001.png",
            "train/id1#abc#000064#000128/0000000.png",
            "train/id1#abc#000064#000128/Thumbs.db",
            "train/stacked.PNG",
            "test/id2.gif",
            "test/.hidden.mp4",
            "train/notes.txt",
        ]
    )
    assert [(s.name, s.partition, s.identity, s.is_folder) for s in sources] == [
        ("id2", "test", "id2", False),
        ("id1#abc#000000#000064", "train", "id1", False),
        ("id1#abc#000064#000128", "train", "id1", True),
        ("stacked", "train", "stacked", False),
    ]
    assert sources[2].files == (
        "train/id1#abc#000064#000128/0000000.png",
        "train/id1#abc#000064#000128/0000001.png",
    )


def test_folder_without_splits() -> None:
    sources = find_sources(["a.mp4", "walk/1.png", "b.png"], empty_folders=["empty"])
    assert [(s.key, s.partition, s.files) for s in sources] == [
        ("a.mp4", None, ("a.mp4",)),
        ("b.png", None, ("b.png",)),
        ("empty", None, ()),
        ("walk", None, ("walk/1.png",)),
    ]


def test_names_are_unique() -> None:
    keys = ["x/a.mp4", "y/a.mp4", "y/a.gif", "y/b.mp4", "a/b.v2.mp4"]
    assert {s.key: s.name for s in find_sources(keys)} == {
        "x/a.mp4": "x__a.mp4",
        "y/a.mp4": "y__a.mp4",
        "y/a.gif": "y__a.gif",
        "y/b.mp4": "b",
        "a/b.v2.mp4": "b.v2",
    }


def test_frame_key_is_the_published_one() -> None:
    assert frame_key("train/a", 12) == "train/a/0000012.png"


def test_splits_have_their_share_and_do_not_move() -> None:
    names = [f"id{i}" for i in range(2000)]
    splits = assign_splits(names, test_fraction=0.1)
    assert 150 < sum(split == "test" for split in splits.values()) < 250
    more = assign_splits([*names, "another"], test_fraction=0.1)
    assert {name: more[name] for name in names} == splits
    assert assign_splits(names[::-1], test_fraction=0.1) == splits


def test_few_identities_fill_both_splits() -> None:
    for count in range(2, 6):
        for fraction in (0.01, 0.5, 1.0):
            splits = assign_splits([f"v{i}" for i in range(count)], test_fraction=fraction)
            assert set(splits.values()) == {"train", "test"}
    assert assign_splits(["only"], test_fraction=1.0) == {"only": "train"}
    assert set(assign_splits(["a", "b"], test_fraction=0.0).values()) == {"train"}


def test_split_of_one_name_is_that_among_all() -> None:
    names = [f"id{i}" for i in range(500)]
    splits = assign_splits(names, test_fraction=0.1)
    assert {name: partition_of(name, test_fraction=0.1) for name in names} == splits


def test_named_identities_decide_alone() -> None:
    for name, split in (("a", "test"), ("b", "train")):
        assert partition_of(name, test_identities={"a"}, test_fraction=1.0) == split
