"""Files that are whole or not there."""

import pytest

from longlive_jax.files import whole_file


def test_a_whole_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert partial.suffix == ".json" and not path.exists()
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


def test_half_a_file_is_no_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
