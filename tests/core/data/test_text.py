"""The texts: exactly those that benchmarks name, and no test code or foreign package among the standard library."""

import hashlib
import sysconfig

from canon.core.data.text import moby_dick, shakespeare, sotu, split, standard_library, standard_library_files


def test_shakespeare_is_the_same_text_everywhere():
    text = shakespeare()
    assert len(text) == 5_057_198
    assert text.isascii()
    assert "\r" not in text
    assert text.startswith("ALL'S WELL THAT ENDS WELL")
    prefix = text[:1_115_394]  # what the learning-speed benchmark trains and validates on
    assert len(set(prefix)) == 77
    assert (
        hashlib.sha256(prefix.encode()).hexdigest()
        == "a089c185aec11ed022964ac6bbbc1eac0129a19979654aa8d767423a69b50cb7"
    )


def test_speeches_and_novel():
    assert len(sotu()) == 10_760_042
    assert sotu().startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert "Call me Ishmael." in moby_dick()


def test_standard_library():
    files = standard_library_files()
    assert len(files) > 500
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= files.keys()
    assert not [name for name in files if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert list(files) == sorted(files)
    with open(f"{sysconfig.get_path('stdlib')}/argparse.py", encoding="utf-8") as file:
        assert files["argparse.py"] == file.read()
    assert standard_library() == "".join(files.values())


def test_split_is_one_cut():
    assert split(["abcdefghij" * 3], 0.9) == (["abcdefghij" * 2 + "abcdefg"], ["hij"])
    assert split(["abc", "defgh", "ij"], 0.5) == (["abc", "de"], ["fgh", "ij"])
    assert split(["abcde", "", "fghij"], 0.5) == (["abcde"], ["fghij"])
    assert split([], 0.5) == ([], [])
